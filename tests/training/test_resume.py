"""Two equal runs have the same bits, and so has a run that was interrupted and resumed."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from faults import Forked, needs_fork
from runs import losses, same_weights, stop_in_step, train_call, weights

import train
from common import checkpoint, run_dir
from common.dataloader import Loader
from common.distributed import ProcessGroup
from common.errors import UserError
from training import start

ROOT = Path(train.__file__).parent


def steps(run):
    return [record["step"] for record in read_log(run)]


def test_two_equal_runs_give_the_same_bits(tiny_run, workdir):
    train.main(arguments(out_dir="out/again"))
    assert losses(workdir / "out/again") == losses(tiny_run)
    assert same_weights(workdir / "out/again", tiny_run)


def test_another_seed_gives_other_losses(tiny_run, workdir):
    train.main(arguments(out_dir="out/other", seed=7))
    assert losses(workdir / "out/other")[-1] != losses(tiny_run)[-1]


def test_a_run_that_is_older_than_an_option_resumes_with_its_default(tiny_run, monkeypatch):
    original = run_dir.checkpoint_to_resume

    def without_optimizer(*args, **kwargs):
        path, stored = original(*args, **kwargs)
        assert stored["options"].pop("optimizer") == "adamw"
        return path, stored

    monkeypatch.setattr(run_dir, "checkpoint_to_resume", without_optimizer)
    train.main(arguments())
    with pytest.raises(UserError):
        train.main(arguments(optimizer="muon"))


@pytest.mark.parametrize("step", [1, 5, 8])
def test_resuming_after_any_step_gives_the_same_bits(tiny_run, workdir, step):
    stop_in_step(step, arguments(out_dir="out/stopped"))
    stopped = workdir / "out/stopped"
    assert run_dir.list_checkpoints(stopped)[-1].name == f"step_{step:08d}"
    assert steps(stopped) == list(range(step + 1))
    train.main(arguments(out_dir="out/stopped"))
    assert losses(stopped) == losses(tiny_run)
    assert same_weights(stopped, tiny_run)


def test_a_signal_between_micro_steps_drops_the_unfinished_step(tiny_run, workdir, monkeypatch):
    original = Loader.train_batch
    calls = []

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
    assert same_weights(workdir / "out/stopped", tiny_run)


def test_a_signal_during_an_evaluation_changes_no_logged_number(tiny_run, workdir, monkeypatch):
    original = train.evaluate

    def signal_and_evaluate(run):
        if run.optimizer.state:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "evaluate", signal_and_evaluate)
    train.main(arguments(out_dir="out/stopped"))
    assert "val_loss" not in read_log(workdir / "out/stopped")[-1]
    monkeypatch.setattr(train, "evaluate", original)
    train.main(arguments(out_dir="out/stopped"))
    assert losses(workdir / "out/stopped") == losses(tiny_run)


def test_a_killed_run_resumes_from_its_last_checkpoint_and_truncates_the_log(
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
    # Step 5 was evaluated and saved; the log is longer.
    assert run_dir.list_checkpoints(killed)[-1].name == "step_00000005"
    assert steps(killed)[-1] == 7
    with open(killed / "log.jsonl", "a") as log:
        log.write('{"step": 8, "train_l')  # a line that the crash truncated
    monkeypatch.setattr(train, "train_step", original)
    train.main(arguments(out_dir="out/killed"))
    assert losses(killed) == losses(tiny_run)
    assert same_weights(killed, tiny_run)


@needs_fork
def test_sigterm_ends_the_program_with_status_0_after_a_finished_step(workdir):
    run = workdir / "out/tiny"
    process = Forked(train_call(max_steps=3000, eval_interval=1000), workdir)
    wait_for_lines(run / "log.jsonl", 4)
    os.kill(process.pid, signal.SIGTERM)
    outcome = process.finish()
    assert outcome.status == 0, outcome.err
    last_step = steps(run)[-1]
    assert f"step {last_step}" in outcome.out.splitlines()[-1]
    assert run_dir.list_checkpoints(run)[-1].name == f"step_{last_step:08d}"


def wait_for_lines(log, count):
    """Wait until a log has so many lines, at most a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)


