"""Several processes at once: they prepare one dataset, train in one directory, or read a run.

pytest -m slow tests/robustness/test_concurrent.py    more rounds of what depends on timing
"""

import shutil
import time

import pytest
from conftest import read_log, write_tiny
from data_commands import make_text, prepare_stdlib
from faults import Forked, files_of, fork_at_once, is_one_error, needs_fork, run_in
from runs import RUN, train_call

import prepare_data
from common.files import lock
from common.pretrained import load_model

pytestmark = needs_fork

ROUNDS = [pytest.param(1, id="sample"), pytest.param(20, id="all", marks=pytest.mark.slow)]
EVERY_STEP = {
    "max_steps": 15,
    "eval_interval": 1,
    "checkpoint_interval": 1,
    "keep_checkpoints": 1,
}


def open_stdlib():
    prepare_data.stdlib_files = lambda: ["a.txt", "b.txt"]
    prepare_data.open_dataset("stdlib")


def wait_until(condition):
    """Wait until a condition holds; fail after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# Datasets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("call", [prepare_stdlib, open_stdlib])
def test_two_processes_that_prepare_a_dataset_at_once_both_succeed(tmp_path, call, rounds):
    make_text(tmp_path)
    run_in(tmp_path, call)
    expected = files_of(tmp_path)
    for _ in range(rounds):
        shutil.rmtree(tmp_path / "data")
        outcomes = fork_at_once([call, call], tmp_path)
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
        assert files_of(tmp_path) == expected


def test_a_process_waits_for_the_one_that_prepares_the_dataset_and_says_so(tmp_path):
    make_text(tmp_path)
    release = tmp_path / "release"

    def hold():
        with lock("data/stdlib/.lock", on_busy=None):
            wait_until(release.exists)

    holder = Forked(hold, tmp_path)
    wait_until((tmp_path / "data/stdlib/.lock").exists)
    waiting = Forked(prepare_stdlib, tmp_path)
    wait_until(lambda: "waiting" in waiting.printed())
    assert not prepare_data.has_dataset(tmp_path / "data/stdlib")
    release.touch()
    assert holder.finish().status == 0
    outcome = waiting.finish()
    assert outcome.status == 0
    assert "data/stdlib" in outcome.err


# Locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_lock_is_held_by_one_process_at_a_time(tmp_path, times):
    """Each holder makes the lock file and removes it, while others wait."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(times):
            with lock("a/b/.lock", on_busy=lambda: None):
                number = int(counter.read_text())
                counter.write_text(str(number + 1))

    outcomes = fork_at_once([count, count, count], tmp_path)
    assert [outcome.err for outcome in outcomes] == ["", "", ""]
    assert counter.read_text() == str(3 * times)


# Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", ROUNDS)
def test_of_two_trainings_in_one_directory_one_is_refused(tmp_path, rounds):
    write_tiny(tmp_path)
    call = train_call(max_steps=20)
    for _ in range(rounds):
        trained, refused = sorted(
            fork_at_once([call, call], tmp_path), key=lambda outcome: outcome.status
        )
        assert trained.status == 0
        assert is_one_error(refused) and str(RUN) in refused.err and "--out_dir" in refused.err
        assert [line["step"] for line in read_log(tmp_path / RUN)] == list(range(21))
        shutil.rmtree(tmp_path / "out")


@pytest.fixture
def training(tmp_path):
    """Start a training that saves, evaluates and prunes in each step."""
    write_tiny(tmp_path)
    run_in(tmp_path, train_call(max_steps=1))
    process = Forked(train_call(**EVERY_STEP), tmp_path)
    yield process
    assert process.finish().status == 0


def is_training(process):
    """Return whether a training has printed neither its last line nor an error yet."""
    printed = process.printed()
    return "sample.py" not in printed and "error" not in printed


def test_a_run_can_be_loaded_at_any_moment_while_it_trains(training, tmp_path, capsys):
    loads = 0
    while is_training(training):
        load_model(str(tmp_path / RUN))
        loads += 1
    assert loads > 2
    assert capsys.readouterr().err == ""


def test_a_log_can_be_read_at_any_moment_while_a_run_trains(training, tmp_path):
    reads = 0
    while is_training(training):
        steps = [line["step"] for line in read_log(tmp_path / RUN)]
        assert steps == list(range(len(steps)))
        reads += 1
    assert reads > 5
