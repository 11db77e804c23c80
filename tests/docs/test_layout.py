"""The layout: imports point one way, only nanoGPT's files are pickles, a tool names its command."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from variants import MODELS

ROOT = Path(__file__).parents[2]
PROGRAMS = {"train", "sample", "prepare_data"}
# The modules of this repository that a kind of file may import:
# experiments -> tools -> programs -> training -> common. A model imports none.
ALLOWED = {
    "model": set(),
    "configurator": {"common.errors"},
    "common": {"common"},
    "training": {"training", "common", "configurator"},
    "program": {"common", "configurator"},
    "tools": {"tools", "training", "common", "configurator", *PROGRAMS},
    "experiments": {"experiments", "tools", "training", "common", "configurator", *PROGRAMS},
}
# nanoGPT's files are pickles; tests/formats/test_nanogpt.py shows that code in them does not run.
PICKLES = ROOT / "common/nanogpt.py"
FOLDERS = [ROOT, *(ROOT / name for name in ("common", "training", "tools", "experiments"))]
FOLDERS += [path for path in (ROOT / "tools").iterdir() if path.is_dir()]


def kind(path):
    """Return the kind of a file, a key of ALLOWED if there is a rule for it."""
    if path.parent != ROOT:
        return path.relative_to(ROOT).parts[0]
    if path.stem in MODELS:
        return "model"
    return "program" if path.stem in PROGRAMS else path.stem


ALL_FILES = itertools.chain.from_iterable(sorted(folder.glob("*.py")) for folder in FOLDERS)
FILES = [path for path in ALL_FILES if kind(path) in ALLOWED]
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix()
)
each_file_without_pickles = pytest.mark.parametrize(
    "path",
    [path for path in FILES if path != PICKLES],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)


def imports(path):
    """Return the names of the modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_ours(name):
    """Return whether a module belongs to this repository."""
    top = name.partition(".")[0]
    return (ROOT / top).is_dir() or (ROOT / f"{top}.py").exists()


def is_allowed(name, allowed):
    """Return whether a module is one of the allowed ones, or inside one of them."""
    return any(f"{name}.".startswith(f"{module}.") for module in allowed)


@each_file
def test_imports_point_one_way(path):
    allowed = ALLOWED[kind(path)]
    if path.stem == "train":
        # train.py prepares a small dataset that is missing.
        allowed = allowed | {"training", "prepare_data"}
    if path.parent.name == "common" and path.stem == "errors":
        allowed = set()
    ours = [name for name in imports(path) if is_ours(name)]
    assert [name for name in ours if not is_allowed(name, allowed)] == []


def test_a_checkpoint_does_not_know_its_run():
    modules = {name.rpartition(".")[0] for name in imports(ROOT / "common/checkpoint.py")}
    assert "common.run_dir" not in modules and "common" not in modules


def test_a_model_imports_torch_only():
    for name in MODELS:
        packages = {module.partition(".")[0] for module in imports(ROOT / f"{name}.py")}
        assert packages == {"torch", "dataclasses"}, name


@each_file_without_pickles
def test_no_other_file_imports_a_module_of_pickles(path):
    packages = {name.partition(".")[0] for name in imports(path)}
    assert not packages & {"pickle", "marshal", "shelve", "dill"}


@each_file
def test_no_file_imports_pyplot_whose_backend_is_that_of_a_notebook(path):
    names = imports(path)
    assert not [name for name in names if name.startswith("matplotlib.pyplot")]
    assert "matplotlib.use(" not in path.read_text(encoding="utf-8")


@each_file_without_pickles
def test_no_other_file_calls_torch_load_or_save(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save"}


FILES_OF_TOOLS = [path for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__"]
TOOLS = sorted([*FILES_OF_TOOLS, ROOT / "tools" / "bench"])  # a folder runs its __main__.py


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_a_tool_started_as_a_file_names_its_command(tool, tmp_path):
    command = [sys.executable, tool]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert completed.returncode != 0
    assert completed.stderr.count("\n") == 1
    assert f"python -m tools.{tool.stem}" in completed.stderr
