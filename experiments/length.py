"""What happens beyond the training length? Loss by position in sequences up to four times as long.

    python -m experiments.length --preset=cpu

The runs are experiments.table's, trained on T tokens. Learned positions end at T, so that the base is measured there.
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
from experiments.runs import PRESETS, run_of
from experiments.study import COLOURS, Study, StudyConfig, label, markdown, seeds_of
from prepare_data import open_dataset

NAMES = ("base", "RoPE", "RoPE + SWA", "all three")
PARTS = 8  # of T, each with a mean loss


@torch.inference_mode()
def loss_by_position(config, name, seed, device):
    """Mean loss of each eighth of T, T long for learned positions, else 4 T, over validation windows of 4 T."""
    model = load_model(run_of(config, name, seed))[0].to(device).eval()
    T = config.run["block_size"]
    length = T if "wpe" in model.transformer else 4 * T
    loader = Loader(open_dataset(config.run["dataset"])[0], 4 * T, model.config.vocab_size, 0)
    total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length)
    for x, y in loader.val_batches(config.run["eval_tokens"], 4):
        x, y = (
            x[:, :length].to(device),
            y[:, :length].to(device),
        )  # all models see the beginnings of the same windows
        losses = F.cross_entropy(
            model(x).transpose(1, 2), y, ignore_index=-1, reduction="none"
        )  # (B, length)
        total += losses.sum(0).cpu()
        count += (y != -1).sum(0).cpu()
    return (total / count).unflatten(0, (-1, T // PARTS)).mean(1).tolist()


def spans(losses):
    """Mean loss up to T, from T to 2 T, from 2 T to 4 T; None where there is none."""
    cuts = losses[:PARTS], losses[PARTS : 2 * PARTS], losses[2 * PARTS :]
    return [float(np.mean(cut)) if cut else None for cut in cuts]


def losses(state):
    """Markdown: mean loss inside and beyond the training length, and its range over the seeds."""
    rows = []
    for name in NAMES:
        means = [spans(losses) for losses in seeds_of(state, name)]
        cells = [[m[i] for m in means if m[i] is not None] for i in range(3)]
        rows.append(
            [
                name,
                *(f"{mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" if c else "ends" for c in cells),
            ]
        )
    return markdown(["", "up to T", "T to 2T", "2T to 4T"], rows)


def draw(state, panel):
    T, ends = state["config"]["run"]["block_size"], []
    for name, colour in zip(NAMES, (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5]), strict=True):
        losses = np.mean(seeds_of(state, name), axis=0)
        x = (np.arange(len(losses)) + 0.5) * T / PARTS
        panel.plot(x, losses, color=colour, marker="o", markersize=3)
        ends.append((name, x[-1], losses[-1], colour))
    label(panel, *ends)
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
            study.point(
                f"{name}, seed {seed}", loss_by_position, study.config, name, seed, study.device
            )
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
