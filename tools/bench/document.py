"""Write docs/BENCHMARKS.md and its plots from the result files.

All text of the document that is written by hand is in this file.
"""

import textwrap
from dataclasses import dataclass
from pathlib import Path

from tools.bench.goals import GOALS, describe_goal
from tools.bench.results import (
    describe_source,
    markdown_rows,
    markdown_table,
    median,
    read_all,
    result_path,
)

# Colours of Okabe and Ito (Wong, Nature Methods 8, 441, 2011), which differ in lightness.
OURS, PEER = "#0072B2", "#E69F00"
BAR_HEIGHT = 0.34  # inches

HEAD = """# Benchmarks

`python -m tools.bench document` writes this file from the result files in `docs/bench`, and so does
every benchmark. Measure your own machine with

```sh
python -m tools.bench all
```

or one question at a time (`python -m tools.bench train`). With `--nanogpt=PATH`, a directory of
nanoGPT's programs, and with `transformers` installed, these run beside ours as peers.
`--budget_seconds` limits the time of a call.

How to read the tables:

- **Absolute times mean little**: machines differ and are shared. What counts are ratios of things
  that ran alternately in one call. `A over B` is A's time divided by B's: above 1, B is faster.
- **`x (a to b)`** is the median and the range over the rounds of a call. Two ranges that overlap
  show no difference.
- **`of ... limit`** is a fraction of what this machine can do at best, measured in the same call:
  the rate of a large matrix product, or the bandwidth at which memory is read.
"""


@dataclass
class Question:
    """A chapter of the document: the rows of one benchmark, and a plot of one column."""

    benchmark: str
    title: str
    text: str
    column: str = ""  # of the plot; "": none
    unit: str = ""
    labels: tuple = ()  # columns that name a bar


QUESTIONS = [
    Question(
        "limits",
        "What can the machine do at best?",
        "Matrix products at the shapes of a training step of GPT-2 124M: the forward product, the "
        "gradient of the input and the gradient of the weight of each Linear layer and of the "
        "head; and how fast memory is read and copied.",
        "forward_gflops",
        "GFLOP/s of the forward product",
        ("layer", "dtype"),
    ),
    Question(
        "train",
        "How long does a training step take?",
        "A step of GPT-2 124M with 1024 tokens per sequence, 2 sequences on a CPU and 32 on a "
        "GPU: `train_step` of `train.py` against an iteration of nanoGPT's `train.py`, which "
        "computes in float32 on a CPU. `products` are the matrix products of the step alone: the "
        "rest of the step is what a faster program could still gain. `linear` are the products of "
        "the weights only; `products` adds those of attention, half of them because of the causal "
        "mask.",
        "tokens_per_second",
        "tokens per second",
        ("contestant", "dtype"),
    ),
    Question(
        "loss",
        "How long until the model has learned something?",
        "Wall time of whole programs, imports included, until the last validation loss of "
        "nanoGPT's example for CPUs: Shakespeare by characters, 4 layers, 128 channels, 64 "
        "tokens. nanoGPT runs the 2000 steps of its README. Our learning rates were chosen for "
        "this task, and our steps for this loss: the fewest, in fifties, that end below it.",
        "seconds",
        "seconds to validation loss 1.885",
        ("contestant",),
    ),
    Question(
        "sample",
        "How fast is text generated?",
        "GPT-2 124M with random weights, greedy, from a prompt of 16 tokens. transformers' "
        "`generate` has a KV cache; nanoGPT has none, draws at random, and makes one sample after "
        "another. The read limit is the time in which the weights alone can be read, once per "
        "decode step.",
        "tokens_per_second",
        "tokens per second, all streams",
        ("contestant", "streams", "dtype"),
    ),
    Question(
        "decode",
        "What do windows and KV heads save in decoding?",
        "One decode step of 124M-parameter models. The read limit counts the weights and the keys "
        "and values in the cache.",
        "ms",
        "ms per decode step",
        ("model", "batch", "position", "dtype"),
    ),
    Question(
        "attention",
        "What does a sliding window save in training?",
        "Attention alone, forward and backward: `full` is full causal attention, `dense` the same "
        "with the window as a mask, `sliding` that of `model_swa.py`, and on CUDA `flash` "
        "FlashAttention's kernel with a window.",
        "full_over_sliding",
        "time of full causal attention / time of sliding windows",
        ("T", "dtype"),
    ),
    Question(
        "data",
        "How fast is a corpus tokenized?",
        "GPT-2's encoding of Python sources on all cores.",
        "mb_per_second",
        "MB/s",
        ("contestant",),
    ),
    Question(
        "overhead",
        "What does a run do besides computing?",
        "Milliseconds per optimizer step of everything that is not forward and backward passes or "
        "the optimizer: the loader, the log and the loop, the data of evaluations, and "
        "checkpoints. Rare events are divided by their interval, as the config has it; GPT-2 124M "
        "has the small batch of the training benchmark. `step` includes them, but not the forward "
        "passes of evaluations.",
        "fraction",
        "fraction of the step time",
        ("config",),
    ),
    Question(
        "ladder",
        "Which change brings how much?",
        "A training step of GPT-2 124M, one change after another, each on top of those before it. "
        "What was tried and is not used is no part of the changes after it.",
        "tokens_per_second",
        "tokens per second",
        ("rung",),
    ),
]


