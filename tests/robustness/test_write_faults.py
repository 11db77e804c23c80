"""A full disk, an exceeded quota, a broken or read-only disk, at any file operation.

    pytest -m slow tests/robustness/test_write_faults.py    at each operation; unmarked: a sample

The command ends with one line, or its result is right; once the disk works again, the same command
ends as if nothing had happened. faults.py counts the operations and lets them fail.
"""

import errno
import random
import re
import shutil

import pytest
from conftest import write_tiny
from data_commands import COMMANDS, dataset_in, export_run, serve, start_of
from faults import (
    EFFORTS,
    ERRORS,
    Fault,
    Forked,
    Operation,
    fail,
    failed_cases,
    files_of,
    fork_ranks,
    is_one_error,
    needs_fork,
    run_in,
)
from runs import RUN, result_of, train_call

pytestmark = needs_fork

TRIED = {}  # what the fixture `failing` returned
train_run = train_call(max_steps=6)


@pytest.fixture(scope="module", params=EFFORTS)
def count(request):
    return request.param


@pytest.fixture(params=["train", "export", *COMMANDS])
def failing(request, count, hub, tiny_run, workdir, tmp_path_factory):
    """Let `count` operations of a command fail, alone and with all that follow; once per module."""
    serve(hub)
    name = request.param
    if (name, count) in TRIED:
        return TRIED[name, count]
    folder = tmp_path_factory.mktemp("failing")
    call, watched, start = export_run, "data", workdir
    if name == "train":
        shutil.rmtree(tiny_run)
        call, watched = train_run, "out"
    elif name != "export":
        call, make = COMMANDS[name]
        start = start_of(make, folder)
    TRIED[name, count] = fail(call, watched, start, folder, count)
    return TRIED[name, count]


def result(folder):
    """Return what a command made in a working directory, None if it made none or not all of it."""
    if (folder / RUN / "step_00000006").exists() and not (folder / "data/exported").exists():
        return result_of(folder / RUN)
    return files_of(folder / "data")


def test_a_failing_operation_is_one_error_with_a_path_or_does_no_harm(failing):
    expected = result(failing.finished)

    def is_right(case):
        if case.outcome.status == 0:
            return result(case.folder) == expected
        last = case.outcome.err.splitlines()[-1]
        return is_one_error(case.outcome) and ("data/" in last or "out/" in last)

    wrong = [case for case in failing.cases if not is_right(case)]
    assert [(case.name, case.outcome.status, case.outcome.err) for case in wrong] == []


def test_after_a_failing_operation_the_same_command_ends_as_if_it_had_worked(failing):
    expected = result(failing.finished)

    def has_right_result(folder):
        is_exported = (folder / "data/exported").exists()  # complete, which is refused
        outcome = Forked(failing.call, folder).finish()
        assert outcome.status == (2 if is_exported else 0), outcome.err
        return result(folder) == expected

    assert failed_cases(failing, has_right_result) == []


def test_a_finished_run_without_its_last_line_in_the_log_gets_it(tmp_path):
    start = tmp_path / "start"
    write_tiny(start)
    finished = Forked(train_run, start, "out").finish()
    expected = result_of(start / RUN)
    shutil.rmtree(start / "out")
    log = Operation("open", "tiny/log.jsonl")
    last = max(n for n, operation in enumerate(finished.operations) if operation == log)
    outcome = Forked(train_run, start, "out", Fault(last, errno.ENOSPC)).finish()
    assert is_one_error(outcome)
    run_in(start, train_run)
    assert result_of(start / RUN) == expected


@pytest.mark.parametrize("name", ["changed", "tokenizer"])
def test_a_disk_without_room_keeps_the_old_dataset(tmp_path, count, name):
    """Deleting and renaming need no room."""
    call, make = COMMANDS[name]
    tried = fail(call, "data", start_of(make, tmp_path), tmp_path, count)
    kept = [dataset_in(tmp_path / folder) for folder in ("start", "finished")]
    lost = [case.name for case in tried.cases if dataset_in(case.folder) not in kept]
    assert [name for name in lost if not re.search("EIO|EROFS|remove|rename", name)] == []


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_a_failing_operation_of_one_of_two_ranks_ends_both_with_one_error(tmp_path, fsdp):
    call = train_call(max_steps=6, fsdp=fsdp)
    finished = tmp_path / "finished"
    write_tiny(finished)
    operations = [outcome.operations for outcome in fork_ranks(call, finished, 2, "out")]
    expected = result_of(finished / RUN)
    choose = random.Random(0)
    for case in range(6):
        folder = tmp_path / str(case)
        write_tiny(folder)
        rank = case % 2
        number = choose.randrange(len(operations[rank]))
        fault = Fault(number, choose.choice(ERRORS))
        outcomes = fork_ranks(call, folder, 2, "out", {rank: fault})
        broken = (rank, fault, operations[rank][number])
        statuses = [outcome.status for outcome in outcomes]
        errors = "".join(outcome.err for outcome in outcomes).splitlines()
        if statuses != [0, 0]:
            assert statuses == [2, 2], broken
            assert len(errors) == 1 and str(RUN) in errors[0], (broken, errors)
        assert all(outcome.status == 0 for outcome in fork_ranks(call, folder, 2)), broken
        assert result_of(folder / RUN) == expected, broken
