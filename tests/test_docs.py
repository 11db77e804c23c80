"""README.md and docs/: links lead somewhere, commands run, files and options are those of the code.

A command runs in this process: its own arguments, then those of a tiny run. One of a form that run() does not know
fails. The edits of docs/BREAK_IT.md do break the tests that they name: pytest -m slow tests/test_docs.py
"""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT, arguments
from test_pretrained import random_gpt2
from test_variants import MODELS
from torch.distributed.run import get_args_parser

import prepare_data
import sample
import train
from common import pretrained
from common.models import models_with_option
from configurator import configure, configure_with_model
from experiments import look, report, study
from tools import bench, estimate_memory, export, plot_loss

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
FILE = re.compile(
    r"[\w./*-]+\.(py|md|txt|toml)(::\S+)?|(config|docs|tests|experiments|common|tools)/[\w./*-]*"
)
COMMAND = re.compile(r"(python|torchrun) .*\.py\b|python -m |pytest .|diff .|git diff .")
USERS_FILES = {"model_mine.py", "corpus/*.txt"}  # examples of what readers make
OTHER_OPTIONS = {"help", "key"}  # --key=value
STANDS_FOR = {"CONFIG": "config/quickstart.py", "model_mine": "model"}
CHECKED_FOR_FILES = {"diff", "git", "cp", "pip", "pytest", "ruff", "python3", ".", "cd", "export"}
each_document = pytest.mark.parametrize("name", TEXTS)


