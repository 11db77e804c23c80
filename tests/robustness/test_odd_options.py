"""Odd options and environments: every program succeeds, or says in one line what is wrong.

`pytest -m slow tests/robustness/test_odd_options.py` runs all cases and starts the real programs.
"""

import os
import random
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, arguments
from faults import run_forked
from readers import copy_template

import prepare_data
import sample
import train
from common.models import model_module
from tools import estimate_memory, export, plot_loss

ROOT = Path(train.__file__).parent
SAMPLE = 10  # odd numbers that are tried by default
INTS = ["-1", "0"]
FLOATS = ["-1.0", "0.0", "nan", "inf", "-inf"]
PREPARE_ARGV = ["mine", "--input=text.txt", "--tokenizer=byte"]
SAMPLE_ARGV = ["--init_from=out/tiny", "--prompt=def ", "--max_new_tokens=4", "--stop=e"]


@pytest.fixture
def folder(templates, tmp_path):
    """Return a folder with a dataset, data/tiny, and a run, out/tiny."""
    return copy_template(templates, "run", tmp_path)


# Numbers --------------------------------------------------------------------------------------

# program: (main, argv, the dataclass of its options, the model that has others)
NUMBER_PROGRAMS = {
    "train": (
        train.main,
        arguments(out_dir="out/new", max_steps=1),
        train.TrainConfig,
        "model",
    ),
    "sample": (sample.main, SAMPLE_ARGV, sample.SampleConfig, None),
    "prepare_data": (prepare_data.main, PREPARE_ARGV, prepare_data.PrepareConfig, None),
    "estimate_memory": (
        estimate_memory.main,
        ["--model=model_rope_gqa_swa", "--n_layer=2"],
        estimate_memory.EstimateConfig,
        "model_rope_gqa_swa",
    ),
}


def number_cases():
    """Return [(program, option, value)] for every option that is a number."""
    cases = []
    for program, (_, _, options, model) in NUMBER_PROGRAMS.items():
        types = typing.get_type_hints(options)
        if model is not None:
            types |= typing.get_type_hints(model_module(model).GPTConfig)
        for option, kind in types.items():
            kinds = typing.get_args(kind) or (kind,)
            values = INTS if int in kinds else FLOATS if float in kinds else []
            cases += [(program, option, value) for value in values]
    return cases


def number_problems(cases, templates, tmp_path):
    """Return a line for each case that neither succeeds nor is refused by the option's name."""
    problems = []
    for number, (program, option, value) in enumerate(cases):
        folder = copy_template(templates, "run", tmp_path / str(number))
        main, argv, _, _ = NUMBER_PROGRAMS[program]
        outcome = run_forked(main, [*argv, f"--{option}={value}"], folder)
        problem = outcome.problem(option, "not finite") if outcome.status != 0 else None
        if "Traceback" in outcome.err:
            problem = outcome.err[-1000:]
        if problem:
            problems.append(f"{program} --{option}={value}: {problem}")
    print(*problems, sep="\n")
    return problems


def test_a_few_odd_numbers_succeed_or_are_refused_by_name(templates, tmp_path):
    chosen = random.Random(0).sample(number_cases(), SAMPLE)
    assert not number_problems(chosen, templates, tmp_path)


@pytest.mark.slow
def test_all_odd_numbers_succeed_or_are_refused_by_name(templates, tmp_path):
    cases = number_cases()
    print(f"\n{len(cases)} numbers")
    assert not number_problems(cases, templates, tmp_path)


def test_a_tiny_top_p_takes_the_most_likely_token(folder):
    argv = SAMPLE_ARGV[:-1]
    greedy = run_forked(sample.main, [*argv, "--temperature=0"], folder)
    nucleus = run_forked(sample.main, [*argv, "--top_p=1e-300"], folder)
    assert greedy.status == 0
    assert nucleus.out == greedy.out


# Paths ----------------------------------------------------------------------------------------

EXPORT_ARGV = ["--init_from=out/tiny", "--out_dir=exported"]


def test_a_tilde_after_the_equals_sign_is_the_home_directory(templates, tmp_path, monkeypatch):
    home = copy_template(templates, "run", tmp_path)
    work = copy_template(templates, "foreign", tmp_path)
    monkeypatch.setenv("HOME", str(home))
    for main, argv in [
        (prepare_data.main, ["mine", "--input=~/text.txt", "--tokenizer=byte"]),
        (train.main, arguments(out_dir="~/out/new", max_steps=1)),
        (sample.main, ["--init_from=~/out/new", "--max_new_tokens=1"]),
        (export.main, ["--init_from=~/out/new", "--out_dir=~/exported"]),
    ]:
        outcome = run_forked(main, argv, work)
        assert outcome.status == 0, outcome.err
    assert (home / "out/new/step_00000001").is_dir()
    assert (home / "exported/model.safetensors").is_file()
    assert not list(work.rglob("~*"))


