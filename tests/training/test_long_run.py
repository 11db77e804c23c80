"""train.py over 20,000 tiny steps: its memory, its open files and its log, as seen from outside.

pytest -m slow tests/training/test_long_run.py   a minute
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import arguments, write_tiny

import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it is read from /proc"),
]
STEPS = 20_000
WINDOW = 2_000  # steps before the first window, and in each of the two windows that are compared
TIMEOUT = 900  # seconds
SMALLEST = {
    "n_layer": 1,
    "n_head": 1,
    "n_embd": 4,
    "block_size": 4,
    "batch_size": 1,
    "total_batch_size": 4,
    "max_steps": STEPS,
    "eval_interval": 250,
    "eval_tokens": 32,
    "checkpoint_interval": 250,
    "log_interval": 10,
    "out_dir": "out",
}


@dataclass
class Sample:
    """What another process sees of the training process at one moment."""

    step: int  # of the last line of log.jsonl
    log_is_complete: bool  # every line parses, and there is one for each step
    pages: int  # of resident memory
    open_files: int


def take_sample(pid, log):
    text = log.read_text() if log.exists() else ""
    steps = []
    for line in text.splitlines():
        try:
            steps.append(json.loads(line)["step"])
        except ValueError:
            steps.append(None)
    return Sample(
        step=len(steps) - 1,
        log_is_complete=steps == list(range(len(steps))),
        pages=int(Path(f"/proc/{pid}/statm").read_text().split()[1]),
        open_files=len(os.listdir(f"/proc/{pid}/fd")),
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Train once; return a sample of each second until shortly before the end."""
    folder = tmp_path_factory.mktemp("long")
    write_tiny(folder)
    command = [sys.executable, Path(train.__file__), *arguments(**SMALLEST)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT
    samples = [take_sample(process.pid, folder / "out/log.jsonl")]
    try:
        # In the last steps the process may end, and its memory be gone, before it is read.
        while samples[-1].step < STEPS - 500:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(1)
            samples.append(take_sample(process.pid, folder / "out/log.jsonl"))
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    return samples


def compare_windows(samples, field):
    """Return the least value in an early and in a late window of steps.

    The least one, because a save or an evaluation needs memory and files for a moment. The late
    window ends before the last steps: a process that is about to exit closes its files.
    """
    early = [s for s in samples if WINDOW <= s.step < 2 * WINDOW]
    late = [s for s in samples if STEPS - WINDOW <= s.step < STEPS - 500]
    return min(getattr(s, field) for s in early), min(getattr(s, field) for s in late)


def test_memory_does_not_grow_with_the_steps(samples):
    early, late = compare_windows(samples, "pages")
    assert late <= 1.01 * early


def test_the_number_of_open_files_does_not_grow_with_the_steps(samples):
    early, late = compare_windows(samples, "open_files")
    assert late == early


def test_the_log_is_complete_at_every_moment(samples):
    assert len(samples) > 20
    assert all(sample.log_is_complete for sample in samples)
