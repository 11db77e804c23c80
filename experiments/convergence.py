"""Which changes learn faster? Validation loss over steps and over time, and in equal time.

    python -m experiments.convergence --preset=cpu

The runs are those of experiments.quality. A run's time is its steps times the median time of a
step, measured while the models take turns: the speed of a machine changes between one run and the
next, so the seconds in their logs cannot be compared.

In equal time a model takes as many steps as the base's time allows. These are runs of their own,
whose learning rate decays over their last steps: the loss of a longer run at that step is that of
a higher rate.
"""

import itertools
import sys

from common.errors import run_program
from configurator import configure
from experiments.intervals import format_difference, format_mean, signs, verdict
from experiments.runs import (
    PRESETS,
    mean_curve,
    shape_of_run,
    train_model,
    train_variant,
    val_losses,
    variants,
)
from experiments.steps import time_steps
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS, draw_line
from tools.results.table import markdown_table

IN_EQUAL_TIME = " in the base's time"  # ends the row of a model that takes other steps
SHOWN = ("base", "RoPE", "GQA 1/4", "SWA 1/4", "all three")  # in the plot


def measure_curve(config, name, seed):
    """Train a variant; return [step, validation loss] of each evaluation."""
    return val_losses(train_variant(config, name, seed))


def measure_step_seconds(config, device, dtype):
    """Return {name: median seconds of an optimizer step}: its micro-steps times one of them."""
    B, T = config.run["batch_size"], config.run["block_size"]
    shape = shape_of_run(config.run)
    shapes = {name: shape | options for name, options in variants(config.run).items()}
    optimizer = {"optimizer": config.run["optimizer"]}
    seconds = time_steps(shapes, B, 10 * config.rounds, device, dtype, **optimizer)
    micro_steps = config.run["total_batch_size"] // (B * T)
    return {name: micro_steps * seconds[name] for name in seconds}


def measure_in_equal_time(config, row, seed, values):
    """Train a variant for as many steps as take the base's time; return them and the last loss.

    values   of the study, with step_seconds
    """
    name = row.removesuffix(IN_EQUAL_TIME)
    seconds = values["step_seconds"]
    steps = round(config.run["max_steps"] * seconds["base"] / seconds[name])
    options = variants(config.run)[name] | {"max_steps": steps}
    out_dir = train_model(config, f"{name}-{steps}-steps", options, seed)
    return {"steps": steps, "val_loss": val_losses(out_dir)[-1][1]}


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


def equal_time(result):
    """Return a table of the differences from the base after as many tokens and in as much time."""
    names = variants(result["config"]["run"])
    curves = complete_rows(result, names)
    in_time = complete_rows(result, [name + IN_EQUAL_TIME for name in names])
    rows = []
    for name in names:
        values = in_time.get(name + IN_EQUAL_TIME)
        if values and name in curves and "base" in curves:
            base = [curve[-1][1] for curve in curves["base"]]
            with_tokens = [curve[-1][1] for curve in curves[name]]
            with_time = [value["val_loss"] for value in values]
            row = [name, format_difference(with_tokens, base), values[0]["steps"]]
            row += [format_mean(with_time), format_difference(with_time, base)]
            rows.append([*row, verdict(with_time, base), signs(with_time, base)])
    header = ["minus the base", "with its tokens", "steps in its time", "loss in its time"]
    return markdown_table([*header, "with its time", "verdict", "sign test"], rows)


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
    speed = (measure_step_seconds, config, study.device, study.dtype)
    study.add("step_seconds", "step_seconds", *speed)
    study.add_seeds(variants(config.run), measure_curve)
    rows = [name + IN_EQUAL_TIME for name in variants(config.run) if name != "base"]
    study.add_seeds(rows, measure_in_equal_time, study.result["values"])
    study.run(losses, equal_time, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
