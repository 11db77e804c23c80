"""SIGKILL at any file operation: the same command again ends as if nothing had happened.

    pytest -m slow tests/robustness/test_kills.py    at each operation; unmarked: a sample

A case is the working directory that a kill left behind. faults.py counts the operations and kills.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, write_tiny
from faults import (
    Fault,
    Forked,
    failed_cases,
    files_of,
    fork_ranks,
    is_one_error,
    kill,
    needs_fork,
    run_in,
)
from runs import RUN, result_of, train_call
from safetensors.torch import load_file

import train
from common.errors import UserError
from common.pretrained import load_model
from tools import export

pytestmark = needs_fork

ROOT = Path(train.__file__).parent
SHORT = {"max_steps": 6}
# A training: (options of the finished run that it finds, its own options).
TRAININGS = {
    "new": (None, {}),
    "continued": ({}, {"max_steps": 15}),
    "overwriting": (SHORT, SHORT | {"overwrite": True}),
}


# Training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, pytest.param(None, id="all", marks=pytest.mark.slow)])
def count(request):
    return request.param


@pytest.fixture(scope="module", params=TRAININGS)
def killed(request, count, tmp_path_factory):
    """Kill a training at `count` operations."""
    before, options = TRAININGS[request.param]
    folder = tmp_path_factory.mktemp("killed")
    start = folder / "start"
    write_tiny(start)
    (start / "out").mkdir()
    if before is not None:
        run_in(start, train_call(**before))
    return kill(train_call(**options), "out", start, folder, count)


def test_a_killed_run_ends_as_the_uninterrupted_run(killed):
    expected = result_of(killed.finished / RUN)

    def has_right_result(folder):
        run_in(folder, killed.call)
        return result_of(folder / RUN) == expected

    assert failed_cases(killed, has_right_result) == []


def best_of(run):
    """Return the complete checkpoint with the lowest validation loss, else the last one, or None.

    A second way to find it, by config.json alone.
    """
    paths = [path for path in run.glob("step_*") if re.fullmatch(r"step_\d{8}", path.name)]
    losses = {}
    for path in sorted(paths):
        losses[path] = json.loads((path / "config.json").read_text())["metrics"].get("val_loss")
    evaluated = [path for path in losses if losses[path] is not None]
    if evaluated:
        return min(evaluated, key=losses.get)
    return max(losses, default=None)


def test_after_a_kill_the_best_complete_checkpoint_loads(killed):
    def has_right_result(folder):
        best = best_of(folder / RUN)
        try:
            weights = load_model(str(folder / RUN))[0].state_dict()
        except UserError:
            return best is None
        [shard] = best.glob("*.safetensors")
        stored = load_file(shard)
        return all(torch.equal(stored[f"model.{name}"], w) for name, w in weights.items())

    assert failed_cases(killed, has_right_result) == []


def test_after_a_kill_the_best_complete_checkpoint_is_exported_or_refused(killed):
    def has_right_result(folder):
        best = best_of(folder / RUN)
        argv = [f"--init_from={RUN}", "--out_dir=exported"]
        outcome = Forked(lambda: export.main(argv), folder).finish()
        if best is None:
            return is_one_error(outcome)
        [shard] = best.glob("*.safetensors")
        expected = load_file(shard)["model.transformer.ln_f.weight"]
        exported = load_file(folder / "exported/model.safetensors")
        return torch.equal(exported["transformer.ln_f.weight"], expected)

    assert failed_cases(killed, has_right_result) == []


def test_after_a_kill_eval_only_evaluates_the_last_checkpoint_and_writes_nothing(killed):
    log = result_of(killed.finished / RUN)["log"]
    first_loss = log[0]["val_loss"]  # of a run without a checkpoint

    def has_right_result(folder):
        before = files_of(folder)
        complete = sorted(folder.glob(f"{RUN}/step_" + 8 * "[0-9]"))
        loss = first_loss
        if complete:
            loss = json.loads((complete[-1] / "config.json").read_text())["metrics"].get("val_loss")
        outcome = run_in(folder, train_call(eval_only=True))
        assert files_of(folder) == before
        return "val loss" in outcome.out and (loss is None or f"{loss:.4f}" in outcome.out)

    assert failed_cases(killed, has_right_result) == []


# Random times ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_random_times_ends_as_the_uninterrupted_run(tmp_path):
    write_tiny(tmp_path)
    call = train_call()
    begin = time.monotonic()
    run_in(tmp_path, call)
    duration = time.monotonic() - begin
    expected = result_of(tmp_path / RUN)
    choose = random.Random(0)
    shutil.rmtree(tmp_path / RUN)
    kills = 100
    while kills > 0:
        process = Forked(call, tmp_path)
        time.sleep(choose.uniform(0, duration))
        outcome = process.kill()
        if outcome.status == 0:  # it was finished before
            assert result_of(tmp_path / RUN) == expected
            shutil.rmtree(tmp_path / RUN)
        else:
            kills -= 1
    run_in(tmp_path, call)
    assert result_of(tmp_path / RUN) == expected


@pytest.mark.slow
def test_the_program_killed_at_random_times_ends_as_the_uninterrupted_run(tmp_path):
    write_tiny(tmp_path)
    options = {"max_steps": 100, "eval_interval": 10}
    run_in(tmp_path, train_call(**options))
    expected = result_of(tmp_path / RUN)
    shutil.rmtree(tmp_path / RUN)
    command = [sys.executable, ROOT / "train.py", *arguments(**options)]
    choose = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        lines = count_lines(tmp_path / RUN / "log.jsonl")
        deadline = time.monotonic() + 60
        while count_lines(tmp_path / RUN / "log.jsonl") == lines and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    run_in(tmp_path, train_call(**options))
    assert result_of(tmp_path / RUN) == expected


def count_lines(log):
    return log.read_text().count("\n") if log.exists() else 0


# Several ranks --------------------------------------------------------------------------------


def is_one_error_each(outcomes):
    """Return whether no rank that was not killed printed anything but one line."""
    survivors = [outcome for outcome in outcomes if outcome.status != -signal.SIGKILL]
    return all(is_one_error(outcome) for outcome in survivors)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_ranks_of_which_some_are_killed_end_as_if_they_were_not(tmp_path, fsdp):
    call = train_call(max_steps=6, fsdp=fsdp)
    finished = tmp_path / "finished"
    write_tiny(finished)
    outcomes = fork_ranks(call, finished, 2, "out")
    assert [outcome.status for outcome in outcomes] == [0, 0]
    expected = result_of(finished / RUN)
    choose = random.Random(0)
    for case in range(6):
        folder = tmp_path / str(case)
        write_tiny(folder)
        victims = [(0,), (1,), (0, 1)][case % 3]
        faults = {rank: Fault(choose.randrange(len(outcomes[rank].operations))) for rank in victims}
        killed = fork_ranks(call, folder, 2, "out", faults)
        assert any(outcome.status == -signal.SIGKILL for outcome in killed)
        assert is_one_error_each(killed), (faults, killed)
        rerun = fork_ranks(call, folder, 2, "out")
        assert [outcome.status for outcome in rerun] == [0, 0], (faults, rerun)
        assert result_of(folder / RUN) == expected, faults
