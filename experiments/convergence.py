"""Which changes learn faster? Validation loss over steps and over time.

    python -m experiments.convergence --preset=cpu

The runs are those of experiments.quality. A run's time is its steps times the median time of a
step, measured while the models take turns: the speed of a machine changes between one run and the
next.
"""

import itertools
import sys
from statistics import mean

from common.errors import run_program
from configurator import configure
from experiments.intervals import format_mean
from experiments.runs import PRESETS, shape_of_run, train_variant, val_losses, variants
from experiments.steps import make_training_step
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    points_of_seeds,
)
from tools.bench.results import markdown_table
from tools.bench.turns import take_turns

SHOWN = ("base", "RoPE", "GQA 1/4", "SWA 1/4", "all three")  # in the plot


def measure_curve(config, name, seed):
    """Train a variant; return [step, validation loss] of each evaluation."""
    return val_losses(train_variant(config, name, seed))


def measure_step_seconds(config, device, dtype):
    """Return {name: median seconds of an optimizer step}: its micro-steps times one of them."""
    B, T = config.run["batch_size"], config.run["block_size"]
    shape = shape_of_run(config.run)
    micro_steps = {}
    for name, options in variants(config.run).items():
        micro_steps[name] = make_training_step(shape | options, B, T, device, dtype)
    seconds = take_turns(10 * config.rounds, device, micro_steps)
    count = config.run["total_batch_size"] // (B * T)
    return {name: count * seconds[name] for name in micro_steps}


def step_of_loss(curve, loss):
    """Return the step at which a curve first falls to a loss, or None if it never does.

    The curve is a straight line between evaluations.
    """
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if after <= loss < before:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def fractions_of_steps(state, name):
    """Return, for each seed, when a variant reaches the base's final loss, over the base's steps.

    None for a seed with which it never does.
    """
    fractions = []
    base_curves = points_of_seeds(state, "base")
    for curve, base_curve in zip(points_of_seeds(state, name), base_curves, strict=True):
        last_step, base_loss = base_curve[-1]
        step = step_of_loss(curve, base_loss)
        fractions.append(None if step is None else step / last_step)
    return fractions


def losses(state):
    """Return a table: the time of a step, and when each variant reaches the base's final loss."""
    seconds = state["points"]["step_seconds"]
    rows = []
    for name in seconds:
        row = [name, f"{1000 * seconds[name]:.1f}", f"{seconds[name] / seconds['base']:.2f}"]
        fractions = fractions_of_steps(state, name)
        reached = [fraction for fraction in fractions if fraction is not None]
        if len(reached) < len(fractions):
            rows.append(
                [*row, f"never with {len(fractions) - len(reached)} of {len(fractions)}", ""]
            )
            continue
        times = [fraction * seconds[name] / seconds["base"] for fraction in reached]
        rows.append([*row, format_mean(reached, digits=2), format_mean(times, digits=2)])
    header = ["", "step, ms", "over the base's", "steps to the base's loss", "time to it"]
    return markdown_table(header, rows)


def draw(state, over_steps, over_time):
    """Plot the mean validation loss over steps and over time, a line for each model."""
    draw_curves(state, over_steps, dict.fromkeys(SHOWN, 1))
    draw_curves(state, over_time, state["points"]["step_seconds"])
    over_steps.set_xlabel("steps")
    over_time.set_xlabel("time (s)")
    over_steps.set_ylabel("validation loss (nats per token)")


def draw_curves(state, panel, step_widths):
    """Draw the curves into a panel; step_widths is {name: length of a step on the x axis}."""
    for name, colour in zip(SHOWN, COLOURS, strict=False):
        curves = points_of_seeds(state, name)
        # Without the untrained model, whose loss would compress all others.
        steps = [step for step, _ in curves[0]][1:]
        y = [mean(curve[i][1] for curve in curves) for i in range(1, len(steps) + 1)]
        x = [step * step_widths[name] for step in steps]
        panel.plot(x, y, color=colour, marker="o", markersize=3, label=name)
    panel.legend(frameon=False)


def main(argv):
    study = Study("convergence", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for name in variants(config.run):
        for seed in config.seeds:
            study.measure_once(f"{name}, seed {seed}", measure_curve, config, name, seed)
    study.measure_once("step_seconds", measure_step_seconds, config, study.device, study.dtype)
    study.finish(draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
