"""Draw the loss curves of several runs into one PNG file.

    python -m tools.plot_loss out/a out/b [--out=out/loss.png]
    python -m tools.plot_loss out/a --follow=True          redraw the file while the run goes

The training loss of each step is a thin line, an evaluation a line with dots. Three panels show
them over optimizer steps, tokens processed and seconds of training. --metrics draws other numbers
of log.jsonl instead: --metrics=grad_norm,lr
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.plot_loss")

import contextlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, run_program
from common.files import check_regular, read_text
from configurator import configure

REDRAW_SECONDS = 10
DOTS = {"marker": "o", "markersize": 4}
LOSSES = {  # those drawn by default; a run without --eval_train has no train_eval_loss
    "train_loss": {"label": "training", "linewidth": 0.8, "alpha": 0.5},
    "val_loss": {"label": "validation", **DOTS},
    "train_eval_loss": {"label": "training, evaluated", "linestyle": "--", **DOTS},
}


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # directories of runs
    out: str = "out/loss.png"  # the PNG file to write
    metrics: str = ",".join(LOSSES)  # fields of log.jsonl to draw
    follow: bool = False  # redraw it every 10 seconds, until the last step of all runs or Ctrl-C


def read_log(directory):
    """Return the complete lines of a run's log.jsonl, a list of dicts.

    Raises UserError if the file does not exist or is damaged, or has fewer than two lines.
    """
    path = Path(directory, "log.jsonl")
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"no {path}: {directory} is not a run of train.py") from error
    complete = text[: text.rfind("\n") + 1]  # without a line that train.py is writing
    records = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            records.append(parse_line(line))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{path}, line {number}, is damaged ({reason})") from error
    if len(records) < 2:
        raise UserError(f"{path} has {len(records)} lines, too few to draw: train longer")
    return records


def parse_line(line):
    """Return a line of the log; its numbers can be drawn. A metric may be None or missing."""
    record = json.loads(line)
    numbers = [record["step"], record["tokens"], record["seconds"]]
    numbers += [value for value in record.values() if value is not None]
    for number in numbers:
        float(number)
    return record


def is_finished(directory):
    """Return whether a run has saved the checkpoint of its last step, after that step's line."""
    from common.checkpoint import read_record  # imports torch, which is slow
    from common.run_dir import list_checkpoints

    for newest in list_checkpoints(directory)[-1:]:
        with contextlib.suppress(FileNotFoundError):  # deleted just now, for a newer one
            record = read_record(newest)
            return record["step"] == record["options"]["max_steps"]
    return False


def draw(runs, path, metrics):
    """Draw metrics of {label: records} into the PNG file `path`; the panels share the y axis."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, whose backend is that of a notebook

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    # Colors of different lightness can be told apart in print and by color-blind readers.
    shades = [0.85 * i / max(1, len(runs) - 1) for i in range(len(runs))]
    colors = colormaps["viridis"](shades)
    for panel, key in zip(panels, ("step", "tokens", "seconds"), strict=True):
        for (label, records), color in zip(runs.items(), colors, strict=True):
            draw_run(panel, key, label, records, color, metrics)
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
    only_losses = set(metrics) <= set(LOSSES)
    panels[0].set_ylabel("loss (nats per token)" if only_losses else ", ".join(metrics))
    panels[0].legend(fontsize="small")
    part = Path(path).with_suffix(".part")  # an image viewer that reloads needs a complete file
    check_regular(part)
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)


def draw_run(panel, key, label, records, color, metrics):
    """Draw the curves of the metrics that a run has, over records[key]."""
    for metric in metrics:
        if not any(metric in record for record in records):
            continue
        style = {"label": metric, "linewidth": 0.8} | LOSSES.get(metric, {})
        style["label"] = f"{label}, {style['label']}"
        shown = [record for record in records if record.get(metric) is not None]
        x = [record[key] for record in shown]
        y = [record[metric] for record in shown]
        panel.plot(x, y, color=color, **style)


def main(argv):
    config = configure(PlotConfig, argv, __doc__, positional="runs")
    if not config.runs:
        raise UserError("no runs given: python -m tools.plot_loss out/quickstart")
    if not config.out.endswith(".png"):
        raise UserError(f"out={config.out} must end in .png")
    check_regular(config.out)
    metrics = config.metrics.split(",")
    is_last = False
    while not is_last:
        # Asked before the logs are read, so that the last drawing has the last line.
        is_last = not config.follow or all(map(is_finished, config.runs))
        runs = {str(Path(directory)): read_log(directory) for directory in config.runs}
        logged = {name for records in runs.values() for record in records for name in record}
        for name in set(metrics) - logged - set(LOSSES):
            raise UserError(f"no run has logged {name}, only {', '.join(sorted(logged))}")
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        draw(runs, config.out, metrics)
        if not is_last:
            time.sleep(REDRAW_SECONDS)
    print(config.out)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
