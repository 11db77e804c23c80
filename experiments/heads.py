"""Why does RoPE's lead shrink in a long training? Larger heads, and rotating fewer channels.

    python -m experiments.heads --preset=cpu_long

The hypothesis, stated before these runs: the heads are too small. With 16 channels a head has
eight pairs, and the five fastest of them turn by more than a radian in 256 positions; so few
channels remain in which a query can look for a content wherever it is. If that is the reason, then
with larger heads, or with fewer rotated channels, RoPE ends lower in comparison with the base.
If the lead shrinks only because learned positions have been learned in the meantime, then it
shrinks in the same way for all sizes.

The number of heads changes no number of parameters. Each RoPE model is compared with the base that
has as many heads; the runs are those of experiments.quality, where they are the same.
"""

import sys
from contextlib import nullcontext

from common.errors import run_program
from configurator import configure
from experiments.angles import partly_rotated, replaced_angles
from experiments.intervals import format_difference, format_mean, paired_difference, signs, verdict
from experiments.runs import PRESETS, train_model, train_variant, val_losses
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table

DIVISORS = (1, 4, 2)  # of the preset's number of heads
FRACTIONS = {"1/2": 0.5, "1/4": 0.25}  # of the channels that are rotated


def models(run):
    """Return {name: (model, number of heads, rotated fraction)}, the most informative first.

    run   the options of the preset's runs
    """
    rows = {}
    for divisor in DIVISORS:
        heads = run["n_head"] // divisor
        size = run["n_embd"] // heads
        rows[f"base, {heads} heads of {size}"] = ("model", heads, 1.0)
        rows[f"RoPE, {heads} heads of {size}"] = ("model_rope", heads, 1.0)
    for name, fraction in FRACTIONS.items():
        rows[f"RoPE, {name} of the channels"] = ("model_rope", run["n_head"], fraction)
    return rows


def base_of(run, name):
    """Return the name of the base with as many heads."""
    _, heads, _ = models(run)[name]
    return f"base, {heads} heads of {run['n_embd'] // heads}"


def measure_curve(config, name, seed):
    """Train a model unless that is done; return [step, validation loss] of each evaluation."""
    model, heads, fraction = models(config.run)[name]
    if heads == config.run["n_head"] and fraction == 1:
        return val_losses(train_variant(config, name.split(",")[0], seed))
    options = {"model": model, "n_head": heads}
    is_part = fraction < 1
    with replaced_angles(partly_rotated, fraction=fraction) if is_part else nullcontext():
        return val_losses(train_model(config, name, options, seed))


def rope_rows(result):
    """Return {name: (curves of a RoPE model, curves of its base)}, one curve for each seed."""
    run = result["config"]["run"]
    measured = complete_rows(result, models(run))
    rows = {}
    for name, curves in measured.items():
        base = base_of(run, name)
        if name != base and base in measured:
            rows[name] = (curves, measured[base])
    return rows


def final_losses(curves):
    return [curve[-1][1] for curve in curves]


def losses(result):
    """Return a table of the final losses and of their paired differences."""
    rows = []
    for name, (curves, base_curves) in rope_rows(result).items():
        pair = (final_losses(curves), final_losses(base_curves))
        row = [name, *(format_mean(losses) for losses in reversed(pair))]
        rows.append([*row, format_difference(*pair), verdict(*pair), signs(*pair)])
    header = ["", "the base", "RoPE", "difference", "verdict", "sign test"]
    return markdown_table(header, rows)


def differences_of(curves, base_curves):
    """Return {step: Interval of RoPE minus the base} of the evaluations after step 0."""
    differences = {}
    for i, (step, _) in enumerate(curves[0]):
        if step > 0:
            pair = [[curve[i][1] for curve in each] for each in (curves, base_curves)]
            differences[step] = paired_difference(*pair)
    return differences


def differences_over_steps(result):
    """Return a table of RoPE minus the base at each evaluation after step 0."""
    rows = []
    steps = []
    for name, pair in rope_rows(result).items():
        differences = differences_of(*pair)
        steps = list(differences)
        rows.append([name, *(each.format(4, sign="+") for each in differences.values())])
    return markdown_table(["minus the base, after step", *steps], rows)


def effects(result):
    """Return a table of RoPE's differences from its base, minus that of the first row.

    These are differences of differences, paired by seed.
    """
    leads = {}
    for name, (curves, base_curves) in rope_rows(result).items():
        pair = zip(final_losses(curves), final_losses(base_curves), strict=True)
        leads[name] = [loss - base for loss, base in pair]
    rows = []
    if leads:
        first, *others = leads
        for name in others:
            pair = (leads[name], leads[first])
            rows.append([name, format_difference(*pair), verdict(*pair), signs(*pair)])
    header = ["RoPE minus the base, minus that of the first row", "difference", "verdict"]
    return markdown_table([*header, "sign test"], rows)


def draw(result, panel):
    """Plot RoPE minus the base over the steps, with 95 % intervals, a line for each size."""
    ends = []
    for (name, pair), color in zip(rope_rows(result).items(), COLORS, strict=False):
        differences = differences_of(*pair)
        steps = list(differences)
        means = [difference.mean for difference in differences.values()]
        low = [difference.low for difference in differences.values()]
        high = [difference.high for difference in differences.values()]
        panel.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        ends.append(draw_line(panel, name.removeprefix("RoPE, "), steps, means, color))
    label_points(panel, *ends)
    panel.axhline(0, color="gray", linewidth=0.8, linestyle=":")
    if ends:
        panel.set_xlim(right=1.35 * ends[0][1])  # room for the labels
    panel.set_xlabel("steps")
    panel.set_ylabel("loss of RoPE minus that of the base")


def main(argv):
    study = Study("heads", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(models(study.config.run), measure_curve)
    study.run(losses, effects, differences_over_steps, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
