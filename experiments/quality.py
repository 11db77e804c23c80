"""What does each change cost or bring in quality? Validation losses over several seeds.

    python -m experiments.quality --preset=cpu
    python -m experiments.quality --preset=cpu_long --dataset=NAME

    python -m experiments.quality --preset=cpu --only="GQA 1/4" --seeds=1,2

The models are trained on the same tokens in the same order and compared seed by seed. Those asked
for most come first: a long study can be stopped, and the same command resumes it.
"""

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
from experiments.study import Study, StudyConfig, complete_rows
from tools.plot_loss import read_log
from tools.results.plot import COLORS, label_points
from tools.results.table import markdown_table

CACHE_TOKENS = 32 * 1024
MARKERS = ("o", "s")  # of the first models, and of those whose colors repeat
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
        rows.append(row)
    header = ["", "validation loss", "bits per byte", "difference from the base", "verdict"]
    return markdown_table(header, rows)


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
    """Plot differences from the base, and losses over KV cache size; both with 95 % intervals."""
    final = final_losses(result)
    shape = result["config"]["shape"]  # of GPT-2 124M, which has other numbers of heads
    for i, (name, values) in enumerate(final.items()):
        color = COLORS[i % len(COLORS)]
        style = {"fmt": MARKERS[i // len(COLORS)], "capsize": 4, "color": color}
        if name != "base":
            difference = paired_difference(values, final["base"])
            differences.errorbar(difference.mean, i, xerr=difference.half_width, **style)
        loss = interval_of(values)
        x = cache_bytes(shape | variants(shape)[name], CACHE_TOKENS) / 1e6
        caches.errorbar(x, loss.mean, yerr=loss.half_width, **style)
        label_points(caches, (name, x, loss.mean, color), offset=(6, 4))
    differences.axvline(0, color=COLORS[0], linewidth=0.8)
    differences.set_yticks(range(len(final)), list(final))
    differences.set_xlabel("loss minus that of the base (95 % interval)")
    caches.set_xscale("log")
    caches.set_xlim(3, 9000)  # all variants, so that plots of some of them have readable ticks
    caches.set_xlabel("KV cache of 32k tokens, GPT-2 124M (MB)")
    caches.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("quality", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(variants(study.config.run), measure_quality)
    study.run(losses, comparisons, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
