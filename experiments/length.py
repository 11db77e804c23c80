"""What happens beyond the training length? Loss by position, in sequences up to four times as long.

    python -m experiments.length --preset=cpu

The base, RoPE, RoPE + SWA and all three are the runs of experiments.quality, trained on sequences
of T tokens. RoPE is trained with other values of rope_theta, too. Learned positions end at T, so
the base is measured up to there.

`RoPE, rescaled` is RoPE with another rope_theta at evaluation: theta * 4^(D / (D - 2)), which makes
the longest period four times as long and leaves the shortest as it is ("NTK-aware" scaling, see
"YaRN", Peng et al. 2023, section 3.1).
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

from common.dataloader import Loader
from common.errors import run_program
from common.pretrained import load_model
from configurator import configure
from experiments.intervals import format_difference, format_mean, verdict
from experiments.runs import PRESETS, train_model, train_variant
from experiments.study import Study, StudyConfig, complete_rows
from prepare_data import open_dataset
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table

NAMES = (
    "base",
    "RoPE",
    "RoPE, rescaled",
    "RoPE, theta 1e3",
    "RoPE, theta 1e5",
    "RoPE + SWA",
    "all three",
)
LENGTHS = 4  # the evaluation's sequence length over T
PARTS = 8  # of T, each with a mean loss


def load_trained(config, name, seed):
    """Train a model of NAMES unless that is done; return it."""
    if name.startswith("RoPE, theta "):
        theta = float(name.removeprefix("RoPE, theta "))
        options = {"model": "model_rope", "rope_theta": theta}
        out_dir = train_model(config, name, options, seed)
    else:
        out_dir = train_variant(config, name.removesuffix(", rescaled"), seed)
    model, _ = load_model(out_dir)
    if name.endswith(", rescaled"):
        D = model.config.n_embd // model.config.n_head
        model.config.rope_theta *= LENGTHS ** (D / (D - 2))  # the angles are computed from it
    return model


def measure_loss_by_position(config, name, seed, device):
    """Return the mean loss of each eighth of T: 8 up to T for learned positions, else 32 up to 4 T.

    All models are measured on the same validation windows of 4 T tokens, or on the beginnings.
    """
    model = load_trained(config, name, seed)
    model.to(device).eval()
    T = config.run["block_size"]
    length = T if "wpe" in model.transformer else LENGTHS * T
    folder, _ = open_dataset(config.run["dataset"])
    loader = Loader(folder, LENGTHS * T, model.config.vocab_size, seed=0)
    total = torch.zeros(length, dtype=torch.float64)
    count = torch.zeros(length)
    for x, y in loader.val_batches(config.run["eval_tokens"], batch_size=4):
        x = x[:, :length].to(device)
        y = y[:, :length].to(device)
        with torch.inference_mode():
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


def losses(result):
    """Return a table of the mean loss up to and beyond the training length, over the seeds."""
    rows = []
    for name, values in complete_rows(result, NAMES).items():
        cells = []
        for span in zip(*map(mean_of_spans, values), strict=True):
            cells.append("ends" if None in span else format_mean(span, digits=3))
        rows.append([name, *cells])
    return markdown_table(["", "up to T", "T to 2T", "2T to 4T"], rows)


def within_training_length(result):
    """Return a table of the paired differences from RoPE up to T: what the other angles cost."""
    losses_up_to_T = {
        name: [mean_of_spans(parts)[0] for parts in values]
        for name, values in complete_rows(result, NAMES).items()
    }
    rope = losses_up_to_T.get("RoPE")
    rows = []
    for name in ("RoPE, rescaled", "RoPE, theta 1e3", "RoPE, theta 1e5"):
        if name in losses_up_to_T:
            values = losses_up_to_T[name]
            rows.append([name, format_difference(values, rope, 3), verdict(values, rope, 3)])
    return markdown_table(["up to T", "difference from RoPE", "verdict"], rows)


def draw(result, panel):
    """Plot the loss over the position, a line for each model: the mean of the seeds."""
    T = result["config"]["run"]["block_size"]
    ends = []
    for (name, values), color in zip(complete_rows(result, NAMES).items(), COLORS, strict=False):
        y = np.mean(values, axis=0)
        x = (np.arange(len(y)) + 0.5) * T / PARTS
        ends.append(draw_line(panel, name, x, y, color, markersize=3))
    label_points(panel, *ends)
    panel.axvline(T, color="gray", linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 4.7 * T)
    panel.set_xticks([0, T, 2 * T, 3 * T, 4 * T])
    panel.set_xlabel(f"position (tokens); trained on the first {T}")
    panel.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("length", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(NAMES, measure_loss_by_position, study.device)
    study.run(losses, within_training_length, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
