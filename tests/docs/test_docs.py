"""README.md and docs/: links, files, options and commands are those of the code.

A command runs in this process, with the options of a tiny run after its own. A command of a form
that run() does not know fails. The edits of docs/BREAK_IT.md make the tests that they name fail:

    pytest -m slow tests/docs/test_docs.py
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
from documents import BLOCK
from foreign import random_gpt2
from notebook import streams_of_a_notebook
from programs import OPTIONS
from torch.distributed.run import get_args_parser

import prepare_data
import sample
import train
from common import pretrained
from common.models import models_with_option
from configurator import configure, configure_with_model
from experiments import drawings, explorer, look, probes, report, study
from tools import estimate_memory, exercise, export, plot_loss
from tools.bench import __main__ as bench

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
FILE = re.compile(
    r"[\w./*-]+\.(py|md|txt|toml)(::\S+)?|(config|docs|tests|experiments|common|tools)/[\w./*-]*"
)
COMMAND = re.compile(r"(python|torchrun) .*\.py\b|python -m |pytest .|diff .|git diff .")
FILES_OF_USERS = {  # examples of what a reader makes
    "model_mine.py",
    "model_qknorm.py",
    "model_my_gqa.py",
    "model_my_window.py",
    "corpus/*.txt",
}
OTHER_OPTIONS = {"help", "key", "logdir"}  # --key=value; tensorboard --logdir=
each_document = pytest.mark.parametrize("name", TEXTS)


def inline_code(text):
    """Return what is in single backquotes, with line breaks as spaces."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a document."""
    result = set()
    for title in re.findall(r"^#+ (.*)", BLOCK.sub("", text), re.M):
        words = re.sub(r"\]\(.*?\)", "", title).lower()  # without the targets of links
        result.add(re.sub(r"[^\w -]", "", words).replace(" ", "-"))
    return result


def exists(name):
    """Return whether a file, a pattern of files or a test, FILE::TEST, exists below the root."""
    file, _, function = name.partition("[")[0].partition("::")
    if file in FILES_OF_USERS:
        return True
    paths = list(ROOT.glob(file.removeprefix("./")))
    if not function:
        return bool(paths)
    return any(f"def {function}(" in path.read_text("utf-8") for path in paths)


@each_document
def test_links_lead_to_files_and_headings_that_exist(name):
    links = re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", BLOCK.sub("", TEXTS[name]))
    for file, anchor in links:
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), file
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8"))


@each_document
def test_files_that_are_named_exist(name):
    files = [code for code in inline_code(TEXTS[name]) if FILE.fullmatch(code)]
    assert [file for file in files if not exists(file)] == []


def known_options():
    """Return the names of the options of all programs, of all models and of torchrun."""
    known = set(OTHER_OPTIONS)
    for config in OPTIONS:
        known.update(option.name for option in dataclasses.fields(config))
    known.update(flag.lstrip("-") for flag in get_args_parser()._option_string_actions)
    return known


@each_document
def test_options_that_are_named_exist(name):
    known = known_options()
    for code in inline_code(TEXTS[name]):
        if not code.startswith(("git ", "pip ")):
            assert set(re.findall(r"(?:^|\s)--([\w-]+)", code)) <= known


# Commands -------------------------------------------------------------------------------------

NOT_RUN = {
    "bash",
    "diff",
    "git",
    "grep",
    "cp",
    "pip",
    "pytest",
    "ruff",
    "python3",
    ".",
    "cd",
    "export",
}
# What a command gets in the place of a reader's own files.
STAND_INS = {"CONFIG": "config/quickstart.py", "model_mine": "model"}


def commands():
    """Return every command in a block of sh or in inline code, once; not what a shell computes."""
    lines = []
    for text in TEXTS.values():
        for language, block in BLOCK.findall(text):
            if language in ("sh", "bash", "shell"):
                lines += block.replace("\\\n", " ").splitlines()
        lines += [code for code in inline_code(text) if COMMAND.match(code) and "..." not in code]
    found = {}  # a dict keeps the order
    for line in lines:
        without_comment = re.sub(r"(^|\s)#.*", "", line)
        for part in without_comment.split("&&"):
            command = " ".join(part.split())
            if command and "$(" not in command:
                found[command] = None
    return list(found)


