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
from experiments.runs import PRESETS, mean_curve, train_run, train_variant, val_losses, variants
from experiments.study import Study, StudyConfig, complete_rows
from tools.plot_loss import read_log
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table

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


def measure(config, name, seed):
    """Return the last validation loss from scratch, and the curve of uptraining."""
    from_scratch = read_log(train_variant(config, name, seed))[-1]["val_loss"]
    return {"from_scratch": from_scratch, "uptrained": uptrain(config, name, seed)}


def losses(result):
    """Return a table of losses: from scratch, after the conversion, at the end of uptraining.

    The differences are paired by seed.
    """
    measured = complete_rows(result, NAMES)
    uptrained = {
        name: [value["uptrained"][-1][1] for value in values] for name, values in measured.items()
    }
    rows = []
    for name, values in measured.items():
        from_scratch = [value["from_scratch"] for value in values]
        converted = [value["uptrained"][0][1] for value in values]
        row = [name]
        row += [format_mean(column) for column in (from_scratch, converted, uptrained[name])]
        row.append(format_difference(uptrained[name], from_scratch))
        if name != "base":
            row.append(format_difference(uptrained[name], uptrained.get("base")))
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


def draw(result, panel):
    """Plot the mean loss over the steps after the conversion; dotted, the loss from scratch."""
    ends = []
    for (name, values), color in zip(complete_rows(result, NAMES).items(), COLORS, strict=False):
        steps, uptrained = mean_curve([value["uptrained"] for value in values])
        ends.append(draw_line(panel, name, steps, uptrained, color))
        from_scratch = mean(value["from_scratch"] for value in values)
        panel.hlines(from_scratch, 0, steps[-1], color=color, linestyle=":", linewidth=1.2)
    label_points(panel, *ends)
    panel.set_xlim(right=1.3 * ends[0][1])  # room for the labels
    panel.set_xlabel("steps of uptraining (dotted: the final loss from scratch)")
    panel.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("uptraining", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(NAMES, measure)
    study.run(losses, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
