"""What happens beyond the training length, and what do the known remedies bring? Loss by position.

    python -m experiments.extension --preset=cpu_long

Runs of experiments.quality, trained on sequences of T tokens, are evaluated on sequences of 4 T
tokens. Then each is trained for a tenth of its steps on such sequences, and evaluated again.

Three rows are the run of RoPE with other angles, those of experiments/angles.py, both in the
evaluation and in the further training. Learned positions end at T, so the base is measured up to
there.
"""

import sys
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F

from common.dataloader import Loader
from common.errors import run_program
from common.pretrained import load_model
from configurator import configure
from experiments import angles
from experiments.angles import LENGTHS, bytes_of_code, replaced_angles
from experiments.intervals import format_difference, format_mean
from experiments.runs import PRESETS, train_model, train_run, train_variant, variants
from experiments.study import Study, StudyConfig, complete_rows
from prepare_data import open_dataset
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table

REMEDIES = {
    "interpolation": angles.interpolated,
    "NTK-aware": angles.ntk_aware,
    "YaRN": angles.yarn,
}
LARGER_THETA = "RoPE, theta 1e5"
NAMES = ("base", "RoPE", *REMEDIES, LARGER_THETA, "RoPE + SWA", "all three")
STEPS_DIVISOR = 10  # the further training takes 1 / 10 of the steps
LINE_COLORS = (*COLORS, "#7A3500")  # of NAMES, and of a model of the reader's
PARTS = 8  # of T, each with a mean loss
SPANS = {"up to T": (0, 1), "T to 2T": (1, 2), "2T to 4T": (2, 4)}  # in multiples of T


def model_options(config, name):
    """Return the options of train.py that are a model's own; those of RoPE for a remedy."""
    if name == LARGER_THETA:
        return {"model": "model_rope", "rope_theta": 1e5}
    return variants(config.run)["RoPE" if name in REMEDIES else name]


def train_to_T(config, name, seed):
    """Train a model on sequences of T tokens unless that is done; return its run's directory."""
    if name == LARGER_THETA:
        return train_model(config, name, model_options(config, name), seed)
    return train_variant(config, "RoPE" if name in REMEDIES else name, seed)


def train_to_4T(config, name, seed):
    """Train the model further, on sequences of 4 T tokens; return that run's directory."""
    run = config.run
    steps = run["max_steps"] // STEPS_DIVISOR
    options = {
        **run,
        **model_options(config, name),
        "init_from": train_to_T(config, name, seed),
        "seed": 100 + seed,  # another data order than in the run before
        "block_size": LENGTHS * run["block_size"],
        "batch_size": max(1, run["batch_size"] // LENGTHS),
        "max_steps": steps,
        "eval_interval": steps,
        "learning_rate": run["learning_rate"] / 4,
        "muon_learning_rate": run["muon_learning_rate"] / 4,
        "warmup_steps": max(1, steps // 16),
    }
    return train_run(f"to-4T-{config.name}-{run['dataset']}-{name}-{seed}", options)


def measure_both(config, name, seed, device):
    """Return the loss by position before and after the further training.

    "after" is None for a model with learned positions, which has none beyond T.
    """
    T = config.run["block_size"]
    with ExitStack() as stack:
        if name in REMEDIES:
            arguments = {"T": T} if name == "YaRN" else {}
            stack.enter_context(replaced_angles(REMEDIES[name], **arguments))
        values = {"before": loss_by_position(config, train_to_T(config, name, seed), device)}
        values["after"] = None
        if len(values["before"]) > PARTS:
            values["after"] = loss_by_position(config, train_to_4T(config, name, seed), device)
    return values


def loss_by_position(config, out_dir, device):
    """Return a model's mean loss of each eighth of T: 8 for learned positions, else 32 up to 4 T.

    All models are measured on the same validation windows of 4 T tokens, or on the beginnings.
    """
    model, _ = load_model(out_dir)
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


# Tables and plot ------------------------------------------------------------------------------


def spans_of(values, when):
    """Return {span: mean loss of each seed}, without the spans that the model does not reach."""
    spans = {}
    for span, (start, end) in SPANS.items():
        parts = [value[when][PARTS * start : PARTS * end] for value in values if value[when]]
        if parts and parts[0]:
            spans[span] = [float(np.mean(part)) for part in parts]
    return spans


def losses(result):
    """Return a table of the mean loss up to and beyond T, before and after the further training."""
    rows = []
    for name, values in complete_rows(result, NAMES).items():
        row = [name]
        for when in ("before", "after"):
            spans = spans_of(values, when)
            row += [format_mean(spans[span], 3) if span in spans else "ends" for span in SPANS]
        row.append(code_size(name))
        rows.append(row)
    header = ["", *SPANS, *(f"{span}, trained further" for span in SPANS), "bytes of code"]
    return markdown_table(header, rows)


def code_size(name):
    """Return the bytes of the function that gives the angles; "" if that is an option of ours."""
    if name == "RoPE":
        return bytes_of_code(angles.PLAIN)
    return bytes_of_code(REMEDIES[name]) if name in REMEDIES else ""


def differences(result):
    """Return a table of the paired differences from plain RoPE, before and after."""
    measured = complete_rows(result, NAMES)
    rope = measured.get("RoPE")
    rows = []
    for name, values in measured.items():
        if rope is not None and name not in ("base", "RoPE"):
            row = [name]
            for when in ("before", "after"):
                own, of_rope = spans_of(values, when), spans_of(rope, when)
                row += [format_difference(own[span], of_rope[span], 3) for span in SPANS]
            rows.append(row)
    header = ["minus RoPE", *SPANS, *(f"{span}, trained further" for span in SPANS)]
    return markdown_table(header, rows)


def draw(result, before, after):
    """Plot the loss over the position before and after the further training: means of the seeds."""
    T = result["config"]["run"]["block_size"]
    measured = complete_rows(result, NAMES)
    for panel, when in ((before, "before"), (after, "after")):
        ends = []
        for name, color in zip(NAMES, LINE_COLORS, strict=False):
            values = [value[when] for value in measured.get(name, []) if value[when]]
            if values:
                y = np.mean(values, axis=0)
                x = (np.arange(len(y)) + 0.5) * T / PARTS
                ends.append(draw_line(panel, name, x, y, color, markersize=3))
        label_points(panel, *ends)
        panel.axvline(T, color="gray", linewidth=0.8, linestyle=":")
        panel.set_xlim(0, 5.4 * T)  # room for the labels
        panel.set_xticks([0, T, 2 * T, 3 * T, 4 * T])
        panel.set_xlabel("position (tokens)")
    before.set_title(f"trained on the first {T} positions", fontsize="medium")
    after.set_title(f"then trained further, on {LENGTHS * T}", fontsize="medium")
    before.set_ylabel("validation loss (nats per token)")


def main(argv):
    study = Study("extension", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(NAMES, measure_both, study.device)
    study.run(losses, differences, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
