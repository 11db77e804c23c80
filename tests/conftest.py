"""Helpers and fixtures of several test files: a tiny dataset, a tiny run, a hub."""

import contextlib
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Many tests fork, and a forked process cannot use CUDA. So only the tests of the GPU see one:
# pytest -m gpu. The workers of pytest-xdist do not have these arguments, but the environment of the
# process that has them.
if not ("PYTEST_XDIST_WORKER" in os.environ or any("gpu" in arg for arg in sys.argv[1:])):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import exercises
import numpy as np
import pytest
import torch
from hub import hub  # noqa: F401  a fixture

import train
from common.errors import UserError, run_program
from common.tokenizer import get_tokenizer

# A second thread does not speed up tiny tensors, and slows down processes that share the cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))
# The options of a run that takes two seconds: 12 steps of two micro-steps, dropout and clipping.
TINY = {
    "dataset": "tiny",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "dropout": 0.1,
    "batch_size": 4,
    "total_batch_size": 128,
    "max_steps": 12,
    "warmup_steps": 3,
    "learning_rate": 0.01,
    "min_lr": 0.001,
    "eval_interval": 5,
    "eval_tokens": 256,
    "checkpoint_interval": 4,
    "log_interval": 5,
    "dtype": "float32",
    "device": "cpu",
    "grad_clip": 0.5,
    "out_dir": "out/tiny",
}
# A parameter of tests and fixtures, such as a tokenizer's name
GPT2 = pytest.param("gpt2", marks=pytest.mark.gpt2_bpe)
JOBS = pytest.StashKey()
IDEA_FAILED = pytest.StashKey()
MEMORY_FILES = Path("/dev/shm")  # files in memory, on Linux
MEMORY_BYTES = 2e9  # ten times what the tests need at a time


def pytest_configure(config):
    """Choose the exercises to test, and where temporary files are: in memory if there is room.

    The tests write and delete 17,000 files. On a disk they wait a minute for that. TMPDIR names
    another place.
    """
    exercises.choose(config.option)
    if "TMPDIR" in os.environ or not os.access(MEMORY_FILES, os.W_OK):
        return
    if shutil.disk_usage(MEMORY_FILES).free > MEMORY_BYTES:
        tempfile.tempdir = str(MEMORY_FILES)


@pytest.hookimpl(tryfirst=True)  # before -m selects tests by their marks
def pytest_collection_modifyitems(items):
    """Mark the tests that use GPT-2's tokenizer; put those that wait for background jobs last."""
    for item in items:
        if "gpt2_tokenizer" in item.fixturenames:
            item.add_marker(pytest.mark.gpt2_bpe)
    items.sort(key=lambda item: "background" in item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Note when a test of an exercise's idea fails in the reader's file."""
    report = yield
    if report.failed and item.path.parent.name == "exercises":
        item.session.stash[IDEA_FAILED] = True
    return report


def pytest_runtest_setup(item):
    is_contract = "model_my_" in item.name and item.path.parent.name != "exercises"
    if is_contract and item.session.stash.get(IDEA_FAILED, False):
        pytest.skip("first write the idea: a test of tests/exercises failed")
    if item.get_closest_marker("gpt2_bpe") and not has_gpt2_bpe():
        pytest.skip("GPT-2's BPE file is not available (no network, and not in tiktoken's cache)")


@functools.cache
def has_gpt2_bpe():
    """Return whether tiktoken has GPT-2's BPE file in its cache, or can download it."""
    with contextlib.suppress(UserError):
        get_tokenizer({"tokenizer": "gpt2"})
        return True
    return False


def pytest_collection_finish(session):
    """Start the background jobs of the selected tests."""
    from background import Background, select_jobs  # which imports this file

    gc.freeze()  # excludes all objects so far: collecting garbage takes 3 ms instead of 300
    gc.unfreeze = lambda: None  # train.py would unfreeze them, too
    jobs = select_jobs(session.items)
    if jobs and not session.config.option.collectonly:
        session.config.stash[JOBS] = Background(jobs)


def pytest_unconfigure(config):
    if JOBS in config.stash:
        config.stash[JOBS].stop()


@pytest.fixture(scope="session")
def background(request):
    """Return the process of the background jobs; see tests/helpers/background.py."""
    return request.config.stash[JOBS]


def arguments(**options):
    """Return the command line of the tiny run with changed options; None leaves one out."""
    changed = TINY | options
    return [f"--{name}={value}" for name, value in changed.items() if value is not None]


def write_dataset(folder, train_ids, val_ids, meta):
    folder.mkdir(parents=True)
    np.array(train_ids, dtype="<u2").tofile(folder / "train.bin")
    np.array(val_ids, dtype="<u2").tofile(folder / "val.bin")
    (folder / "meta.json").write_text(json.dumps(meta))


def write_tiny(folder):
    """Write the dataset data/tiny, bytes of Python-like text, into a folder."""
    ids = list(TEXT.encode())
    write_dataset(folder / "data" / "tiny", ids[:-600], ids[-600:], {"tokenizer": "byte"})


def refused(capsys, argv, main=train.main):
    """Run a program with arguments that it must refuse; return its one line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_program(main, argv)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def decode(tokenizer, ids):
    """Return the text of the token ids; bytes that are not UTF-8 become U+FFFD."""
    text = b"".join(tokenizer.decode_single_token_bytes(token_id) for token_id in ids)
    return text.decode("utf-8", errors="replace")


def read_log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Change into an empty working directory with data/tiny, bytes of Python-like text."""
    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def _trained(tmp_path_factory):
    """Train the tiny run once per session; return its working directory."""
    before = os.getcwd()
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder)
    os.chdir(folder)
    train.main(arguments())
    os.chdir(before)
    return folder


@pytest.fixture
def tiny_run(_trained, workdir):
    """Copy the finished tiny run to out/tiny of the working directory."""
    shutil.copytree(_trained / "out", workdir / "out")
    return workdir / "out" / "tiny"


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Return the folder of the templates of tests/helpers/readers.py."""
    from readers import make_templates  # which imports this file

    return make_templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    """Return GPT-2's tokenizer. Tests that use it are skipped where it is not available."""
    return get_tokenizer({"tokenizer": "gpt2"})
