"""tools/exercise.py leaves out our lines and no others; pytest tests a file on request only."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys

import pytest
from conftest import refused
from ideas import failures, load, solved, source_of
from variants import ROOT

from tools.exercise import EXERCISES, exercise_text, file_name, find, main

each_exercise = pytest.mark.parametrize("name", EXERCISES)
MODELS = [name for name in EXERCISES if file_name(name).startswith("model")]


# The files ------------------------------------------------------------------------------------


@each_exercise
def test_a_blank_is_a_docstring_and_not_implemented_error(name):
    text = exercise_text(EXERCISES[name])
    for path in EXERCISES[name].blanks:
        node = find(ast.parse(text), path)
        ours = find(ast.parse(source_of(name)), path)
        *docstring, left = [ast.unparse(statement) for statement in node.body]
        assert left == "raise NotImplementedError"
        has_docstring = isinstance(ours, ast.FunctionDef) and ast.get_docstring(ours)
        assert docstring == ([ast.unparse(ours.body[0])] if has_docstring else [])


@pytest.mark.parametrize("name", MODELS)
def test_with_our_lines_a_model_file_is_the_repository_s(name):
    assert solved(name) == source_of(name)


@pytest.mark.parametrize("name", [name for name in EXERCISES if name not in MODELS])
def test_with_our_lines_a_small_file_has_our_function_and_all_that_it_needs(name, tmp_path):
    module = load(solved(name), tmp_path)
    function = next(iter(EXERCISES[name].blanks)).split(".")[0]
    our_module = importlib.import_module(EXERCISES[name].source[:-3].replace("/", "."))
    ours = getattr(our_module, function)
    assert inspect.getsource(getattr(module, function)) == inspect.getsource(ours)
    used = {node.id for node in ast.walk(ast.parse(inspect.getsource(ours))) if is_name(node)}
    for needed in used & vars(our_module).keys():
        assert needed == function or getattr(module, needed) is getattr(our_module, needed), needed


def is_name(node):
    return isinstance(node, ast.Name)


@pytest.mark.parametrize("name", MODELS)
def test_without_our_lines_the_ideas_fail_with_not_implemented_error_only(name, tmp_path):
    module = load(exercise_text(EXERCISES[name]), tmp_path)
    raised = list(failures(name, module))
    assert raised
    assert {type(error) for error in raised} == {NotImplementedError}


# The tool -------------------------------------------------------------------------------------


def test_without_a_name_the_exercises_are_listed(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXERCISES)
    for line, exercise in zip(lines, EXERCISES.values(), strict=True):
        assert exercise.task in line


@each_exercise
def test_an_exercise_is_written_and_the_next_commands_are_printed(name, workdir, capsys):
    main([name])
    file = file_name(name)
    assert (workdir / file).read_text(encoding="utf-8") == exercise_text(EXERCISES[name])
    written, test, compare = capsys.readouterr().out.splitlines()
    assert written.startswith(f"{file}: ")
    assert all(path in written for path in EXERCISES[name].blanks)
    assert f"pytest -x -k my_{name}" in test
    assert EXERCISES[name].source in compare


def test_a_file_that_exists_is_never_overwritten(workdir, capsys):
    (workdir / "model_my_gqa.py").write_text("mine")
    assert "model_my_gqa.py" in refused(capsys, ["gqa"], main)
    assert (workdir / "model_my_gqa.py").read_text() == "mine"


def test_an_unknown_exercise_is_refused_with_the_names_of_all(workdir, capsys):
    line = refused(capsys, ["flash"], main)
    assert "flash" in line
    assert all(name in line for name in EXERCISES)
    assert not list(workdir.glob("*my_*"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git repository")
def test_git_ignores_the_files_of_exercises():
    files = [file_name(name) for name in EXERCISES]
    done = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == files


# pytest ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder like the repository's, with an unfinished exercise and one with a syntax error."""
    folder = tmp_path_factory.mktemp("checkout")
    hidden = {".git", ".venv", "data", "out", "tests", *map(file_name, EXERCISES)}
    for path in ROOT.iterdir():
        if path.name not in hidden:
            (folder / path.name).symlink_to(path)
    # A copy: pytest resolves symbolic links of tests.
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model_my_gqa.py").write_text(exercise_text(EXERCISES["gqa"]))
    (folder / "model_my_rope.py").write_text("def rotate(:\n")
    return folder


def lines_of_pytest(folder, *options):
    """Run pytest with tests of two exercises and of the contract; return its lines."""
    tests = [f"tests/exercises/test_{name}.py" for name in ("gqa", "rope")]
    tests.append("tests/models/test_variants.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | {"COLUMNS": "300"}  # no shortened lines
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.slow
def test_plain_pytest_leaves_the_files_of_exercises_alone(checkout):
    lines = lines_of_pytest(checkout, "--collect-only")
    assert [line for line in lines if "test_gqa.py::" in line]
    assert not [line for line in lines if "my_" in line or line.startswith("ERROR")]


@pytest.mark.slow
def test_pytest_k_names_what_fails_in_an_idea_and_skips_the_contract_then(checkout):
    lines = lines_of_pytest(checkout, "-k", "my_gqa or my_rope", "-rA")
    results = [line for line in lines if line.startswith(("FAILED", "ERROR", "PASSED", "SKIPPED"))]
    ideas = [line for line in results if "tests/exercises/" in line]
    gqa = [line for line in ideas if "[model_my_gqa" in line]
    rope = [line for line in ideas if "[model_my_rope" in line]
    assert gqa and rope and len(gqa) + len(rope) == len(ideas)
    assert all(line.startswith("FAILED") and "NotImplementedError" in line for line in gqa)
    assert all(line.startswith("ERROR") for line in rope)
    assert [line for line in lines if 'model_my_rope.py", line 1' in line]
    assert [line for line in lines if line.startswith("E ") and "SyntaxError" in line]
    contract = [line for line in results if line not in ideas]
    assert contract
    assert all(line.startswith("SKIPPED") and "write the idea" in line for line in contract)
