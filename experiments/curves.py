"""Is my loss normal? The validation loss of the configs as they are, over their steps.

python -m experiments.curves --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import program
from common.models import model_module, models_with_option
from configurator import configure, configure_with_model
from experiments.runs import trained, val_losses
from experiments.study import COLOURS, Study, StudyConfig, label, markdown
from train import TrainConfig

CHARACTERS = [
    f"shakespeare_char{variant}" for variant in ("", "_rope", "_gqa", "_swa", "_rope_gqa_swa")
]


@dataclass
class Config:
    configs: tuple


PRESETS = {
    "cpu": Config(("quickstart", *CHARACTERS)),
    "gpu": Config(("gpt2", "gpt2_rope", "gpt2_gqa", "gpt2_swa", "gpt2_rope_gqa_swa")),
}


def curve(name):
    """[step, validation loss] of a run of config/NAME.py."""
    path = f"config/{name}.py"
    config, _ = configure_with_model(
        TrainConfig,
        [path],
        "",
        lambda config: model_module(config.model).GPTConfig,
        models_with_option,
    )
    return val_losses(trained(name, {"max_steps": config.max_steps}, path))


def losses(state):
    """Markdown: the validation loss of each config at the steps where it is evaluated."""
    rows = [
        [
            f"[{name}](../config/{name}.py)",
            ", ".join(f"{loss:.3f} at {step}" for step, loss in curve),
        ]
        for name, curve in state["points"].items()
    ]
    return markdown(["config", "validation loss at step"], rows)


def draw(state, panel):
    ends = []
    for (name, curve), colour in zip(state["points"].items(), COLOURS, strict=False):
        steps, values = zip(
            *curve[1:], strict=True
        )  # the untrained model's would press the others together
        panel.plot(steps, values, color=colour, marker="o", markersize=4)
        ends.append((name, steps[-1], values[-1], colour))
    for last in {x for _, x, *_ in ends}:
        label(panel, *(end for end in ends if end[1] == last))
    panel.set_xlim(right=1.4 * steps[-1])
    panel.set_xlabel("steps")
    panel.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("curves", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in study.config.configs:
        study.point(name, curve, name)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
