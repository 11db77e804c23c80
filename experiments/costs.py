"""What does each change cost or save in size, compute, memory and speed?

    python -m experiments.costs --preset=cpu

At the shape of GPT-2 124M. The models take turns in training steps and in decoding.
"""

import sys

import torch

from common.errors import run_program
from common.flops import flops_per_token
from configurator import configure
from experiments.runs import PRESETS, variants
from experiments.steps import (
    build_model,
    cache_bytes,
    measure_step_memory,
    time_decoding,
    time_steps,
)
from experiments.study import Study, StudyConfig
from tools.results.table import markdown_table
from tools.results.turns import run_in_new_process

# Not all variants: 2 GB of weights and optimizer state each are in memory at the same time.
NAMES = ("base", "RoPE", "GQA 1/2", "GQA 1/4", "MQA", "SWA 1/4", "SWA 1/16", "all three")
DECODING = ("base", "GQA 1/2", "GQA 1/4", "MQA", "SWA 1/4", "all three")

# Measurements ---------------------------------------------------------------------------------


def shapes_of(config, names):
    """Return {name: shape} of some variants."""
    options = variants(config.shape)
    return {name: config.shape | options[name] for name in names}


def compute_size(shape):
    """Return parameters, FLOPs per token of training, and bytes of float32 KV cache."""
    with torch.device("meta"):
        model = build_model(shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops_per_token(model, shape["block_size"]),
        "cache_bytes_per_token": cache_bytes(shape, 1),
        "cache_bytes_32k": cache_bytes(shape, 32 * 1024),
    }


def measure_speed(config, device, dtype):
    """Return {name: tokens per second of training, and of decoding at position T - 1}."""
    B, T = config.batch_size, config.shape["block_size"]
    shapes = shapes_of(config, NAMES)
    training = time_steps(shapes, B, config.rounds, device, dtype)
    decoding, _ = time_decoding(shapes, 1, T - 1, 10 * config.rounds, device, dtype)
    return {
        name: {"training": B * T / training[name], "decoding": 1 / decoding[name]} for name in NAMES
    }


def measure_decoding(config, B, position, device, dtype):
    """Return {name: seconds of a decode step of B samples at a position} for DECODING."""
    shapes = shapes_of(config, DECODING)
    seconds, _ = time_decoding(shapes, B, position, 10 * config.rounds, device, dtype)
    return seconds


# Tables ------------------------------------------------------------------------------


def sizes(result):
    """Return a table of the size and speed of each variant; (1.00x) is the speed of the base."""
    values = result["values"]
    speed = values.get("speed", {})
    rows = []
    for name in NAMES:
        if f"{name}, memory" not in values:
            continue
        size = values[f"{name}, size"]
        row = [name, f"{size['parameters']:,}", f"{size['flops_per_token'] / 1e6:.0f}"]
        for what, digits in (("training", 0), ("decoding", 1)):
            row.append(describe_speed(speed, name, what, digits))
        row.append(f"{values[f'{name}, memory']:.2f}")
        row.append(f"{size['cache_bytes_per_token']:,}")
        row.append(f"{size['cache_bytes_32k'] / 1e6:.1f}")
        rows.append(row)
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


def describe_speed(speed, name, what, digits):
    """Return tokens per second and their factor over the base's; "" if they are not measured."""
    if not speed:
        return ""
    tokens_per_second = speed[name][what]
    factor = tokens_per_second / speed["base"][what]
    return f"{tokens_per_second:.{digits}f} ({factor:.2f}x)"


def decoding(result):
    """Return a table of the time of a decode step, over the number of samples and the position."""
    sizes = decoding_sizes(result["config"]["shape"])
    measured = [result["values"].get(decoding_key(*size)) for size in sizes]
    rows = []
    for name in DECODING:
        row = [name]
        for seconds in measured:
            if seconds is not None:
                factor = seconds["base"] / seconds[name]
                row.append(f"{1000 * seconds[name]:.1f} ({factor:.2f}x)")
        rows.append(row)
    return markdown_table(["ms", *(f"{B} at {position}" for B, position in sizes)], rows)


def decoding_sizes(shape):
    """Return (samples, position) pairs."""
    T = shape["block_size"]
    return [(1, T // 4 - 1), (1, T - 1), (8, T // 4 - 1), (8, T - 1)]


def decoding_key(B, position):
    return f"decoding, {B} at {position}"


def main(argv):
    study = Study("costs", configure(StudyConfig, argv, __doc__), PRESETS)
    config, device, dtype = study.config, study.device, study.dtype
    for name, shape in shapes_of(config, NAMES).items():
        study.add(name, f"{name}, size", compute_size, shape)
        memory = (measure_step_memory, shape, config.batch_size, device, dtype)
        study.add(name, f"{name}, memory", run_in_new_process, *memory)
    study.add("speed", "speed", measure_speed, config, device, dtype)
    for size in decoding_sizes(config.shape):
        arguments = (measure_decoding, config, *size, device, dtype)
        study.add("decoding", decoding_key(*size), *arguments)
    study.run(sizes, decoding)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
