"""Do rotary positions learn faster than learned ones? Validation loss over steps and over time.

    python -m experiments.convergence --preset=cpu

The runs are experiments.table's. Time is steps times the median step time of models that take turns, as the speed of a
machine wanders while runs follow each other.
"""

import itertools
import sys

from common.errors import program
from configurator import configure
from experiments.runs import PRESETS, run_of, shape_of, val_losses, variants
from experiments.steps import training_step
from experiments.study import COLOURS, Study, StudyConfig, label, markdown, seeds_of
from tools.bench import take_turns

NAMES = ("base", "RoPE")


def curve(config, name, seed):
    return val_losses(run_of(config, name, seed))


def step_seconds(config, device, dtype):
    B, T = config.run["batch_size"], config.run["block_size"]
    shapes = {name: shape_of(config.run) | variants(**config.run)[name] for name in NAMES}
    steps = {name: training_step(shape, B, T, device, dtype) for name, shape in shapes.items()}
    micro_steps = config.run["total_batch_size"] // (B * T)
    return {
        name: s * micro_steps for name, s in take_turns(10 * config.rounds, device, steps).items()
    }


def steps_to(curve, loss):
    """The step at which a curve first reaches a loss, on a straight line between evaluations; None if it never does."""
    for (step, before), (next_step, after) in itertools.pairwise(curve):
        if after <= loss < before:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def losses(state):
    """Markdown: where the runs end, and when RoPE is where the learned positions end."""
    seconds, rows = state["points"]["step_seconds"], []
    for seed in state["config"]["seeds"]:
        base, rope = (state["points"][f"{name}, seed {seed}"] for name in NAMES)
        (last, loss), there = base[-1], steps_to(rope, base[-1][1])
        row = [f"seed {seed}", f"{loss:.4f}", f"{rope[-1][1]:.4f}"]
        if there is None:
            rows.append([*row, "never", "", ""])
        else:
            time = there * seconds["RoPE"] / (last * seconds["base"])
            rows.append([*row, f"{there:.0f}", f"{there / last:.2f}", f"{time:.2f}"])
    rows.append(["a step takes", *(f"{1000 * seconds[name]:.1f} ms" for name in NAMES), "", "", ""])
    header = [
        "",
        "learned positions",
        "RoPE",
        "RoPE is there at step",
        "of the steps",
        "of the time",
    ]
    return markdown(header, rows)


def draw(state, over_steps, over_time):
    seconds = state["points"]["step_seconds"]
    for name, colour, text in (
        ("base", COLOURS[0], "learned positions"),
        ("RoPE", COLOURS[3], "RoPE"),
    ):
        for curve in seeds_of(state, name):
            steps, losses = zip(*curve[1:], strict=True)
            for panel, unit in ((over_steps, 1), (over_time, seconds[name])):
                panel.plot(
                    [step * unit for step in steps], losses, color=colour, marker="o", markersize=3
                )
        for panel, unit in ((over_steps, 1), (over_time, seconds[name])):
            label(panel, (text, steps[-3] * unit, losses[-3], colour), offset=(-10, 12))
    over_steps.set_xlabel("steps")
    over_time.set_xlabel("time (s)")
    over_steps.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("convergence", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in NAMES:
        for seed in study.config.seeds:
            study.point(f"{name}, seed {seed}", curve, study.config, name, seed)
    study.point("step_seconds", step_seconds, study.config, study.device, study.dtype)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