def test_a_second_signal_ends_the_program_at_once():
    pid = os.fork()
    if pid == 0:
        with train.StopSignal() as stop:
            signal.raise_signal(signal.SIGINT)
            if stop.received:
                signal.raise_signal(signal.SIGINT)
        os._exit(1)  # still running, or the first signal was missed
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGINT


def test_a_finished_run_is_not_changed_and_max_steps_is_reported(tiny_run, capsys):
    before = (tiny_run / "log.jsonl").read_text()
    train.main(arguments())
    output = capsys.readouterr().out
    assert "--max_steps" in output and "12" in output
    assert (tiny_run / "log.jsonl").read_text() == before


def test_a_smaller_max_steps_than_the_run_has_done_trains_nothing(tiny_run, monkeypatch, capsys):
    def fail(run):
        raise AssertionError("a step was taken")

    before = (tiny_run / "log.jsonl").read_text()
    monkeypatch.setattr(train, "train_step", fail)
    train.main(arguments(max_steps=3))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert "step 12" in last_line and "max_steps=3" in last_line
    assert (tiny_run / "log.jsonl").read_text() == before


def damage(path):
    """Flip a bit in the middle of a checkpoint's weights."""
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_with_a_damaged_last_checkpoint_ends_with_the_same_bits(tiny_run, capsys):
    expected_losses, expected_weights = losses(tiny_run), weights(tiny_run)
    damage(tiny_run / "step_00000012")
    train.main(arguments())
    warning = capsys.readouterr().err
    assert "step_00000012.damaged" in warning and warning.count("\n") == 1
    assert (tiny_run / "step_00000012.damaged").is_dir()
    assert losses(tiny_run) == expected_losses
    for name, weight in weights(tiny_run).items():
        assert torch.equal(weight, expected_weights[name]), name


def test_a_run_with_damaged_checkpoints_only_is_not_started_over(tiny_run):
    for path in run_dir.list_checkpoints(tiny_run):
        damage(path)
    log = (tiny_run / "log.jsonl").read_text()
    for _ in range(2):  # the first call renames them
        with pytest.raises(UserError, match="--overwrite=True"):
            train.main(arguments())
    assert (tiny_run / "log.jsonl").read_text() == log
    train.main(arguments(overwrite=True))
    assert not list(tiny_run.glob("*.damaged*"))


def test_eval_only_evaluates_the_checkpoint_before_a_damaged_one_and_renames_nothing(
    tiny_run, capsys
):
    damage(tiny_run / "step_00000012")
    train.main(arguments(eval_only=True))
    output = capsys.readouterr()
    assert "step_00000012" in output.err and "val loss" in output.out
    assert (tiny_run / "step_00000012").is_dir()


def test_damaged_lines_of_the_log_are_removed_with_a_warning(tiny_run, capsys):
    log = tiny_run / "log.jsonl"
    lines = log.read_text().splitlines()
    lines[3] = '{"step": "three"}'
    lines[5] = lines[5][:20]
    log.write_text("\n".join(lines) + "\n")
    train.main(arguments(max_steps=13))
    warning = capsys.readouterr().err
    assert "log.jsonl" in warning and "4, 6" in warning
    assert steps(tiny_run) == [0, 1, 2, 4, *range(6, 14)]


def test_leftovers_of_an_interrupted_deletion_are_removed_at_the_next_start(tiny_run):
    (tiny_run / "step_00000004.deleting").mkdir()
    (tiny_run / "step_00000013.part").mkdir()
    train.main(arguments())
    assert not list(tiny_run.glob("*.deleting")) + list(tiny_run.glob("*.part"))


def test_a_finished_run_is_pruned_if_a_kill_kept_it_from_that(tiny_run):
    kept = [path.name for path in run_dir.list_checkpoints(tiny_run)]
    shutil.copytree(tiny_run / kept[0], tiny_run / "step_00000001")
    train.main(arguments())
    assert [path.name for path in run_dir.list_checkpoints(tiny_run)] == kept


def test_a_run_resumes_if_an_option_is_given_the_value_that_it_has(tiny_run):
    train.main(arguments(max_steps=13, vocab_size=257, bias=True))
    assert steps(tiny_run)[-1] == 13


