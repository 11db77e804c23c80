"""tools/plot_loss.py draws the curves of all runs into one PNG file."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import arguments, read_log, refused

import train
from common.errors import run_program
from tools import plot_loss


@pytest.fixture(autouse=True)
def between(monkeypatch):
    """A list of functions; main() runs the next one instead of waiting, and fails without one."""
    functions = []
    clock = SimpleNamespace(sleep=lambda seconds: functions.pop(0)())
    monkeypatch.setattr(plot_loss, "time", clock)
    return functions


def test_runs_are_drawn_into_one_png_and_its_path_is_printed(tiny_run, workdir, capsys):
    (workdir / "out/other").mkdir()
    lines = [json.dumps(record) + "\n" for record in read_log(tiny_run)[:8]]
    (workdir / "out/other/log.jsonl").write_text("".join(lines))
    plot_loss.main(["out/tiny", "out/other", "--out=out/curves.png"])
    assert capsys.readouterr().out == "out/curves.png\n"
    assert (workdir / "out/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def curves(monkeypatch):
    """A dict {label: (x, y) in each panel} of the curves that are drawn."""
    import matplotlib.axes

    drawn = {}
    original = matplotlib.axes.Axes.plot

    def spy(axes, x, y, **style):
        drawn.setdefault(style["label"], []).append((list(x), list(y)))
        return original(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    return drawn


def test_the_loss_on_the_training_split_is_a_third_curve(tiny_run, curves):
    train.main(arguments(max_steps=13, eval_train=True))
    plot_loss.main(["out/tiny"])
    assert len(curves) == 3
    loss = read_log(tiny_run)[-1]["train_eval_loss"]
    assert curves["out/tiny, training, evaluated"][0] == ([13], [loss])


def test_a_run_without_a_loss_on_the_training_split_has_two_curves(tiny_run, curves):
    plot_loss.main(["out/tiny"])
    assert list(curves) == ["out/tiny, training", "out/tiny, validation"]


def test_any_number_of_the_log_can_be_drawn(tiny_run, curves):
    plot_loss.main(["out/tiny", "--metrics=lr,val_loss"])
    records = read_log(tiny_run)[1:]
    assert list(curves) == ["out/tiny, lr", "out/tiny, validation"]
    assert curves["out/tiny, lr"][0][1] == [record["lr"] for record in records]


def test_every_loss_of_the_log_is_in_the_curves(tiny_run, curves):
    plot_loss.main(["out/tiny"])
    records = read_log(tiny_run)
    train = records[1:]  # the first line is the evaluation before step 1
    val = [record for record in records if "val_loss" in record]
    for panel, key in enumerate(("step", "tokens", "seconds")):
        x, y = curves["out/tiny, training"][panel]
        assert x == [record[key] for record in train]
        assert y == [record["train_loss"] for record in train]
        x, y = curves["out/tiny, validation"][panel]
        assert x == [record[key] for record in val]
        assert y == [record["val_loss"] for record in val]


def test_a_line_that_is_being_written_is_left_out(tiny_run):
    with open(tiny_run / "log.jsonl", "a") as log:
        log.write('{"step": 13, "tok')
    assert plot_loss.read_log(tiny_run)[-1]["step"] == 12


# --follow -------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """A list of the last steps of out/tiny that main() draws; it draws nothing else."""
    steps = []
    monkeypatch.setattr(
        plot_loss, "draw", lambda runs, *_: steps.append(runs["out/tiny"][-1]["step"])
    )
    return steps


def interrupt_in_step(number, monkeypatch):
    """Let train.py receive SIGTERM in a step, from 1; return the function to restore it."""
    original = train.train_step

    def train_step(run):
        if run.step == number - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(train, "train_step", train_step)
    return lambda: monkeypatch.setattr(train, "train_step", original)


def test_follow_redraws_until_the_last_step(workdir, monkeypatch, drawn, between):
    restore = interrupt_in_step(6, monkeypatch)
    train.main(arguments())
    restore()
    between += [lambda: None, lambda: train.main(arguments())]
    plot_loss.main(["out/tiny", "--follow=True"])
    assert drawn == [5, 5, 12]


def test_follow_draws_a_resumed_run_whose_log_became_shorter(tiny_run, drawn, between):
    log = tiny_run / "log.jsonl"
    complete = log.read_text()
    last = tiny_run / "step_00000012"
    last.rename("last")
    shorter = "".join(complete.splitlines(keepends=True)[:9])

    def finish():
        log.write_text(complete)
        Path("last").rename(last)

    between += [lambda: log.write_text(shorter), finish]
    plot_loss.main(["out/tiny", "--follow=True"])
    assert drawn == [12, 8, 12]


def test_follow_waits_for_every_run(tiny_run, drawn, between):
    shutil.copytree(tiny_run, "out/other")
    shutil.move("out/other/step_00000012", "last")
    between.append(lambda: shutil.move("last", "out/other/step_00000012"))
    plot_loss.main(["out/tiny", "out/other", "--follow=True"])
    assert drawn == [12, 12]


def test_without_follow_an_unfinished_run_is_drawn_once(tiny_run, drawn):
    shutil.rmtree(tiny_run / "step_00000012")
    plot_loss.main(["out/tiny"])
    assert drawn == [12]


def test_ctrl_c_ends_follow_with_one_line_and_a_complete_file(tiny_run, workdir, capsys, between):
    shutil.rmtree(tiny_run / "step_00000012")
    between.append(lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not that of pytest
    try:
        with pytest.raises(SystemExit) as stopped:
            run_program(plot_loss.main, ["out/tiny", "--follow=True"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert (workdir / "out/loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")


# Odd runs -------------------------------------------------------------------------------------


def test_a_run_without_any_training_loss_is_drawn(workdir):
    """A float16 run may log a loss of None while its scaler finds a scale."""
    (workdir / "out/overflowed").mkdir(parents=True)
    records = [{"step": n, "tokens": n, "seconds": n, "train_loss": None} for n in (1, 2)]
    lines = [json.dumps(record) + "\n" for record in records]
    (workdir / "out/overflowed/log.jsonl").write_text("".join(lines))
    plot_loss.main(["out/overflowed"])
    assert (workdir / "out/loss.png").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["runs", "tools.plot_loss"]),
        (["out/none"], ["out/none", "log.jsonl"]),
        (["data"], ["data", "log.jsonl"]),
        (["data", "--out=loss.pdf"], ["out=loss.pdf", ".png"]),
        (["out/tiny", "--metrics=lr,typo"], ["typo", "grad_norm"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tiny_run, capsys, argv, words):
    line = refused(capsys, argv, plot_loss.main)
    assert all(word in line for word in words)