# A pipe in the place of a file that is written, or of a lock. Those that are read: test_mutants.py.
PIPES = [
    ("out/tiny/.lock", train.main, arguments(max_steps=13)),
    ("data/mine/.lock", prepare_data.main, PREPARE_ARGV),
    ("data/mine/train.bin.part", prepare_data.main, PREPARE_ARGV),
    ("data/mine/meta.json.part", prepare_data.main, PREPARE_ARGV),
    ("out/tiny/log.jsonl", train.main, arguments(max_steps=13)),
    ("out/loss.png", plot_loss.main, ["out/tiny"]),
    ("exported", export.main, EXPORT_ARGV),
]


@pytest.mark.parametrize(("path", "main", "argv"), PIPES, ids=[path for path, _, _ in PIPES])
def test_a_pipe_in_the_place_of_a_file_to_write_does_not_block(folder, path, main, argv):
    pipe = folder / path
    pipe.parent.mkdir(parents=True, exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    outcome = run_forked(main, argv, folder)
    assert outcome.status == 0 or outcome.problem(pipe.name) is None


# Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_of_any_bytes_is_continued(folder, seed):
    prompt = random.Random(seed).randbytes(4).replace(b"\0", b"\xff")
    argument = os.fsdecode(b"--prompt=" + prompt)
    argv = ["--init_from=out/tiny", argument, "--max_new_tokens=4"]
    outcome = run_forked(sample.main, argv, folder)
    assert outcome.status == 0, outcome.err
    assert "Traceback" not in outcome.err


def test_a_byte_order_mark_before_text_is_no_token(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    argv = ["mine", "--input=text.txt", "--tokenizer=byte"]
    assert run_forked(prepare_data.main, argv, tmp_path).status == 0
    assert bin_ids(tmp_path)[:5] == list(TEXT[:5].encode())


def bin_ids(folder):
    """Return the token ids of data/mine, training and validation."""
    bins = [(folder / f"data/mine/{split}.bin").read_bytes() for split in ("train", "val")]
    return np.frombuffer(b"".join(bins), dtype="<u2").tolist()


def test_a_million_white_spaces_decode_to_themselves(tmp_path, gpt2_tokenizer):
    text = "word" + 166_700 * " \t\n\r\u3000\xa0" + "word"
    (tmp_path / "text.txt").write_bytes(text.encode())
    argv = ["mine", "--input=text.txt", "--tokenizer=gpt2"]
    outcome = run_forked(prepare_data.main, argv, tmp_path)
    assert outcome.status == 0, outcome.err
    decoded = b"".join(map(gpt2_tokenizer.decode_single_token_bytes, bin_ids(tmp_path)))
    assert decoded == text.encode()


# Real programs --------------------------------------------------------------------------------

REAL_PROGRAMS = {
    "train": ["train.py", *arguments(out_dir="out/new", max_steps=1)],
    "sample": ["sample.py", *SAMPLE_ARGV],
    "prepare_data": ["prepare_data.py", *PREPARE_ARGV],
    "export": ["-m", "tools.export", *EXPORT_ARGV],
    "plot_loss": ["-m", "tools.plot_loss", "out/tiny"],
    "estimate_memory": ["-m", "tools.estimate_memory", "--n_layer=1"],
}


def command(name):
    program, *argv = REAL_PROGRAMS[name]
    path = [program] if program == "-m" else [str(ROOT / program)]
    return [sys.executable, *path, *argv]


def environment(**variables):
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


def run_shell(folder, name, redirection, **variables):
    """Run a real program with a redirection of the shell; return (status, stdout, stderr)."""
    line = f'"$@" {redirection}'
    completed = subprocess.run(
        ["bash", "-c", line, "bash", *command(name)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        timeout=60,
    )
    return completed.returncode, completed.stdout.decode(), completed.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_PROGRAMS)
def test_a_closed_stdout_is_one_line_and_status_2(folder, name):
    status, _, err = run_shell(folder, name, ">&-")
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "stdout" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_PROGRAMS)
def test_a_closed_stderr_does_not_matter(folder, name):
    status, out, err = run_shell(folder, name, "2>&-")
    assert status == 0
    assert out
    assert not err


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_PROGRAMS)
def test_a_stdout_that_nobody_reads_is_no_traceback(folder, name):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        command(name), cwd=folder, env=environment(), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1, 2)
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.slow
def test_umlauts_work_where_python_writes_ascii(folder):
    text = 100 * "Grüße, Äpfel und Öl. "
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "data/ü").mkdir()
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    for program in (
        ["prepare_data.py", "ü", "--input=text.txt", "--tokenizer=char"],
        ["train.py", *arguments(dataset="ü", out_dir="out/ü", max_steps=1, n_layer=1)],
        ["sample.py", "--init_from=out/ü", "--prompt=Ä", "--max_new_tokens=20"],
        ["-m", "tools.export", "--init_from=out/ü", "--out_dir=exportiert-ü"],
        ["-m", "tools.plot_loss", "out/ü", "--out=out/ü.png"],
    ):
        path = [program[0]] if program[0] == "-m" else [str(ROOT / program[0])]
        line = [sys.executable, *path, *program[1:]]
        completed = subprocess.run(
            line, cwd=folder, env=environment(**ascii_only), capture_output=True, timeout=60
        )
        assert completed.returncode == 0, completed.stderr
        assert b"Traceback" not in completed.stderr
    assert (folder / "out/ü/step_00000001").is_dir()
    assert (folder / "exportiert-ü/model.safetensors").is_file()
