"""Is my loss normal? The validation loss of the configs in config/, unchanged, over their steps.

python -m experiments.curves --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import run_program
from configurator import configure
from experiments.runs import train_run, val_losses
from experiments.study import Study, StudyConfig
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table


@dataclass
class Config:
    configs: tuple  # names of files in config/


PRESETS = {
    "cpu": Config(
        (
            "quickstart",
            "shakespeare_char",
            "shakespeare_char_rope",
            "shakespeare_char_gqa",
            "shakespeare_char_swa",
            "shakespeare_char_rope_gqa_swa",
        )
    ),
    "gpu": Config(("gpt2", "gpt2_rope", "gpt2_gqa", "gpt2_swa", "gpt2_rope_gqa_swa")),
}


def measure_curve(name):
    """Train config/NAME.py; return [step, validation loss] of each evaluation."""
    return val_losses(train_run(name, {}, f"config/{name}.py"))


def losses(result):
    """Return a table of the validation loss of each config, wherever it is evaluated."""
    rows = []
    for name, curve in result["values"].items():
        evaluations = [f"{loss:.3f} at {step}" for step, loss in curve]
        rows.append([f"[{name}](../config/{name}.py)", ", ".join(evaluations)])
    return markdown_table(["config", "validation loss at step"], rows)


def draw(result, panel):
    """Plot validation loss over steps, a line for each config."""
    ends = {}  # {last step: labels of the lines that end there}
    for (name, curve), color in zip(result["values"].items(), COLORS, strict=False):
        steps, values = zip(*curve[1:], strict=True)  # the untrained loss would compress all others
        end = draw_line(panel, name, steps, values, color)
        ends.setdefault(steps[-1], []).append(end)
    for labels in ends.values():
        label_points(panel, *labels)
    panel.set_xlim(right=1.4 * max(ends))  # room for the labels
    panel.set_xlabel("steps")
    panel.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("curves", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in study.config.configs:
        study.add(name, name, measure_curve, name)
    study.run(losses, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
