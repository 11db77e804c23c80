"""What does each change cost and buy? model.py and its variants side by side.

    python -m experiments.table --preset=cpu

Quality: small models trained on the same data, in the same order, for as many tokens, with several seeds. Size and
speed: at the shape of GPT-2 124M, training steps and decoding taking turns.
"""

import math
import sys
from statistics import mean

import torch

from common.errors import program
from configurator import configure
from experiments.runs import PRESETS, run_of, variants
from experiments.steps import build, decoding_step, in_new_process, step_memory, training_step
from experiments.study import COLOURS, Study, StudyConfig, label, markdown, seeds_of
from prepare_data import open_dataset
from tools.bench import take_turns
from tools.plot_loss import read_log


def quality(config, name, seed):
    record = read_log(run_of(config, name, seed))[-1]
    val = open_dataset(config.run["dataset"])[1].get("val", {})
    bits = (
        record["val_loss"] / math.log(2) * val["tokens"] / val["bytes"] if "bytes" in val else None
    )
    return {"val_loss": record["val_loss"], "bits_per_byte": bits, "tokens": record["tokens"]}


def size(shape, T):
    with torch.device("meta"):
        model = build(shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": model.flops_per_token(T),
        "cache_bytes_per_token": model.make_cache(1, 1).nbytes,
        "cache_bytes_32k": model.make_cache(1, 32 * 1024).nbytes,
    }


def speed(config, device, dtype):
    """Tokens per second of training and of decoding at position T - 1, by name: the models take turns."""
    T = config.shape["block_size"]
    shapes = {name: config.shape | variant for name, variant in variants(**config.shape).items()}
    steps = {
        name: training_step(shape, config.batch_size, T, device, dtype)
        for name, shape in shapes.items()
    }
    training = take_turns(config.rounds, device, steps)
    steps = {name: decoding_step(shape, T - 1, device, dtype)[0] for name, shape in shapes.items()}
    decoding = take_turns(10 * config.rounds, device, steps)
    return {
        name: {"training": config.batch_size * T / training[name], "decoding": 1 / decoding[name]}
        for name in shapes
    }


def sizes(state):
    """Markdown: size and speed of each variant, with its speed as a multiple of the base's."""
    points, rows = state["points"], []
    base = points["speed"]["base"]
    for name, speed in points["speed"].items():
        size, faster = points[f"{name}, size"], {key: speed[key] / base[key] for key in speed}
        row = [name, f"{size['parameters']:,}", f"{size['flops_per_token'] / 1e6:.0f}"]
        row += [
            f"{speed[key]:.{digits}f} ({faster[key]:.2f}x)"
            for key, digits in (("training", 0), ("decoding", 1))
        ]
        row += [f"{points[f'{name}, memory']:.2f}", f"{size['cache_bytes_per_token']:,}"]
        rows.append([*row, f"{size['cache_bytes_32k'] / 1e6:.1f}"])
    header = ["", "parameters", "MFLOPs / token", "training tok/s", "decoding tok/s", "training GB"]
    return markdown([*header, "cache bytes / token", "cache of 32k, MB"], rows)


def verdict(losses, base):
    """How a variant's losses compare with the base's: their means, where they differ by more than either's spread."""
    difference, spread = mean(losses) - mean(base), max(max(x) - min(x) for x in (losses, base))
    return "no difference shown" if abs(difference) <= spread else f"{difference:+.4f}"


def losses(state):
    """Markdown: validation loss and bits per byte of each variant, means over the seeds."""
    rows = []
    base = [point["val_loss"] for point in seeds_of(state, "base")]
    for name in variants(**state["config"]["run"]):
        points = seeds_of(state, name)
        own = [point["val_loss"] for point in points]
        bits = [p["bits_per_byte"] for p in points if p["bits_per_byte"] is not None]
        row = [name, f"{mean(own):.4f}", f"{min(own):.4f} to {max(own):.4f}"]
        rows.append(
            [
                *row,
                f"{mean(bits):.3f}" if bits else "",
                "" if name == "base" else verdict(own, base),
            ]
        )
    return markdown(
        ["", "validation loss", "of the seeds", "bits per byte", "against the base"], rows
    )


def draw(state, panel):
    """Validation loss over what decoding has to read: a point for each variant, a whisker for its seeds."""
    for name, colour in zip(variants(**state["config"]["run"]), COLOURS, strict=True):
        own = [point["val_loss"] for point in seeds_of(state, name)]
        x, middle = state["points"][f"{name}, size"]["cache_bytes_32k"] / 1e6, mean(own)
        panel.errorbar(
            x, middle, [[middle - min(own)], [max(own) - middle]], fmt="o", capsize=4, color=colour
        )
        label(panel, (name, x, middle, colour), offset=(6, 4))
    panel.set_xscale("log")
    panel.set_xlim(right=4000)
    panel.set_xlabel("key-value cache of 32k tokens at the shape of GPT-2 124M, float32 (MB)")
    panel.set_ylabel("validation loss (nats per token)")


@program
def main(argv):
    study = Study("table", configure(StudyConfig, argv, __doc__), PRESETS)
    config, device, dtype, T = (
        study.config,
        study.device,
        study.dtype,
        study.config.shape["block_size"],
    )
    for seed in config.seeds:
        for name in variants(**config.run):
            study.point(f"{name}, seed {seed}", quality, config, name, seed)
    for name, variant in variants(**config.shape).items():
        shape = config.shape | variant
        study.point(f"{name}, size", size, shape, T)
        study.point(
            f"{name}, memory",
            in_new_process,
            step_memory,
            shape,
            config.batch_size,
            T,
            device,
            dtype,
        )
    study.point("speed", speed, config, device, dtype)
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
