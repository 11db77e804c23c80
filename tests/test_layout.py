"""The layout: imports point one way, nothing unpickles, and a tool started as a file names its command."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = {"train", "sample", "prepare_data"}
MODELS = {path.stem for path in ROOT.glob("model*.py")}
# What a kind of file may import of ours: experiments -> tools -> programs -> common, models nothing.
ALLOWED = {
    "model": set(),
    "configurator": {"common.errors"},
    "common": {"common"},
    "program": {"common", "configurator"},
    "tools": {"tools", "common", "configurator", *PROGRAMS},
    "experiments": {"experiments", "tools", "common", "configurator", *PROGRAMS},
}
FOLDERS = (ROOT, ROOT / "common", ROOT / "tools", ROOT / "experiments")


def kind(path):
    """Which of the kinds above a file is."""
    if path.parent != ROOT:
        return path.parent.name
    if path.stem in MODELS:
        return "model"
    return "program" if path.stem in PROGRAMS else path.stem


FILES = [
    path for folder in FOLDERS for path in sorted(folder.glob("*.py")) if kind(path) in ALLOWED
]


def imports(path):
    """The names of the modules that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_ours(name):
    top = name.partition(".")[0]
    return (ROOT / top).is_dir() or (ROOT / f"{top}.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path):
    allowed = ALLOWED[kind(path)]
    if path.stem == "train":
        allowed = allowed | {"prepare_data"}  # a small missing dataset is made on the spot
    if path.parent.name == "common" and path.stem == "errors":
        allowed = set()
    ours = {name for name in imports(path) if is_ours(name)}
    assert not {
        name for name in ours if not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed)
    }


def test_a_model_imports_torch_only():
    for name in MODELS:
        assert {module.partition(".")[0] for module in imports(ROOT / f"{name}.py")} == {
            "torch",
            "dataclasses",
        }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_reads_or_writes_a_pickle(path):
    assert not {
        name
        for name in imports(path)
        if name.partition(".")[0] in ("pickle", "marshal", "shelve", "dill")
    }
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert not {"torch.load", "torch.save"} & {ast.unparse(call.func) for call in calls}


TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_started_as_a_file_names_its_command(name, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert f"python -m tools.{name}" in done.stderr
