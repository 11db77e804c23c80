"""Which changes learn faster? Validation loss over steps and over time.

    python -m experiments.convergence --preset=cpu

The runs are those of experiments.quality. A run's time is its steps times the median time of a
step, measured while the models take turns: the speed of a machine changes between one run and the
next.
"""

import itertools
import sys

from common.errors import run_program
from configurator import configure
from experiments.intervals import format_mean
from experiments.runs import PRESETS, mean_curve, shape_of_run, train_variant, val_losses, variants
from experiments.steps import time_steps
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS, draw_line
from tools.results.table import markdown_table

SHOWN = ("base", "RoPE", "GQA 1/4", "SWA 1/4", "all three")  # in the plot


def measure_curve(config, name, seed):
    """Train a variant; return [step, validation loss] of each evaluation."""
    return val_losses(train_variant(config, name, seed))


def measure_step_seconds(config, device, dtype):
    """Return {name: median seconds of an optimizer step}: its micro-steps times one of them."""
    B, T = config.run["batch_size"], config.run["block_size"]
    shape = shape_of_run(config.run)
    shapes = {name: shape | options for name, options in variants(config.run).items()}
    seconds = time_steps(shapes, B, 10 * config.rounds, device, dtype)
    micro_steps = config.run["total_batch_size"] // (B * T)
    return {name: micro_steps * seconds[name] for name in seconds}


def step_of_loss(curve, loss):
    """Return the step at which a curve first falls to a loss, or None if it never does.

    The curve is a straight line between evaluations.
    """
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if after <= loss < before:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def fractions_of_steps(curves, base_curves):
    """Return, for each seed, when a variant reaches the base's final loss, over the base's steps.

    None for a seed with which it never does.
    """
    fractions = []
    for curve, base_curve in zip(curves, base_curves, strict=True):
        last_step, base_loss = base_curve[-1]
        step = step_of_loss(curve, base_loss)
        fractions.append(None if step is None else step / last_step)
    return fractions


def losses(result):
    """Return a table: the time of a step, and when each variant reaches the base's final loss."""
    curves = complete_rows(result, variants(result["config"]["run"]))
    seconds = result["values"].get("step_seconds")
    if seconds is None or "base" not in curves:
        return "The table needs the base and step_seconds."
    rows = []
    for name in curves:
        factor = seconds[name] / seconds["base"]
        row = [name, f"{1000 * seconds[name]:.1f}", f"{factor:.2f}"]
        fractions = fractions_of_steps(curves[name], curves["base"])
        missing = fractions.count(None)
        if missing:
            row.append(f"never with {missing} of {len(fractions)}")
        else:
            times = [fraction * factor for fraction in fractions]
            row += [format_mean(fractions, digits=2), format_mean(times, digits=2)]
        rows.append(row)
    header = ["", "step, ms", "over the base's", "steps to the base's loss", "time to it"]
    return markdown_table(header, rows)


def draw(result, over_steps, over_time):
    """Plot the mean validation loss over steps and over time, a line for each model."""
    draw_curves(result, over_steps, dict.fromkeys(SHOWN, 1))
    draw_curves(result, over_time, result["values"].get("step_seconds", {}))
    over_steps.set_xlabel("steps")
    over_time.set_xlabel("time (s)")
    over_steps.set_ylabel("validation loss (nats per token)")


def draw_curves(result, panel, step_widths):
    """Draw the curves into a panel; step_widths is {name: length of a step on the x axis}."""
    for (name, curves), color in zip(complete_rows(result, SHOWN).items(), COLORS, strict=False):
        if name in step_widths:
            # Without the untrained model, whose loss would compress all others.
            steps, means = mean_curve(curves)
            x = [step * step_widths[name] for step in steps[1:]]
            draw_line(panel, name, x, means[1:], color, markersize=3, label=name)
            panel.legend(frameon=False)


def main(argv):
    study = Study("convergence", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    study.add_seeds(variants(config.run), measure_curve)
    speed = (measure_step_seconds, config, study.device, study.dtype)
    study.add("step_seconds", "step_seconds", *speed)
    study.run(losses, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