def test_the_last_evaluation_is_repeated_after_a_signal_in_it(tiny_run, workdir, monkeypatch):
    original = train.evaluate

    def signal_and_evaluate(run):
        if run.step == 12:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "evaluate", signal_and_evaluate)
    train.main(arguments(out_dir="out/stopped"))
    monkeypatch.setattr(train, "evaluate", original)
    train.main(arguments(out_dir="out/stopped"))
    assert losses(workdir / "out/stopped") == losses(tiny_run)
    best, loss = run_dir.best_checkpoint(workdir / "out/stopped")
    assert best.name == "step_00000012"
    assert checkpoint.verify_checkpoint(best)["metrics"]["val_loss"] == loss


def test_a_closed_stdout_loses_no_step(workdir, monkeypatch):
    """In `python train.py | tee log`, Ctrl-C may end tee first."""
    original = ProcessGroup.print

    def print_to_closed_pipe(group, text):
        if text.startswith("step 7"):
            raise BrokenPipeError
        original(group, text)

    monkeypatch.setattr(ProcessGroup, "print", print_to_closed_pipe)
    with pytest.raises(BrokenPipeError):
        train.main(arguments(log_interval=7))
    last = run_dir.list_checkpoints(workdir / "out/tiny")[-1]
    assert last.name == "step_00000007"
    assert checkpoint.read_record(last)["metrics"]["tokens"] == 7 * 128


def test_a_larger_max_steps_continues_a_finished_run(tiny_run):
    train.main(arguments(max_steps=15))
    assert steps(tiny_run) == list(range(16))


def test_overwrite_starts_over_and_keeps_other_files(tiny_run):
    (tiny_run / "notes.txt").write_text("mine")
    train.main(arguments(overwrite=True, max_steps=6))
    assert steps(tiny_run) == list(range(7))
    assert not (tiny_run / "step_00000012").exists()
    assert (tiny_run / "notes.txt").read_text() == "mine"


def test_intervals_and_batch_size_may_change_when_a_run_is_resumed(tiny_run):
    changes = {"batch_size": 8, "eval_interval": 7, "log_interval": 1, "keep_checkpoints": 1}
    train.main(arguments(max_steps=14, **changes))
    assert steps(tiny_run)[-1] == 14


# Changed options ------------------------------------------------------------------------------

OUR_MODELS = ["model", "model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"]
CHANGED = {
    "learning_rate": 0.02,
    "min_lr": 0.005,
    "warmup_steps": 40,
    "lr_schedule": "wsd",
    "weight_decay": 0.5,
    "grad_clip": 0.1,
    "dropout": 0.4,
}


def apply_change(run, name, value):
    """Change an option of a run that is training, wherever it is used."""
    setattr(run.config, name, value)  # also for options that only the model has: nobody reads it
    if name == "weight_decay":
        for group in run.optimizer.param_groups:
            if group["weight_decay"] > 0:
                group["weight_decay"] = value
    if name == "dropout":
        run.model.config.dropout = value
        for block in run.model.transformer.h:
            block.attn.dropout = block.mlp.dropout = value


@pytest.mark.parametrize(("name", "value"), CHANGED.items())
def test_an_allowed_change_gives_the_bits_of_a_run_that_changes_it_while_it_trains(
    tiny_run, workdir, monkeypatch, name, value
):
    original = train.train_step

    def change_and_train_step(run):
        apply_change(run, name, value)
        return original(run)

    shutil.copytree(tiny_run, workdir / "out/resumed")
    shutil.copytree(tiny_run, workdir / "out/unchanged")
    train.main(arguments(out_dir="out/unchanged", max_steps=14))
    monkeypatch.setattr(train, "train_step", change_and_train_step)
    train.main(arguments(max_steps=14))
    monkeypatch.setattr(train, "train_step", original)
    train.main(arguments(out_dir="out/resumed", max_steps=14, allow_changes=True, **{name: value}))
    assert same_weights(workdir / "out/resumed", tiny_run)
    assert not same_weights(workdir / "out/unchanged", tiny_run)


