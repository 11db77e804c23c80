"""plot.py: one PNG with the curves of all runs, named in the output."""

import json

import pytest
from conftest import read_log

from tools import plot_loss


def test_the_runs_are_drawn_into_one_png_that_the_output_names(tiny_run, workdir, capsys):
    (workdir / "out/other").mkdir()
    (workdir / "out/other/log.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in read_log(tiny_run)[:8])
    )
    plot_loss.main(["out/tiny", "out/other", "--out=out/curves.png"])
    assert capsys.readouterr().out == "out/curves.png\n"
    assert (workdir / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_value_of_the_log_is_in_the_curves(tiny_run, monkeypatch, workdir):
    import matplotlib.axes

    drawn = {}
    original = matplotlib.axes.Axes.plot

    def spy(axes, x, y, **style):
        drawn.setdefault(style["label"], []).append((list(x), list(y)))
        return original(axes, x, y, **style)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    plot_loss.main(["out/tiny"])
    records = read_log(tiny_run)
    for panel, key in enumerate(("step", "tokens", "seconds")):
        x, y = drawn["out/tiny, training"][panel]
        assert (x, y) == ([r[key] for r in records[1:]], [r["train_loss"] for r in records[1:]])
        x, y = drawn["out/tiny, validation"][panel]
        assert (x, y) == tuple(
            [r[k] for r in records if "val_loss" in r] for k in (key, "val_loss")
        )


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name the runs"),
        (["out/none"], "out/none is not a run of train.py"),
        (["data"], "data is not a run of train.py"),
    ],
)
def test_what_is_no_run_is_one_line(workdir, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        plot_loss.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
