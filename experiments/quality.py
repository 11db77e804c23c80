"""What does each change cost or bring in quality? Validation losses over several seeds.

    python -m experiments.quality --preset=cpu
    python -m experiments.quality --preset=cpu_long --dataset=NAME

The models are trained on the same tokens in the same order and compared seed by seed. The results
are published after each model, those asked for most first: a long study can be stopped, and the
same command resumes it.
"""

import math
import sys
from statistics import mean

from common.errors import run_program
from configurator import configure
from experiments.intervals import (
    format_difference,
    format_mean,
    interval_of,
    paired_difference,
    verdict,
)
from experiments.runs import PRESETS, train_variant, val_losses, variants
from experiments.steps import cache_bytes
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    has_all_seeds,
    label_points,
    points_of_seeds,
)
from prepare_data import open_dataset
from tools.bench.results import markdown_table
from tools.plot_loss import read_log

CACHE_TOKENS = 32 * 1024
MARKERS = ("o", "s")  # of the first models, and of those whose colours repeat
# What is compared with another variant than the base.
COMPARISONS = (
    ("GQA 1/4", "GQA 1/2"),
    ("MQA", "GQA 1/4"),
    ("MQA", "GQA 1/2"),
    ("SWA 1/4", "SWA 1/2"),
    ("SWA 1/16", "SWA 1/4"),
    ("RoPE + SWA", "RoPE"),
    ("all three", "RoPE"),
    ("all three", "RoPE + SWA"),
)


def measure_quality(config, name, seed):
    """Train a variant; return its curve [step, loss], its last loss, bits per byte and tokens."""
    out_dir = train_variant(config, name, seed)
    record = read_log(out_dir)[-1]
    return {
        "curve": val_losses(out_dir),
        "val_loss": record["val_loss"],
        "bits_per_byte": bits_per_byte(record["val_loss"], config.run["dataset"]),
        "tokens": record["tokens"],
    }


def bits_per_byte(loss, dataset):
    """Return a loss in bits per byte, or None: a dataset may not say how many bytes it has."""
    _, meta = open_dataset(dataset)
    val = meta.get("val", {})
    if "bytes" not in val:
        return None
    return loss / math.log(2) * val["tokens"] / val["bytes"]


def measured_variants(state):
    """Return the names of the variants that have been trained with each seed."""
    return [name for name in variants(state["config"]["run"]) if has_all_seeds(state, name)]


def final_losses(state, name):
    """Return the last validation loss of each seed."""
    return [point["val_loss"] for point in points_of_seeds(state, name)]


def losses(state):
    """Return a table of the validation loss of each variant, and its difference from the base."""
    base = final_losses(state, "base")
    rows = []
    for name in measured_variants(state):
        values = final_losses(state, name)
        bits = [point["bits_per_byte"] for point in points_of_seeds(state, name)]
        row = [name, format_mean(values), "" if None in bits else f"{mean(bits):.3f}"]
        if name != "base":
            row += [format_difference(values, base), verdict(values, base)]
        rows.append(row)
    header = ["", "validation loss", "bits per byte", "difference from the base", "so it is"]
    return markdown_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def differences_over_steps(state):
    """Return a table of the differences from the base at each evaluation after step 0."""
    base = points_of_seeds(state, "base")
    steps = [step for step, _ in base[0]["curve"]]
    rows = []
    for name in measured_variants(state)[1:]:  # the first one is the base
        points = points_of_seeds(state, name)
        row = [name]
        for i in range(1, len(steps)):
            values = [point["curve"][i][1] for point in points]
            base_values = [point["curve"][i][1] for point in base]
            row.append(format_difference(values, base_values))
        rows.append(row)
    return markdown_table(["minus the base, after step", *steps[1:]], rows)


def comparisons(state):
    """Return a table of the paired differences between variants other than the base."""
    shown = measured_variants(state)
    rows = []
    for name, reference in COMPARISONS:
        if name in shown and reference in shown:
            values, others = final_losses(state, name), final_losses(state, reference)
            difference = format_difference(values, others)
            rows.append([name, reference, difference, verdict(values, others)])
    return markdown_table(["", "compared with", "difference", "so it is"], rows)


def draw(state, differences, caches):
    """Plot differences from the base, and losses over KV cache size; both with 95 % intervals."""
    shown = measured_variants(state)
    shapes = variants(state["config"]["shape"])  # of GPT-2 124M, which has other numbers of heads
    base = final_losses(state, "base")
    for i, name in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        marker = MARKERS[i // len(COLOURS)]
        values = final_losses(state, name)
        if name != "base":
            difference = paired_difference(values, base)
            differences.errorbar(
                difference.mean, i, xerr=difference.half_width, fmt=marker, capsize=4, color=colour
            )
        loss = interval_of(values)
        x = cache_bytes(state["config"]["shape"] | shapes[name], CACHE_TOKENS) / 1e6
        caches.errorbar(x, loss.mean, yerr=loss.half_width, fmt=marker, capsize=4, color=colour)
        label_points(caches, (name, x, loss.mean, colour), offset=(6, 4))
    differences.axvline(0, color=COLOURS[0], linewidth=0.8)
    differences.set_yticks(range(len(shown)), shown)
    differences.set_xlabel("loss minus that of the base (95 % interval)")
    caches.set_xscale("log")
    caches.set_xlim(3, 9000)  # all variants, so that plots of some of them have readable ticks
    caches.set_xlabel("KV cache of 32k tokens, GPT-2 124M (MB)")
    caches.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("quality", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for name in variants(config.run):
        was_measured = has_all_seeds(study.state, name)
        for seed in config.seeds:
            study.measure_once(f"{name}, seed {seed}", measure_quality, config, name, seed)
        if not was_measured:
            study.finish(draw)
    study.finish(draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