def test_muon_s_learning_rate_may_change_if_that_is_allowed(workdir):
    muon = {"optimizer": "muon", "max_steps": 2}
    train.main(arguments(**muon))
    with pytest.raises(UserError, match=r"muon_learning_rate.*--allow_changes=True"):
        train.main(arguments(**muon, muon_learning_rate=0.01))
    train.main(arguments(**muon, muon_learning_rate=0.01, allow_changes=True))


def test_a_checkpoint_records_allowed_changes_which_are_the_run_s_options_then(tiny_run):
    train.main(arguments(max_steps=13, allow_changes=True, learning_rate=0.02, dropout=0.3))
    record = checkpoint.read_record(tiny_run / "step_00000013")
    assert record["options"]["learning_rate"] == 0.02
    assert record["model_config"]["dropout"] == 0.3
    train.main(arguments(max_steps=14, learning_rate=0.02, dropout=0.3))
    assert steps(tiny_run)[-1] == 14
    with pytest.raises(UserError, match=r"learning_rate was 0\.02"):
        train.main(arguments(max_steps=15))


def test_allowed_changes_are_made_again_after_a_kill_before_the_first_checkpoint(
    tiny_run, workdir, monkeypatch
):
    def die(run):
        raise ZeroDivisionError("stands for a crash")

    changed = arguments(max_steps=14, allow_changes=True, learning_rate=0.02)
    shutil.copytree(tiny_run, workdir / "out/killed")
    train.main(changed)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", die)
        with pytest.raises(ZeroDivisionError):
            train.main([*changed, "--out_dir=out/killed"])
    train.main([*changed, "--out_dir=out/killed"])
    assert losses(workdir / "out/killed") == losses(tiny_run)


def test_a_finished_run_is_evaluated_again_on_other_eval_tokens(tiny_run, workdir):
    train.main(arguments(out_dir="out/other", init_from="out/tiny/step_00000012", eval_tokens=512))
    expected = read_log(workdir / "out/other")[0]["val_loss"]
    train.main(arguments(eval_tokens=512, allow_changes=True))
    assert read_log(tiny_run)[-1]["val_loss"] == expected
    assert run_dir.best_checkpoint(tiny_run) == (tiny_run / "step_00000012", expected)
    train.main(arguments(eval_tokens=512))  # recorded


def test_the_best_checkpoint_is_that_of_the_new_eval_tokens_and_the_former_best_is_kept(
    workdir, monkeypatch
):
    validation = iter([5.0, 3.0, 4.0, 9.0, 8.0, 8.5])  # at steps 0, 2, 4; then at 4, 6, 8
    monkeypatch.setattr(train, "evaluate", lambda run: {"val_loss": next(validation)})
    options = {"eval_interval": 2, "checkpoint_interval": 100, "keep_checkpoints": 1}
    train.main(arguments(max_steps=4, **options))
    train.main(arguments(max_steps=8, **options, eval_tokens=512, allow_changes=True))
    run = workdir / "out/tiny"
    assert run_dir.best_checkpoint(run) == (run / "step_00000006", 8.0)
    assert [path.name[-1] for path in run_dir.list_checkpoints(run)] == ["2", "6", "8"]


def test_every_option_is_in_one_row_of_the_docs_table_which_is_that_of_the_code():
    text = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
    _, _, section = text.partition("## What may change when a run is resumed")
    rows = [line for line in section.splitlines() if line.startswith("|")][2:5]
    always, if_allowed, never = [re.findall(r"`(\w+)`", row) for row in rows]
    options = set(train.TrainConfig.__dataclass_fields__)
    for name in OUR_MODELS:
        options |= set(train.model_module(name).GPTConfig.__dataclass_fields__)
    assert set(always) == start.RESUMABLE_CHANGES
    assert set(if_allowed) == start.ALLOWED_CHANGES
    assert set(never) == options - set(always) - set(if_allowed)
    assert len(always + if_allowed + never) == len({*always, *if_allowed, *never})


def test_help_names_the_options_that_may_change_if_that_is_allowed():
    assert {name for name in start.ALLOWED_CHANGES if name not in train.__doc__} == set()
