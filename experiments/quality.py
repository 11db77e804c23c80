"""What does each change cost or bring in quality? Validation losses over several seeds.

    python -m experiments.quality --preset=cpu
    python -m experiments.quality --preset=cpu_long --dataset=NAME

    python -m experiments.quality --preset=cpu --only="GQA 1/4" --seeds=1,2

The models are trained on the same tokens in the same order and compared seed by seed. Those asked
for most come first: a long study can be stopped, and the same command resumes it.
"""

import sys
from statistics import mean, stdev

from common.errors import run_program
from configurator import configure
from experiments.intervals import (
    enough_seeds,
    format_difference,
    format_mean,
    paired_difference,
    signs,
    verdict,
)
from experiments.runs import PRESETS, train_variant, val_losses, variants
from experiments.steps import cache_bytes
from experiments.study import Study, StudyConfig, complete_rows
from tools.plot_loss import read_log
from tools.results.plot import COLORS
from tools.results.table import markdown_table

CACHE_TOKENS = 32 * 1024
# What a plot calls a model, its color and its marker. Each idea has a hue and a marker of its own,
# and its models differ in lightness, so that eyes that see hues alike can tell them apart.
LOOKS = {
    "base": ("GPT-2, the base", COLORS[0], "o"),
    "RoPE": ("RoPE", COLORS[5], "D"),
    "RoPE + SWA": ("RoPE + SWA 1/4", "#00553F", "D"),
    "all three": ("RoPE + SWA 1/4 + GQA 1/4", COLORS[6], "P"),
    "GQA 1/2": ("GQA, 1/2 of the KV heads", COLORS[4], "s"),
    "GQA 1/4": ("GQA, 1/4 of the KV heads", COLORS[2], "s"),
    "MQA": ("MQA, a single KV head", "#00304C", "s"),
    "SWA 1/2": ("SWA, window 1/2 of training length", COLORS[1], "^"),
    "SWA 1/4": ("SWA, window 1/4 of training length", COLORS[3], "^"),
    "SWA 1/16": ("SWA, window 1/16 of training length", "#7A3500", "^"),
}
DIFFERENCES = (0.01, 0.02, 0.05)  # whose number of seeds is computed
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
        "bits_per_byte": record.get("val_bits_per_byte"),
        "tokens": record["tokens"],
    }


def measured_variants(result):
    """Return {name: values} of the variants that have been trained with each seed."""
    return complete_rows(result, variants(result["config"]["run"]))


def final_losses(result):
    """Return {name: last validation loss of each seed}."""
    return {
        name: [value["val_loss"] for value in values]
        for name, values in measured_variants(result).items()
    }


def losses(result):
    """Return a table of the validation loss of each variant, and its difference from the base."""
    final = final_losses(result)
    rows = []
    for name, values in measured_variants(result).items():
        bits = [value["bits_per_byte"] for value in values]
        row = [name, format_mean(final[name]), "" if None in bits else f"{mean(bits):.3f}"]
        if name != "base":
            row.append(format_difference(final[name], final.get("base")))
            row.append(verdict(final[name], final.get("base")))
            row.append(signs(final[name], final.get("base")))
        rows.append(row)
    header = ["", "validation loss", "bits per byte", "difference from the base", "verdict"]
    return markdown_table([*header, "sign test"], rows)


def seeds(result):
    """Return a table: how much losses and differences vary, and how many seeds that asks for.

    The standard deviations are those over the seeds, of the losses and of the paired differences.
    The interval is wider than in losses(): all of the table hold with 95 %. The last columns say
    how many seeds show a difference of that size with a probability of 80 %.
    """
    final = final_losses(result)
    base = final.get("base")
    rows = []
    for name, values in final.items():
        row = [name, f"{stdev(values):.4f}"]
        if base is not None and name != "base":
            row.append(f"{stdev(a - b for a, b in zip(values, base, strict=True)):.4f}")
            row.append(paired_difference(values, base, len(final) - 1).format(4, sign="+"))
            row += [enough_seeds(values, base, size) for size in DIFFERENCES]
        rows.append(row)
    header = ["", "stdev of the loss", "of the difference", "difference, all at once"]
    return markdown_table([*header, *(f"seeds for {size}" for size in DIFFERENCES)], rows)


def differences_over_steps(result):
    """Return a table of the differences from the base at each evaluation after step 0."""
    measured = measured_variants(result)
    base = measured.pop("base")
    steps = [step for step, _ in base[0]["curve"]]
    rows = []
    for name, values in measured.items():
        row = [name]
        for i in range(1, len(steps)):
            losses_at_step = [value["curve"][i][1] for value in values]
            of_base = [value["curve"][i][1] for value in base]
            row.append(format_difference(losses_at_step, of_base))
        rows.append(row)
    return markdown_table(["minus the base, after step", *steps[1:]], rows)


def comparisons(result):
    """Return a table of the paired differences between variants other than the base."""
    final = final_losses(result)
    rows = []
    for name, reference in COMPARISONS:
        if name in final and reference in final:
            pair = (final[name], final[reference])
            rows.append([name, reference, format_difference(*pair), verdict(*pair)])
    return markdown_table(["", "compared with", "difference", "verdict"], rows)


def draw(result, differences, caches):
    """Plot each model's difference from the base and its KV cache: one row a model, best first."""
    final = final_losses(result)
    names = sorted(final, key=lambda name: mean(final[name]))
    shape = result["config"]["shape"]  # of GPT-2 124M, which has other numbers of heads
    labels = []
    for row, name in enumerate(names):
        label, color, marker = LOOKS.get(name, (name, COLORS[7], "X"))  # or a model of the reader's
        labels.append(label)
        style = {"color": color, "marker": marker, "markersize": 7}
        if name == "base":
            differences.plot(0, row, **style)
        else:
            difference = paired_difference(final[name], final["base"])
            differences.errorbar(
                difference.mean, row, xerr=difference.half_width, capsize=4, **style
            )
        megabytes = cache_bytes(shape | variants(shape)[name], CACHE_TOKENS) / 1e6
        caches.plot(megabytes, row, **style)
        end = (megabytes, row)
        text = f"{megabytes:,.0f} MB"
        caches.annotate(text, end, xytext=(8, 0), textcoords="offset points", va="center")
    differences.axvline(0, color=COLORS[0], linewidth=0.8)
    differences.set_yticks(range(len(names)), labels)
    differences.set_xlabel("validation loss minus that\nof the base (95 % interval)")
    caches.set_xscale("log")
    caches.set_xlim(2, 90_000)  # all models and their numbers, in plots of some of them, too
    caches.set_xticks([10, 100, 1000, 10_000], ["10 MB", "100 MB", "1 GB", "10 GB"])
    caches.set_yticks(range(len(names)), [])
    caches.set_xlabel("KV cache of 32k tokens\nat the size of GPT-2 124M")
    for panel in (differences, caches):
        panel.set_ylim(len(names) - 0.5, -0.5)


def main(argv):
    study = Study("quality", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(variants(study.config.run), measure_quality)
    tables = [losses, comparisons]
    if len(study.seeds) > 1:
        tables.append(seeds)
    study.run(*tables, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
