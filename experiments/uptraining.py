"""Can a trained multi-head model become a GQA model? Mean-pool its KV heads, then train it further.

    python -m experiments.uptraining --preset=cpu

The experiment of Ainslie et al. 2023 (section 2.1) at a small size: the base runs of
experiments.quality, converted to GQA and trained for a fifth of their steps. For comparison: the
base trained further for as many steps, and GQA trained from scratch.
"""

import sys
from statistics import mean

from common.errors import run_program
from configurator import configure
from experiments.intervals import format_difference, format_mean
from experiments.runs import PRESETS, train_run, train_variant, val_losses, variants
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    label_points,
    points_of_seeds,
)
from tools.bench.results import markdown_table
from tools.plot_loss import read_log

NAMES = ("base", "GQA 1/2", "GQA 1/4", "MQA")
STEPS_DIVISOR = 5  # uptraining takes 1 / 5 of the steps from scratch


def uptrain(config, name, seed):
    """Convert the base to a variant and train it further; return [step, validation loss] pairs.

    Step 0 is right after the conversion.
    """
    steps = config.run["max_steps"] // STEPS_DIVISOR
    options = {
        **config.run,
        **variants(config.run)[name],
        "init_from": train_variant(config, "base", seed),
        "seed": 100 + seed,  # another data order than in the run from scratch
        "max_steps": steps,
        "eval_interval": max(1, steps // 8),
        "learning_rate": config.run["learning_rate"] / 4,
        "muon_learning_rate": config.run["muon_learning_rate"] / 4,
        "warmup_steps": max(1, steps // 16),
    }
    return val_losses(
        train_run(f"uptrained-{config.name}-{config.run['dataset']}-{name}-{seed}", options)
    )


def train_from_scratch(config, name, seed):
    """Train a variant; return its last validation loss."""
    return read_log(train_variant(config, name, seed))[-1]["val_loss"]


def mean_curve(curves):
    """Return the steps of curves that were evaluated at the same steps, and their mean losses."""
    steps = [step for step, _ in curves[0]]
    mean_losses = [mean(curve[i][1] for curve in curves) for i in range(len(steps))]
    return steps, mean_losses


def losses(state):
    """Return a table of losses: from scratch, after the conversion, at the end of uptraining.

    The differences are paired by seed.
    """
    base = last_losses(state, "base")
    rows = []
    for name in NAMES:
        from_scratch = points_of_seeds(state, f"{name}, from scratch")
        uptrained = last_losses(state, name)
        converted = [curve[0][1] for curve in points_of_seeds(state, f"{name}, trained on")]
        row = [name, format_mean(from_scratch), format_mean(converted), format_mean(uptrained)]
        row.append(format_difference(uptrained, from_scratch))
        row.append("" if name == "base" else format_difference(uptrained, base))
        rows.append(row)
    header = [
        "",
        "from scratch",
        "converted",
        "uptrained",
        "uptrained minus from scratch",
        "uptrained minus uptrained base",
    ]
    return markdown_table(header, rows)


def last_losses(state, name):
    """Return the last loss of uptraining, of each seed."""
    return [curve[-1][1] for curve in points_of_seeds(state, f"{name}, trained on")]


def draw(state, panel):
    """Plot the mean loss over the steps after the conversion; dotted, the loss from scratch."""
    ends = []
    for name, colour in zip(NAMES, COLOURS, strict=False):
        steps, uptrained = mean_curve(points_of_seeds(state, f"{name}, trained on"))
        panel.plot(steps, uptrained, color=colour, marker="o", markersize=4)
        ends.append((name, steps[-1], uptrained[-1], colour))
        from_scratch = mean(points_of_seeds(state, f"{name}, from scratch"))
        panel.hlines(from_scratch, 0, steps[-1], color=colour, linestyle=":", linewidth=1.2)
    label_points(panel, *ends)
    panel.set_xlim(right=1.3 * steps[-1])  # room for the labels
    panel.set_xlabel("steps of uptraining (dotted: the final loss from scratch)")
    panel.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("uptraining", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for seed in config.seeds:
        for name in NAMES:
            key = f"{name}, from scratch, seed {seed}"
            study.measure_once(key, train_from_scratch, config, name, seed)
            key = f"{name}, trained on, seed {seed}"
            study.measure_once(key, uptrain, config, name, seed)
    study.finish(draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
