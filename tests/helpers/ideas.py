"""The tests of an exercise's idea, run on other modules than those that pytest has them for."""

import ast
import importlib
import itertools

import pytest
from variants import ROOT

from tools.exercise import EXERCISES, exercise_text, find


def source_of(name):
    """Return the text of the file with our solution of an exercise."""
    return (ROOT / EXERCISES[name].source).read_text(encoding="utf-8")


def solved(name):
    """Return the text of an exercise's file with each blank replaced by our code of its name."""
    source = source_of(name)
    lines = exercise_text(EXERCISES[name]).splitlines()
    blanks, ours = ast.parse("\n".join(lines)), ast.parse(source)
    for path in reversed(EXERCISES[name].blanks):  # from the end, so that line numbers stay right
        blank, code = find(blanks, path), find(ours, path)
        our_lines = source.splitlines()[code.lineno - 1 : code.end_lineno]
        lines[blank.lineno - 1 : blank.end_lineno] = our_lines
    return "\n".join(lines) + "\n"


def load(text, folder):
    """Write a text to a file in a folder, and return it as a module."""
    path = folder / "written.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failures(name, module):
    """Run the tests of an exercise's idea on a module, in their order; yield what they raise."""
    tests = vars(importlib.import_module(f"test_{name}"))
    for test in [value for key, value in tests.items() if key.startswith("test_")]:
        for arguments in cases(test):
            try:
                test(module, **arguments)
            except (Exception, pytest.fail.Exception) as error:
                yield error


def cases(test):
    """Return the arguments of each case of a test, a dict each, in pytest's order."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    found = [{}]
    for mark in marks:
        names, values = mark.args
        if isinstance(names, str):
            names, values = (names,), [(value,) for value in values]
        new = [dict(zip(names, value, strict=True)) for value in values]
        found = [earlier | later for earlier, later in itertools.product(found, new)]
    return found
