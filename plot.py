"""Draw the loss curves of runs into one picture.

    python plot.py out/a out/b [--to=out/loss.png]

Training loss is a line, validation loss a line with dots; over steps, tokens and seconds.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError, configure, program


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # directories of runs
    to: str = "out/loss.png"  # the picture


def read_log(directory):
    """The objects of a run's log.jsonl; UserError where there is none, or none to draw."""
    path = Path(directory, "log.jsonl")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"no {path}: {directory} is no run of train.py") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if len(records) < 2:
        raise UserError(f"{path} has {len(records)} lines: nothing to draw yet")
    return records


def draw(runs, to):
    """Draw {label: records} into the PNG file `to`: three panels that share the loss axis."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    shades = [0.85 * i / max(1, len(runs) - 1) for i in range(len(runs))]  # differ in lightness
    colours = plt.get_cmap("viridis")(shades)
    for panel, key in zip(panels, ("step", "tokens", "seconds"), strict=True):
        for (label, records), colour in zip(runs.items(), colours, strict=True):
            train = [(r[key], r["train_loss"]) for r in records if r.get("train_loss") is not None]
            val = [(r[key], r["val_loss"]) for r in records if "val_loss" in r]
            panel.plot(*zip(*train, strict=True), color=colour, linewidth=0.8, alpha=0.5, label=f"{label}, training")
            if val:
                panel.plot(
                    *zip(*val, strict=True), color=colour, marker="o", markersize=4, label=f"{label}, validation"
                )
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(fontsize="small")
    figure.savefig(to, dpi=150)
    plt.close(figure)


@program
def main(argv):
    config = configure(PlotConfig, argv, __doc__, positional="runs")
    if not config.runs:
        raise UserError("name the runs: python plot.py out/quickstart")
    if not config.to.endswith(".png"):
        raise UserError(f"to={config.to} must end in .png")
    runs = {str(Path(directory)): read_log(directory) for directory in config.runs}
    Path(config.to).parent.mkdir(parents=True, exist_ok=True)
    draw(runs, config.to)
    print(config.to)


if __name__ == "__main__":
    main(sys.argv[1:])