def run(argv):
    """Run a command in its short form, or check the files that it names."""
    while argv and (argv[0] == "srun" or re.match(r"\w+=", argv[0])):
        argv = argv[1:]
    if argv and argv[0] == "torchrun":
        launch = get_args_parser().parse_args(argv[1:])
        argv = ["python", launch.training_script, *launch.training_script_args]
    if not argv or argv[0] in NOT_RUN or is_test_script(argv):
        missing = [arg for arg in argv if FILE.fullmatch(arg) and not exists(arg)]
        assert missing == []
        return
    if argv[0] == "python" and argv[1] in PROGRAMS:
        args = [replace_stand_ins(arg) for arg in argv[2:]]
        copy_runs(args)
        PROGRAMS[argv[1]](args)
        return
    if argv[:2] == ["python", "-m"] and argv[2] in TOOLS:
        copy_runs(argv[3:])
        TOOLS[argv[2]](argv[3:])
        return
    if argv[:2] == ["python", "-m"] and argv[2].startswith("experiments."):
        run_experiment(argv[2], argv[3:])
        return
    pytest.fail(f"run() does not know the form of this command, extend it: {shlex.join(argv)}")


def is_test_script(argv):
    return argv[0] == "python" and argv[1].startswith("tests/")


def replace_stand_ins(arg):
    for name, stand_in in STAND_INS.items():
        arg = arg.replace(name, stand_in)
    return arg


def copy_runs(argv):
    """Copy the tiny run to every run that a command needs."""
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
    tiny = {
        "max_steps": 1,
        "out_dir": None,
        "fsdp": False,
        "shard_degree": 0,
        "compile": False,
        "deterministic": False,
    }
    source = config.init_from.partition("/")[0]
    if source == "scratch":
        tiny.update(n_head=4, n_embd=32, vocab_size=257)
    elif source != "out":  # GPT-2 has its own shape; a run in out/ has that of the tiny run
        tiny.update(n_layer=None, n_head=None, n_embd=None)
    if any(arg.startswith("--n_kv_head=") for arg in argv):
        tiny["n_kv_head"] = 2  # divides n_head of each of these models
    train.main(argv + arguments(**tiny))


def run_prepare(argv):
    config = configure(prepare_data.PrepareConfig, argv, "", positional="name")
    if not config.input and config.name in prepare_data.DATASETS:
        return  # it downloads, or takes long
    path = Path((config.input or "mine.txt").replace("*", "a"))
    path.parent.mkdir(exist_ok=True)
    path.write_text(TEXT, encoding="utf-8")
    prepare_data.main([config.name, f"--input={config.input or path}", "--tokenizer=byte"])
    prepare_data.main([*argv, "--tokenizer=byte"])


def run_sample(argv):
    sample.main([*argv, "--max_new_tokens=5", "--device=cpu"])


def run_bench(argv):
    bench.main([*argv, "--device=cpu"])


def run_estimate_memory(argv):
    estimate_memory.main([*argv, "--n_layer=2", "--n_head=4", "--n_embd=32"])


def run_experiment(name, argv):
    module = importlib.import_module(name)
    if module in (report, drawings, explorer):
        assert argv == []
        return
    if module is look:
        look.main([*map(replace_stand_ins, argv), "--n_head=2", "--n_embd=16"])
        return
    assert configure(study.StudyConfig, argv, "").preset in module.PRESETS


PROGRAMS = {"train.py": run_train, "prepare_data.py": run_prepare, "sample.py": run_sample}
TOOLS = {
    "tools.plot_loss": plot_loss.main,
    "tools.export": export.main,
    "tools.bench": run_bench,
    "tools.estimate_memory": run_estimate_memory,
    "tools.exercise": exercise.main,
}


@pytest.mark.parametrize("command", commands())
def test_a_command_runs(command, tiny_run, monkeypatch):
    def fetch(name):
        random_gpt2(n_layer=1, n_head=4, n_embd=32, vocab_size=257).save_pretrained("released")
        Path("released/meta.json").write_text('{"tokenizer": "byte", "vocab_size": 257}')
        return Path("released")

    monkeypatch.setattr(pretrained, "_fetch", fetch)  # of GPT-2's released weights
    monkeypatch.setattr(plot_loss, "draw", lambda *_: None)  # takes longest
    nothing = bench.Benchmark(lambda bench: [], {"cpu": 1})  # each takes minutes
    monkeypatch.setattr(bench, "BENCHMARKS", dict.fromkeys(bench.BENCHMARKS, nothing))
    os.symlink(ROOT / "config", "config")
    run(shlex.split(command))


