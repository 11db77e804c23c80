"""The exercises of tools/exercise.py: which are tested, and what their tests say."""

import importlib

import pytest
from variants import MODELS, ROOT

from tools.exercise import EXERCISES, file_name

WRITTEN = []  # the modules of the reader's files that pytest -k names


def choose(option):
    """Add the reader's files to those tested if pytest's -k names one: it holds "my_".

    option   pytest's options
    """
    if "my_" not in option.keyword:
        return
    if option.tbstyle == "auto":
        option.tbstyle = "short"  # the lines of a traceback, without the numbers of all tensors
    names = [file_name(name).removesuffix(".py") for name in EXERCISES]
    WRITTEN.extend(name for name in names if (ROOT / f"{name}.py").exists())
    MODELS.extend(name for name in WRITTEN if name.startswith("model_my_"))


def versions(name):
    """Return the names of the modules with an exercise's code: ours, and the reader's if tested."""
    ours = EXERCISES[name].source.removesuffix(".py").replace("/", ".")
    theirs = file_name(name).removesuffix(".py")
    return [ours, *(module for module in WRITTEN if module == theirs)]


def version_fixture(name):
    """Return a fixture: each module with the code of an exercise."""

    @pytest.fixture(params=versions(name))
    def module(request):
        return importlib.import_module(request.param)

    return module


def missing(sentence):
    """Fail a test with one sentence that says which property is missing."""
    raise pytest.fail.Exception(sentence, pytrace=False) from None