def inline_code(text):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def anchors(text):
    """Those that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.*)", BLOCK.sub("", text), re.M)
    return {
        re.sub(r"[^\w -]", "", re.sub(r"\]\(.*?\)", "", title).lower()).replace(" ", "-")
        for title in titles
    }


def is_there(name):
    """Whether this is a file or a pattern of some, from the root; with ::, a test in it."""
    file, _, function = name.partition("[")[0].partition("::")
    files = ROOT.glob(file.removeprefix("./"))
    return file in USERS_FILES or any(
        not function or f"def {function}(" in path.read_text("utf-8") for path in files
    )


@each_document
def test_links_lead_to_files_and_headings_that_exist(name):
    for file, anchor in re.findall(
        r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", BLOCK.sub("", TEXTS[name])
    ):
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), file
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), anchor


@each_document
def test_files_that_are_named_exist(name):
    assert not [
        code for code in inline_code(TEXTS[name]) if FILE.fullmatch(code) and not is_there(code)
    ]


@each_document
def test_options_that_are_named_exist(name):
    programs = [
        train.TrainConfig,
        sample.SampleConfig,
        prepare_data.PrepareConfig,
        bench.BenchConfig,
    ]
    programs += [study.StudyConfig, look.LookConfig, plot_loss.PlotConfig, export.ExportConfig]
    programs.append(estimate_memory.EstimateConfig)
    programs += [*(train.model_module(model).GPTConfig for model in MODELS)]
    known = {
        field.name for program in programs for field in dataclasses.fields(program)
    } | OTHER_OPTIONS
    known |= {flag.lstrip("-") for flag in get_args_parser()._option_string_actions}
    code = " ".join(
        code for code in inline_code(TEXTS[name]) if not code.startswith(("git ", "pip "))
    )
    assert set(re.findall(r"(?:^|\s)--([\w-]+)", code)) <= known


# Commands -------------------------------------------------------------------------------------


def commands():
    """Every command in a block of sh or in inline code, once; not what a shell computes."""
    lines = []
    for text in TEXTS.values():
        for language, block in BLOCK.findall(text):
            lines += (
                block.replace("\\\n", " ").splitlines()
                if language in ("sh", "bash", "shell")
                else []
            )
        lines += [code for code in inline_code(text) if COMMAND.match(code) and "..." not in code]
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return list(
        dict.fromkeys(" ".join(part.split()) for part in parts if part.strip() and "$(" not in part)
    )


def run(argv):
    """Run a command in its short form, or check what can be checked of it."""
    while argv and (argv[0] == "srun" or re.match(r"\w+=", argv[0])):
        argv = argv[1:]
    if argv[:1] == ["torchrun"]:
        launch = get_args_parser().parse_args(argv[1:])
        argv = ["python", launch.training_script, *launch.training_script_args]
    if (
        not argv
        or argv[0] in CHECKED_FOR_FILES
        or (argv[0] == "python" and argv[1].startswith("tests/"))
    ):
        assert not [arg for arg in argv if FILE.fullmatch(arg) and not is_there(arg)]
    elif argv[:2] == ["python", "-m"] and argv[2].startswith("experiments."):
        module = importlib.import_module(argv[2])
        if module is look:
            look.main(
                [
                    *(re.sub("model_mine", "model", arg) for arg in argv[3:]),
                    "--n_head=2",
                    "--n_embd=16",
                ]
            )
        elif module is not report:
            assert configure(study.StudyConfig, argv[3:], "").preset in module.PRESETS
    elif argv[:2] == ["python", "-m"] and argv[2] in TOOLS:
        prepare_runs(argv[3:])
        TOOLS[argv[2]](argv[3:])
    elif argv[0] == "python" and argv[1] in PROGRAMS:
        args = [
            re.sub("|".join(STANDS_FOR), lambda match: STANDS_FOR[match[0]], arg)
            for arg in argv[2:]
        ]
        prepare_runs(args)
        PROGRAMS[argv[1]](args)
    else:
        pytest.fail(
            f"a command of a form that this test does not know, teach it: {shlex.join(argv)}"
        )


def prepare_runs(argv):
    """Make the runs that a command needs: the tiny one will do."""
    for arg in argv:
        needed = re.match(r"(?:--init_from=)?(out/\w+)", arg)
        if needed and not Path(needed[1]).exists():
            shutil.copytree("out/tiny", needed[1])


def run_train(argv):
    config, _ = configure_with_model(
        train.TrainConfig,
        argv,
        "",
        lambda config: train.model_module(config.model).GPTConfig,
        models_with_option,
    )
    shapes = {
        "scratch": dict(n_head=4, n_embd=32, vocab_size=257),
        "out": {},
    }  # a run has the tiny one's shape
    tiny = shapes.get(
        config.init_from.partition("/")[0], dict(n_layer=None, n_head=None, n_embd=None)
    )
    tiny = tiny | dict(
        max_steps=1, out_dir=None, fsdp=False, shard_degree=0, compile=False, deterministic=False
    )
    train.main(argv + arguments(**tiny))


def run_prepare(argv):
    config = configure(prepare_data.PrepareConfig, argv, "", positional="name")
    if config.input or config.name not in prepare_data.DATASETS:  # those download, or take long
        path = Path((config.input or "mine.txt").replace("*", "a"))
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXT, encoding="utf-8")
        prepare_data.main([config.name, f"--input={config.input or path}", "--tokenizer=byte"])
        prepare_data.main([*argv, "--tokenizer=byte"])


PROGRAMS = {"train.py": run_train, "prepare_data.py": run_prepare}
PROGRAMS["sample.py"] = lambda argv: sample.main([*argv, "--max_new_tokens=5", "--device=cpu"])
TOOLS = {"tools.plot_loss": plot_loss.main, "tools.export": export.main}
TOOLS["tools.bench"] = lambda argv: bench.main([*argv, "--device=cpu"])
TOOLS["tools.estimate_memory"] = lambda argv: estimate_memory.main(
    [*argv, "--n_layer=2", "--n_head=4", "--n_embd=32"]
)


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command, tiny_run, monkeypatch):
    def fetch(name):
        random_gpt2(n_layer=1, n_head=4, n_embd=32, vocab_size=257).save_pretrained("released")
        Path("released/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
        return Path("released")

    monkeypatch.setattr(pretrained, "_fetch", fetch)  # of GPT-2's released weights
    monkeypatch.setattr(
        bench, "BENCHMARKS", dict.fromkeys(bench.BENCHMARKS, lambda *args: [])
    )  # minutes each
    os.symlink(ROOT / "config", "config")
    run(shlex.split(command))


# docs/BREAK_IT.md -----------------------------------------------------------------------------

ROW = re.compile(r"\| (\d+) \|.*?\| `(.*?)` \| `(.*?)` \| `(.*?)` \|.*\| `(.*?)` \|")
EDITS = {row[1]: row.groups()[1:] for row in ROW.finditer(TEXTS["docs/BREAK_IT.md"])}
each_edit = pytest.mark.parametrize("number", EDITS)


@each_edit
def test_an_edit_replaces_a_text_that_exists_once_and_names_an_existing_test(number):
    file, old, new, node = EDITS[number]
    assert (
        (ROOT / file).read_text(encoding="utf-8").count(old) == 1 and new != old and is_there(node)
    )


def outcome(folder, *nodes):
    """The last line of pytest on these tests in a copy of the tree."""
    line = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rN", *nodes]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, in which the tests of the table pass."""
    folder = tmp_path_factory.mktemp("tree") / "copy"
    shutil.copytree(
        ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "data", "out")
    )
    assert re.match(r"\d+ passed", outcome(folder, *{node for *_, node in EDITS.values()}))
    return folder


@pytest.mark.slow
@each_edit
def test_an_edit_makes_its_test_fail(tree, number):
    file, old, new, node = EDITS[number]
    text = (tree / file).read_text(encoding="utf-8")
    (tree / file).write_text(text.replace(old, new), encoding="utf-8")
    last = outcome(tree, node)
    (tree / file).write_text(text, encoding="utf-8")
    assert re.match(r"\d+ failed", last)
