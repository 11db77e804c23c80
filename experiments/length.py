"""What happens beyond the training length? Loss by position, in sequences up to four times as long.

    python -m experiments.length --preset=cpu

The runs are those of experiments.table, trained on sequences of T tokens. Learned positions end at
T, so the base is measured up to there.
"""

import sys
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F

from common.dataloader import Loader
from common.errors import program
from common.pretrained import load_model
from configurator import configure
from experiments.runs import PRESETS, train_variant
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    label_points,
    points_of_seeds,
)
from prepare_data import open_dataset
from tools.bench.results import markdown_table

NAMES = ("base", "RoPE", "RoPE + SWA", "all three")
LINE_COLOURS = (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5])
PARTS = 8  # of T, each with a mean loss


@torch.inference_mode()
def measure_loss_by_position(config, name, seed, device):
    """Return the mean loss of each eighth of T: 8 up to T for learned positions, else 32 up to 4 T.

    All models are measured on the same validation windows of 4 T tokens, or on the beginnings.
    """
    model, _ = load_model(train_variant(config, name, seed))
    model.to(device).eval()
    T = config.run["block_size"]
    length = T if "wpe" in model.transformer else 4 * T
    folder, _ = open_dataset(config.run["dataset"])
    loader = Loader(folder, 4 * T, model.config.vocab_size, seed=0)
    total = torch.zeros(length, dtype=torch.float64)
    count = torch.zeros(length)
    for x, y in loader.val_batches(config.run["eval_tokens"], batch_size=4):
        x = x[:, :length].to(device)
        y = y[:, :length].to(device)
        logits = model(x).transpose(1, 2)  # (B, V, length)
        losses = F.cross_entropy(logits, y, ignore_index=-1, reduction="none")  # (B, length)
        total += losses.sum(0).cpu()
        count += (y != -1).sum(0).cpu()
    by_part = (total / count).unflatten(0, (-1, T // PARTS))  # (number of parts, T / 8)
    return by_part.mean(1).tolist()


def mean_of_spans(parts):
    """Return the mean loss up to T, from T to 2 T, and from 2 T to 4 T; None if a span is empty."""
    spans = [parts[:PARTS], parts[PARTS : 2 * PARTS], parts[2 * PARTS :]]
    return [float(np.mean(span)) if span else None for span in spans]


def losses(state):
    """Return a table of the mean loss up to and beyond the training length, over the seeds."""
    rows = []
    for name in NAMES:
        of_seeds = [mean_of_spans(parts) for parts in points_of_seeds(state, name)]
        cells = [format_span(span) for span in zip(*of_seeds, strict=True)]
        rows.append([name, *cells])
    return markdown_table(["", "up to T", "T to 2T", "2T to 4T"], rows)


def format_span(span):
    """Return the mean and the range of the losses of the seeds as text."""
    if None in span:
        return "ends"
    return f"{mean(span):.3f} ({min(span):.3f} to {max(span):.3f})"


def draw(state, panel):
    """Plot the loss over the position, a line for each model: the mean of the seeds."""
    T = state["config"]["run"]["block_size"]
    ends = []
    for name, colour in zip(NAMES, LINE_COLOURS, strict=True):
        y = np.mean(points_of_seeds(state, name), axis=0)
        x = (np.arange(len(y)) + 0.5) * T / PARTS
        panel.plot(x, y, color=colour, marker="o", markersize=3)
        ends.append((name, x[-1], y[-1], colour))
    label_points(panel, *ends)
    panel.axvline(T, color="grey", linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 4.7 * T)
    panel.set_xticks([0, T, 2 * T, 3 * T, 4 * T])
    panel.set_xlabel(f"position (tokens); trained on the first {T}")
    panel.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("length", configure(StudyConfig, argv, __doc__), PRESETS)
    for name in NAMES:
        for seed in study.config.seeds:
            arguments = (study.config, name, seed, study.device)
            study.measure_once(f"{name}, seed {seed}", measure_loss_by_position, *arguments)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
