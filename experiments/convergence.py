"""Do rotary positions learn faster than learned ones? Validation loss over steps and over time.

    python -m experiments.convergence --preset=cpu

The runs are those of experiments.table. A run's time is its steps times the median time of a step,
measured while the models take turns: the speed of a machine changes between one run and the next.
"""

import itertools
import sys

from common.errors import program
from configurator import configure
from experiments.runs import PRESETS, shape_of_run, train_variant, val_losses, variants
from experiments.steps import make_training_step
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    label_points,
    points_of_seeds,
)
from tools.bench.results import markdown_table
from tools.bench.turns import take_turns

NAMES = ("base", "RoPE")
LABELS = {"base": "learned positions", "RoPE": "RoPE"}
LINE_COLOURS = {"base": COLOURS[0], "RoPE": COLOURS[3]}


def measure_curve(config, name, seed):
    """Train a variant; return [step, validation loss] of each evaluation."""
    return val_losses(train_variant(config, name, seed))


def measure_step_seconds(config, device, dtype):
    """Return {name: median seconds of an optimizer step}: its micro-steps times one of them."""
    B, T = config.run["batch_size"], config.run["block_size"]
    shape = shape_of_run(config.run)
    micro_steps = {}
    for name in NAMES:
        options = variants(config.run)[name]
        micro_steps[name] = make_training_step(shape | options, B, T, device, dtype)
    seconds = take_turns(10 * config.rounds, device, micro_steps)
    count = config.run["total_batch_size"] // (B * T)
    return {name: count * seconds[name] for name in NAMES}


def step_of_loss(curve, loss):
    """Return the step at which a curve first falls to a loss, or None if it never does.

    The curve is a straight line between evaluations.
    """
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if after <= loss < before:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def losses(state):
    """Return a table of the final losses, and of when RoPE reaches that of learned positions."""
    seconds = state["points"]["step_seconds"]
    rows = []
    for seed in state["config"]["seeds"]:
        base = state["points"][f"base, seed {seed}"]
        rope = state["points"][f"RoPE, seed {seed}"]
        last_step, base_loss = base[-1]
        _, rope_loss = rope[-1]
        step = step_of_loss(rope, base_loss)
        row = [f"seed {seed}", f"{base_loss:.4f}", f"{rope_loss:.4f}"]
        if step is None:
            rows.append([*row, "never", "", ""])
            continue
        time_fraction = step * seconds["RoPE"] / (last_step * seconds["base"])
        rows.append([*row, f"{step:.0f}", f"{step / last_step:.2f}", f"{time_fraction:.2f}"])
    milliseconds = [f"{1000 * seconds[name]:.1f} ms" for name in NAMES]
    rows.append(["a step takes", *milliseconds, "", "", ""])
    header = [
        "",
        "learned positions",
        "RoPE",
        "RoPE is there at step",
        "of the steps",
        "of the time",
    ]
    return markdown_table(header, rows)


def draw(state, over_steps, over_time):
    """Plot validation loss over steps and over time, a line for each model and seed."""
    draw_curves(state, over_steps, {"base": 1, "RoPE": 1})
    draw_curves(state, over_time, state["points"]["step_seconds"])
    over_steps.set_xlabel("steps")
    over_time.set_xlabel("time (s)")
    over_steps.set_ylabel("validation loss (nats per token)")


def draw_curves(state, panel, step_widths):
    """Draw the curves into a panel; step_widths is {name: length of a step on the x axis}."""
    for name in NAMES:
        colour, width = LINE_COLOURS[name], step_widths[name]
        for curve in points_of_seeds(state, name):
            trained = curve[1:]  # the untrained model's loss would compress all others
            x = [step * width for step, _ in trained]
            y = [loss for _, loss in trained]
            panel.plot(x, y, color=colour, marker="o", markersize=3)
        label_points(panel, (LABELS[name], x[-3], y[-3], colour), offset=(-10, 12))


@program
def main(argv):
    study = Study("convergence", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for name in NAMES:
        for seed in config.seeds:
            study.measure_once(f"{name}, seed {seed}", measure_curve, config, name, seed)
    study.measure_once("step_seconds", measure_step_seconds, config, study.device, study.dtype)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