# Plots ----------------------------------------------------------------------------------------


def bars(question, results):
    """Return (label, median, lowest, highest) of each row that has the plotted column."""
    result = []
    for row in results["rows"]:
        value = row.get(question.column)
        if value is None:
            continue
        label = ", ".join(describe_label(name, row) for name in question.labels if name in row)
        low = value["min"] if isinstance(value, dict) else value
        high = value["max"] if isinstance(value, dict) else value
        result.append((label, median(value), low, high))
    return result


def describe_label(name, row):
    """Return a value of a row as part of a bar's label."""
    if name == "streams":
        return f"{row[name]} stream{'s' if row[name] > 1 else ''}"
    return f"{name} {row[name]}" if name in ("T", "batch", "position") else str(row[name])


def is_peer(label):
    return label.startswith(("nanoGPT", "transformers", "tiktoken"))


def draw_bars(panel, question, values):
    """Draw horizontal bars with their ranges and numbers, the first one at the top."""
    labels, medians, lows, highs = zip(*values, strict=True)
    below = [m - low for m, low in zip(medians, lows, strict=True)]
    above = [high - m for m, high in zip(medians, highs, strict=True)]
    colours = [PEER if is_peer(label) else OURS for label in labels]
    places = range(len(values))
    panel.barh(places, medians, xerr=[below, above], color=colours, height=0.7, capsize=3)
    for place, value, high in zip(places, medians, highs, strict=True):
        text = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
        panel.annotate(text, (high, place), xytext=(5, 0), textcoords="offset points", va="center")
    panel.set_yticks(places, labels)
    panel.invert_yaxis()
    panel.set_xlabel(question.unit)
    panel.set_xlim(0, 1.15 * max(highs))
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save_plot(question, results, path):
    """Draw the plot of a question into a PNG file; return whether there is something to draw."""
    values = bars(question, results)
    if not values:
        return False
    from matplotlib.figure import Figure  # see tools/plot_loss.py

    height = 1 + BAR_HEIGHT * len(values)
    figure = Figure(figsize=(8, height), layout="constrained")
    panel = figure.subplots()
    draw_bars(panel, question, values)
    figure.savefig(path, dpi=110)
    return True


# Text -----------------------------------------------------------------------------------------


def goal_table(all_results):
    """Return a table of the goals that the results say something about."""
    rows = []
    for results in all_results:
        for goal in GOALS:
            if goal.applies(results):
                cells = describe_goal(goal, goal.value(results))
                rows.append([goal.name, results["machine"]["device"], *cells])
    if not rows:
        return ""
    header = ["goal", "device", "now", "floor", "aim", ""]
    return f"## The goals\n\n{markdown_table(header, rows)}\n"


def chapter(question, all_results, folder):
    """Return the chapter of a question: for each device its plot, tables and source."""
    blocks = []
    for results in all_results:
        if results["benchmark"] != question.benchmark:
            continue
        plot = result_path(folder, results).with_suffix(".png")
        if question.column and save_plot(question, results, plot):
            blocks.append(f"![{question.title}]({folder.name}/{plot.name})")
        blocks.append(markdown_rows(results["rows"]))
        blocks += [f"{note}." for note in results.get("notes", [])]
        blocks.append(describe_source(results))
    if not blocks:
        return ""
    text = textwrap.fill(question.text, 100, break_on_hyphens=False)
    parts = [f"## {question.title}", text, *(block for block in blocks if block)]
    return "\n\n".join(parts) + "\n"


def write_document(folder):
    """Write the document beside the folder of result files; return its path."""
    folder = Path(folder)
    all_results = read_all(folder)
    parts = [HEAD, goal_table(all_results)]
    parts += [chapter(question, all_results, folder) for question in QUESTIONS]
    path = folder.parent / "BENCHMARKS.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path
