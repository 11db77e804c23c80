"""train.py: the same bits twice, and exact resume after every kind of interruption."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log

import train
from common import checkpoint
from common.dataloader import Loader
from common.distributed import ProcessGroup
from common.pretrained import load_model

ROOT = Path(train.__file__).parent


def losses(run):
    return [
        (r["step"], r.get("train_loss"), r.get("grad_norm"), r.get("val_loss"))
        for r in read_log(run)
    ]


def weights(run):
    return load_model(str(run / "step_00000012"))[0].state_dict()


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_twice_the_same_run_gives_the_same_bits(tiny_run, workdir):
    train.main(arguments(out_dir="out/again"))
    assert losses(workdir / "out/again") == losses(tiny_run)
    assert_same_weights(workdir / "out/again", tiny_run)


def test_another_seed_gives_other_losses(tiny_run, workdir):
    train.main(arguments(out_dir="out/other", seed=7))
    assert losses(workdir / "out/other")[-1] != losses(tiny_run)[-1]


@pytest.mark.parametrize("step", [1, 5, 8, 11])
def test_resuming_after_any_step_gives_the_same_bits(tiny_run, workdir, monkeypatch, step):
    original = train.train_step

    def stop_in_the_next_step(run):
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "train_step", stop_in_the_next_step)
    train.main(arguments(out_dir="out/stopped"))
    stopped = workdir / "out/stopped"
    assert [path.name for path in checkpoint.list_checkpoints(stopped)][-1] == f"step_{step:08d}"
    assert [r["step"] for r in read_log(stopped)] == list(range(step + 1))
    monkeypatch.setattr(train, "train_step", original)
    train.main(arguments(out_dir="out/stopped"))
    assert losses(stopped) == losses(tiny_run)
    assert_same_weights(stopped, tiny_run)


def test_a_signal_between_micro_steps_drops_the_unfinished_step(tiny_run, workdir, monkeypatch):
    original, calls = Loader.train_batch, []

    def signal_in_the_second_micro_step_of_step_3(loader, first, count):
        calls.append(first)
        if len(calls) == 2 * 3:
            signal.raise_signal(signal.SIGINT)
        return original(loader, first, count)

    monkeypatch.setattr(Loader, "train_batch", signal_in_the_second_micro_step_of_step_3)
    train.main(arguments(out_dir="out/stopped", max_steps=12))
    monkeypatch.setattr(Loader, "train_batch", original)
    assert read_log(workdir / "out/stopped")[-1]["step"] in (2, 3)
    train.main(arguments(out_dir="out/stopped"))
    assert_same_weights(workdir / "out/stopped", tiny_run)


def test_a_signal_during_an_evaluation_loses_neither_steps_nor_the_evaluation(
    tiny_run, workdir, monkeypatch
):
    original = train.evaluate

    def signalled(run):
        if run.optimizer.state:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "evaluate", signalled)
    train.main(arguments(out_dir="out/stopped"))
    assert "val_loss" not in read_log(workdir / "out/stopped")[-1]
    monkeypatch.setattr(train, "evaluate", original)
    train.main(arguments(out_dir="out/stopped"))
    assert losses(workdir / "out/stopped") == losses(tiny_run)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_drops_the_log_beyond(
    tiny_run, workdir, monkeypatch
):
    original = train.train_step

    def die_in_step_7(run):
        if run.step == 7:
            raise ZeroDivisionError("stands for a crash")
        return original(run)

    monkeypatch.setattr(train, "train_step", die_in_step_7)
    with pytest.raises(ZeroDivisionError):
        train.main(arguments(out_dir="out/killed"))
    killed = workdir / "out/killed"
    assert (
        read_log(killed)[-1]["step"] == 7
    )  # the last checkpoint is of step 5, where it was evaluated
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 8, "train_l')  # a line that the crash cut off
    monkeypatch.setattr(train, "train_step", original)
    train.main(arguments(out_dir="out/killed"))
    assert losses(killed) == losses(tiny_run)
    assert_same_weights(killed, tiny_run)


def test_sigterm_ends_the_program_with_status_0_after_a_whole_step(tiny_run, workdir):
    command = [
        sys.executable,
        ROOT / "train.py",
        *arguments(out_dir="out/program", max_steps=3000, eval_interval=1000),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        log, limit = workdir / "out/program/log.jsonl", time.monotonic() + 60
        while (
            not log.exists() or len(log.read_text().splitlines()) < 4
        ) and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, out
    stopped = read_log(workdir / "out/program")[-1]["step"]
    assert f"stopped after step {stopped}: the same command resumes the run" in out
    assert checkpoint.find_checkpoint(workdir / "out/program").name == f"step_{stopped:08d}"


def test_a_second_signal_ends_the_program_at_once(workdir):
    code = (
        "import train, signal\n"
        "stop = train.StopSignal(); stop.__enter__(); signal.raise_signal(signal.SIGINT); assert stop.received\n"
        "signal.raise_signal(signal.SIGINT); print('still here')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGINT and "still here" not in done.stdout


def test_a_finished_run_says_so_and_stays_as_it_is(tiny_run, capsys):
    before = (tiny_run / "log.jsonl").read_text()
    train.main(arguments())
    assert "is finished, at step 12: a larger --max_steps continues it" in capsys.readouterr().out
    assert (tiny_run / "log.jsonl").read_text() == before


def test_naming_an_option_s_own_value_is_no_change(tiny_run):
    train.main(arguments(max_steps=13, vocab_size=257, bias=True))
    assert read_log(tiny_run)[-1]["step"] == 13


def test_a_signal_in_the_last_evaluation_leaves_it_to_the_next_start(
    tiny_run, workdir, monkeypatch
):
    original = train.evaluate

    def signalled(run):
        if run.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "evaluate", signalled)
    train.main(arguments(out_dir="out/stopped"))
    monkeypatch.setattr(train, "evaluate", original)
    train.main(arguments(out_dir="out/stopped"))
    assert losses(workdir / "out/stopped") == losses(tiny_run)


def test_output_that_nobody_reads_any_more_loses_no_step(workdir, monkeypatch):
    """As with Ctrl-C on `python train.py | tee log`, where tee is gone first."""

    original = ProcessGroup.print

    def gone(group, text):
        if text.startswith("step 7"):
            raise BrokenPipeError
        original(group, text)

    monkeypatch.setattr(ProcessGroup, "print", gone)
    monkeypatch.setattr("common.errors.os.dup2", lambda *args: None)
    with pytest.raises(SystemExit):
        train.main(arguments(log_interval=7))
    assert checkpoint.list_checkpoints(workdir / "out/tiny")[-1].name == "step_00000007"


def test_a_larger_max_steps_goes_on(tiny_run):
    train.main(arguments(max_steps=15))
    assert [r["step"] for r in read_log(tiny_run)] == list(range(16))


def test_overwrite_starts_over_and_leaves_other_files_alone(tiny_run):
    (tiny_run / "notes.txt").write_text("mine")
    train.main(arguments(overwrite=True, max_steps=6))
    assert [r["step"] for r in read_log(tiny_run)] == list(range(7))
    assert not (tiny_run / "step_00000012").exists()
    assert (tiny_run / "notes.txt").read_text() == "mine"


def test_intervals_batch_size_and_the_like_may_change_when_a_run_goes_on(tiny_run):
    train.main(
        arguments(max_steps=14, batch_size=8, eval_interval=7, log_interval=1, keep_checkpoints=1)
    )
    assert read_log(tiny_run)[-1]["step"] == 14
