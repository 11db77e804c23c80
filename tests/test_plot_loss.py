"""tools/plot_loss.py draws the curves of all runs into one PNG file."""

import json

import pytest
from conftest import read_log, refused

from tools import plot_loss


def test_runs_are_drawn_into_one_png_and_its_path_is_printed(tiny_run, workdir, capsys):
    (workdir / "out/other").mkdir()
    lines = [json.dumps(record) + "\n" for record in read_log(tiny_run)[:8]]
    (workdir / "out/other/log.jsonl").write_text("".join(lines))
    plot_loss.main(["out/tiny", "out/other", "--out=out/curves.png"])
    assert capsys.readouterr().out == "out/curves.png\n"
    assert (workdir / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_loss_of_the_log_is_in_the_curves(tiny_run, monkeypatch, workdir):
    import matplotlib.axes

    drawn = {}
    original = matplotlib.axes.Axes.plot

    def spy(axes, x, y, **style):
        drawn.setdefault(style["label"], []).append((list(x), list(y)))
        return original(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    plot_loss.main(["out/tiny"])
    records = read_log(tiny_run)
    train = records[1:]  # the first line is the evaluation before step 1
    val = [record for record in records if "val_loss" in record]
    for panel, key in enumerate(("step", "tokens", "seconds")):
        x, y = drawn["out/tiny, training"][panel]
        assert x == [record[key] for record in train]
        assert y == [record["train_loss"] for record in train]
        x, y = drawn["out/tiny, validation"][panel]
        assert x == [record[key] for record in val]
        assert y == [record["val_loss"] for record in val]


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
    ],
)
def test_what_is_not_a_run_is_refused_in_one_line(workdir, capsys, argv, words):
    line = refused(capsys, argv, plot_loss.main)
    assert all(word in line for word in words)
