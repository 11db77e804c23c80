"""Draw the loss curves of runs into one picture.

    python -m tools.plot_loss out/a out/b [--out=out/loss.png]

Training loss is a line, validation loss a line with dots; over steps, tokens and seconds.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.plot_loss")

import json
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError, program
from configurator import configure


@dataclass
class PlotConfig:
    runs: list[str] = field(default_factory=list)  # directories of runs
    out: str = "out/loss.png"  # the picture to write


def read_log(directory):
    """Return the records of a run's log.jsonl. Raises UserError if there are fewer than two."""
    path = Path(directory, "log.jsonl")
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"no {path}: {directory} is not a run of train.py") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if len(records) < 2:
        raise UserError(f"{path} has {len(records)} lines: nothing to draw yet")
    return records


def draw(runs, path):
    """Draw {label: records} into the PNG file `path`: three panels that share the loss axis."""
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
            panel.plot(
                *zip(*train, strict=True),
                color=colour,
                linewidth=0.8,
                alpha=0.5,
                label=f"{label}, training",
            )
            if val:
                panel.plot(
                    *zip(*val, strict=True),
                    color=colour,
                    marker="o",
                    markersize=4,
                    label=f"{label}, validation",
                )
        panel.set_xlabel(key)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@program
def main(argv):
    config = configure(PlotConfig, argv, __doc__, positional="runs")
    if not config.runs:
        raise UserError("name the runs: python -m tools.plot_loss out/quickstart")
    if not config.out.endswith(".png"):
        raise UserError(f"out={config.out} must end in .png")
    runs = {str(Path(directory)): read_log(directory) for directory in config.runs}
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    draw(runs, config.out)
    print(config.out)


if __name__ == "__main__":
    main(sys.argv[1:])
