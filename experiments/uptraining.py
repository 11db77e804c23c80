"""Can a trained multi-head model become a grouped-query one? Mean pooling of key and value heads, then training on.

    python -m experiments.uptraining --preset=cpu

The experiment of Ainslie et al. 2023 (section 2.1) in small: the base runs of experiments.table, converted, trained on
for a fifth of their steps; beside them the base trained on for as long, and grouped queries from scratch.
"""

import sys
from statistics import mean

from common.errors import program
from configurator import configure
from experiments.runs import PRESETS, run_of, trained, val_losses, variants
from experiments.study import COLOURS, Study, StudyConfig, label, markdown, seeds_of
from tools.plot_loss import read_log

NAMES = ("base", "GQA 1/2", "GQA 1/4")
SHARE = 5  # trained on for steps / SHARE


def trained_on(config, name, seed):
    """[steps, validation loss] of the base in the shape of a variant, from right after the conversion on."""
    steps = config.run["max_steps"] // SHARE
    options = (
        config.run
        | variants(**config.run)[name]
        | {
            "init_from": run_of(config, "base", seed),
            "seed": 100 + seed,  # other batches than it has seen first
            "max_steps": steps,
            "eval_interval": max(1, steps // 8),
            "learning_rate": config.run["learning_rate"] / 4,
            "warmup_steps": max(1, steps // 16),
        }
    )
    return val_losses(trained(f"uptrained-{config.run['dataset']}-{name}-{seed}", options))


def from_scratch(config, name, seed):
    return read_log(run_of(config, name, seed))[-1]["val_loss"]


def losses(state):
    """Markdown: validation loss from scratch, right after the conversion, and after training on: means of the seeds."""
    rows = []
    for name in NAMES:
        curves = seeds_of(state, f"{name}, trained on")
        at = {curve[0]: mean(c[i][1] for c in curves) for i, curve in enumerate(curves[0])}
        scratch = seeds_of(state, f"{name}, from scratch")
        rows.append([name, f"{mean(scratch):.4f}", *(f"{loss:.4f}" for loss in at.values())])
    return markdown(
        ["", "from scratch", "converted", *(f"+{step} steps" for step in list(at)[1:])], rows
    )


def draw(state, panel):
    ends = []
    for name, colour in zip(NAMES, (COLOURS[0], COLOURS[1], COLOURS[2]), strict=True):
        curves = seeds_of(state, f"{name}, trained on")
        steps = [step for step, _ in curves[0]]
        losses = [mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        panel.plot(steps, losses, color=colour, marker="o", markersize=4)
        ends.append((f"{name}, from the base", steps[-1], losses[-1], colour))
        scratch = mean(seeds_of(state, f"{name}, from scratch"))
        panel.axhline(scratch, color=colour, linestyle=":", linewidth=1.2)
    label(panel, *ends)
    panel.set_xlim(right=1.3 * steps[-1])
    panel.set_xlabel("steps of training on (dotted: the end of training from scratch)")
    panel.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("uptraining", configure(StudyConfig, argv, __doc__), PRESETS)
    for seed in study.config.seeds:
        for name in NAMES:
            study.point(
                f"{name}, from scratch, seed {seed}", from_scratch, study.config, name, seed
            )
            study.point(f"{name}, trained on, seed {seed}", trained_on, study.config, name, seed)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