# Python ---------------------------------------------------------------------------------------


def test_the_python_lines_of_the_readme_generate_text_in_a_notebook(tiny_run):
    shutil.copytree(tiny_run, "out/quickstart")
    [code] = [code for language, code in BLOCK.findall(TEXTS["README.md"]) if language == "python"]
    names = {}
    with streams_of_a_notebook() as (out, _):
        exec(code, names)
    assert out.text.startswith("def ")
    assert len(out.text) > len("def \n")
    assert not names["model"].training
    assert names["tokenizer"].decode(names["tokenizer"].encode("def f(x):")) == "def f(x):"


# docs/BREAK_IT.md -----------------------------------------------------------------------------

ROW = re.compile(r"\| (\d+) \|.*?\| `(.*?)` \| `(.*?)` \| `(.*?)` \|.*\| `(.*?)` \|")
# number: (file, old, new, test)
EDITS = {row[1]: row.groups()[1:] for row in ROW.finditer(TEXTS["docs/BREAK_IT.md"])}
each_edit = pytest.mark.parametrize("number", EDITS)


@each_edit
def test_an_edit_replaces_a_text_that_occurs_once_and_names_a_test(number):
    file, old, new, test = EDITS[number]
    assert (ROOT / file).read_text(encoding="utf-8").count(old) == 1
    assert new != old
    assert exists(test)


def pytest_summary(folder, *tests):
    """Run these tests in a copy of the repository; return the last line of pytest's output."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rN", *tests]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def repository_copy(tmp_path_factory):
    """A copy of the repository, in which the tests of the table pass."""
    folder = tmp_path_factory.mktemp("repository") / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", "data", "out")
    shutil.copytree(ROOT, folder, ignore=ignore)
    tests = {test for *_, test in EDITS.values()}
    assert re.match(r"\d+ passed", pytest_summary(folder, *tests))
    return folder


@pytest.mark.slow
@each_edit
def test_an_edit_makes_its_test_fail(repository_copy, number):
    file, old, new, test = EDITS[number]
    path = repository_copy / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    summary = pytest_summary(repository_copy, test)
    path.write_text(text, encoding="utf-8")
    assert re.match(r"\d+ failed", summary)


# docs/READ_IT.md ------------------------------------------------------------------------------

READ_IT = TEXTS["docs/READ_IT.md"]
STEPS = re.split(r"^## ", READ_IT, flags=re.M)[1:]


def test_read_it_is_a_visit_of_30_minutes_and_steps_of_two_hours():
    visit, *steps = [re.match(r".* \((\d+) minutes\)\n", step)[1] for step in STEPS]
    assert int(visit) == 30
    assert sum(map(int, steps)) == 120


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[0])
def test_the_functions_to_read_are_in_the_files_that_a_step_names(step):
    for paragraph in re.findall(r"^\*\*Read\*\*.*?\n\n", step, re.M | re.S):
        files = re.findall(r"\]\(\.\./([\w/]+\.py)\)", paragraph)
        source = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        names = re.findall(r"`([\w.]+)`", paragraph)
        missing = [name for name in names if f"def {name.rpartition('.')[2]}(" not in source]
        assert missing == []


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[0])
def test_a_step_runs_the_test_of_the_edit_that_it_names(step):
    for number in re.findall(r"\*\*Break\*\*\s+row\s+(\d+)", step):
        *_, test = EDITS[number]
        assert test in step


# docs/explorer.html, which tests/docs/test_explorer_page.py opens in a browser ------------------

EXPLORER_TEXT = (ROOT / "docs" / "explorer.html").read_text(encoding="utf-8")


def test_every_test_that_the_explorer_names_exists():
    files = (ROOT / "tests").rglob("test_*.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"<code>(test_\w+)", EXPLORER_TEXT))
    assert named
    assert not {name for name in named if f"def {name}(" not in tests}


def test_the_explorer_has_a_switch_and_a_text_for_every_mistake():
    assert set(re.findall(r'data-mistake="(\w+)"', EXPLORER_TEXT)) == set(probes.MISTAKES)
    assert set(re.findall(r'data-follows="(\w+)"', EXPLORER_TEXT)) == set(probes.MISTAKES)
