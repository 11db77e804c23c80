"""What does each change cost and bring? model.py and its variants side by side.

    python -m experiments.table --preset=cpu

Quality: small models trained on the same tokens in the same order, with several seeds. Size and
speed: at the shape of GPT-2 124M; the models take turns in training steps and in decoding.
"""

import math
import sys
from statistics import mean

import torch

from common.errors import program
from configurator import configure
from experiments.runs import PRESETS, train_variant, variants
from experiments.steps import (
    build_model,
    make_decoding_step,
    make_training_step,
    measure_step_memory,
)
from experiments.study import (
    COLOURS,
    Study,
    StudyConfig,
    label_points,
    points_of_seeds,
)
from prepare_data import open_dataset
from tools.bench.results import markdown_table
from tools.bench.turns import run_in_new_process, take_turns
from tools.plot_loss import read_log

# Measurements ---------------------------------------------------------------------------------


def measure_quality(config, name, seed):
    """Train a variant; return its last validation loss, in bits per byte too, and the tokens."""
    record = read_log(train_variant(config, name, seed))[-1]
    _, meta = open_dataset(config.run["dataset"])
    val = meta.get("val", {})
    bits_per_byte = None  # a dataset may not say how many bytes it was made from
    if "bytes" in val:
        bits_per_token = record["val_loss"] / math.log(2)
        bits_per_byte = bits_per_token * val["tokens"] / val["bytes"]
    return {
        "val_loss": record["val_loss"],
        "bits_per_byte": bits_per_byte,
        "tokens": record["tokens"],
    }


def compute_size(shape, T):
    """Return parameters, FLOPs per token of training on T tokens, and bytes of float32 KV cache."""
    with torch.device("meta"):
        model = build_model(shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": model.flops_per_token(T),
        "cache_bytes_per_token": model.make_cache(1, 1).nbytes,
        "cache_bytes_32k": model.make_cache(1, 32 * 1024).nbytes,
    }


def measure_speed(config, device, dtype):
    """Return {name: tokens per second of training, and of decoding at position T - 1}."""
    B, T = config.batch_size, config.shape["block_size"]
    shapes = {name: config.shape | options for name, options in variants(config.shape).items()}
    training_steps = {}
    for name, shape in shapes.items():
        training_steps[name] = make_training_step(shape, B, T, device, dtype)
    training = take_turns(config.rounds, device, training_steps)
    del training_steps  # frees the models and their optimizer states
    decoding_steps = {}
    for name, shape in shapes.items():
        decoding_steps[name], _ = make_decoding_step(shape, T - 1, device, dtype)
    decoding = take_turns(10 * config.rounds, device, decoding_steps)
    return {
        name: {"training": B * T / training[name], "decoding": 1 / decoding[name]}
        for name in shapes
    }


# Tables and plot ------------------------------------------------------------------------------


def sizes(state):
    """Return a table of the size and speed of each variant; (1.00x) is the speed of the base."""
    points = state["points"]
    base = points["speed"]["base"]
    rows = []
    for name, speed in points["speed"].items():
        size = points[f"{name}, size"]
        memory = points[f"{name}, memory"]
        training, decoding = speed["training"], speed["decoding"]
        rows.append(
            [
                name,
                f"{size['parameters']:,}",
                f"{size['flops_per_token'] / 1e6:.0f}",
                f"{training:.0f} ({training / base['training']:.2f}x)",
                f"{decoding:.1f} ({decoding / base['decoding']:.2f}x)",
                f"{memory:.2f}",
                f"{size['cache_bytes_per_token']:,}",
                f"{size['cache_bytes_32k'] / 1e6:.1f}",
            ]
        )
    header = [
        "",
        "parameters",
        "MFLOPs / token",
        "training tok/s",
        "decoding tok/s",
        "training GB",
        "cache bytes / token",
        "cache of 32k, MB",
    ]
    return markdown_table(header, rows)


def losses(state):
    """Return a table of the validation loss and bits per byte of each variant, over the seeds."""
    base_losses = [point["val_loss"] for point in points_of_seeds(state, "base")]
    rows = []
    for name in variants(state["config"]["run"]):
        points = points_of_seeds(state, name)
        val_losses = [point["val_loss"] for point in points]
        rows.append(
            [
                name,
                f"{mean(val_losses):.4f}",
                f"{min(val_losses):.4f} to {max(val_losses):.4f}",
                format_bits_per_byte(points),
                "" if name == "base" else compare_losses(val_losses, base_losses),
            ]
        )
    header = ["", "validation loss", "of the seeds", "bits per byte", "against the base"]
    return markdown_table(header, rows)


def format_bits_per_byte(points):
    bits = [point["bits_per_byte"] for point in points if point["bits_per_byte"] is not None]
    return f"{mean(bits):.3f}" if bits else ""


def compare_losses(val_losses, base_losses):
    """Return the difference of the means as text, if it exceeds both ranges over the seeds."""
    difference = mean(val_losses) - mean(base_losses)
    own_range = max(val_losses) - min(val_losses)
    base_range = max(base_losses) - min(base_losses)
    if abs(difference) <= max(own_range, base_range):
        return "no difference shown"
    return f"{difference:+.4f}"


def draw(state, panel):
    """Plot validation loss over KV cache size: the mean and the range of each variant's seeds."""
    for name, colour in zip(variants(state["config"]["run"]), COLOURS, strict=True):
        val_losses = [point["val_loss"] for point in points_of_seeds(state, name)]
        x = state["points"][f"{name}, size"]["cache_bytes_32k"] / 1e6
        y = mean(val_losses)
        below, above = y - min(val_losses), max(val_losses) - y
        panel.errorbar(x, y, yerr=[[below], [above]], fmt="o", capsize=4, color=colour)
        label_points(panel, (name, x, y, colour), offset=(6, 4))
    panel.set_xscale("log")
    panel.set_xlim(right=4000)
    panel.set_xlabel("KV cache of 32k tokens at the shape of GPT-2 124M, float32 (MB)")
    panel.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("table", configure(StudyConfig, argv, __doc__), PRESETS)
    config, device, dtype = study.config, study.device, study.dtype
    B, T = config.batch_size, config.shape["block_size"]
    for seed in config.seeds:
        for name in variants(config.run):
            study.measure_once(f"{name}, seed {seed}", measure_quality, config, name, seed)
    for name, options in variants(config.shape).items():
        shape = config.shape | options
        study.measure_once(f"{name}, size", compute_size, shape, T)
        arguments = (measure_step_memory, shape, B, T, device, dtype)
        study.measure_once(f"{name}, memory", run_in_new_process, *arguments)
    study.measure_once("speed", measure_speed, config, device, dtype)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
