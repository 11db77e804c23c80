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
    make_decoding_step,
    make_training_step,
    measure_step_memory,
)
from experiments.study import Study, StudyConfig
from tools.bench.results import markdown_table
from tools.bench.turns import run_in_new_process, take_turns

# Not all variants: 2 GB of weights and optimizer state each are in memory at the same time.
NAMES = ("base", "RoPE", "GQA 1/2", "GQA 1/4", "MQA", "SWA 1/4", "SWA 1/16", "all three")
DECODING = ("base", "GQA 1/2", "GQA 1/4", "MQA", "SWA 1/4", "all three")

# Measurements ---------------------------------------------------------------------------------


def compute_size(shape, T):
    """Return parameters, FLOPs per token of training on T tokens, and bytes of float32 KV cache."""
    with torch.device("meta"):
        model = build_model(shape)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_token": flops_per_token(model, T),
        "cache_bytes_per_token": cache_bytes(shape, 1),
        "cache_bytes_32k": cache_bytes(shape, 32 * 1024),
    }


def measure_speed(config, device, dtype):
    """Return {name: tokens per second of training, and of decoding at position T - 1}."""
    B, T = config.batch_size, config.shape["block_size"]
    shapes = {name: config.shape | variants(config.shape)[name] for name in NAMES}
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


def measure_decoding(config, B, position, device, dtype):
    """Return {name: seconds of a decode step of B samples at a position} for DECODING."""
    steps = {}
    for name in DECODING:
        shape = config.shape | variants(config.shape)[name]
        steps[name], _ = make_decoding_step(shape, position, device, dtype, B)
    return take_turns(10 * config.rounds, device, steps)


# Tables ------------------------------------------------------------------------------


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


def decoding(state):
    """Return a table of the time of a decode step, over the number of samples and the position."""
    points = state["points"]
    rows = []
    for name in DECODING:
        cells = []
        for B, position in decoding_sizes(state["config"]["shape"]):
            seconds = points[f"decoding, {B} at {position}"]
            cells.append(f"{1000 * seconds[name]:.1f} ({seconds['base'] / seconds[name]:.2f}x)")
        rows.append([name, *cells])
    sizes = decoding_sizes(state["config"]["shape"])
    return markdown_table(["ms", *(f"{B} at {position}" for B, position in sizes)], rows)


def decoding_sizes(shape):
    """Return (samples, position) pairs."""
    T = shape["block_size"]
    return [(1, T // 4 - 1), (1, T - 1), (8, T // 4 - 1), (8, T - 1)]


def main(argv):
    study = Study("costs", configure(StudyConfig, argv, __doc__), PRESETS)
    config, device, dtype = study.config, study.device, study.dtype
    B, T = config.batch_size, config.shape["block_size"]
    for name in NAMES:
        shape = config.shape | variants(config.shape)[name]
        study.measure_once(f"{name}, size", compute_size, shape, T)
        arguments = (measure_step_memory, shape, B, T, device, dtype)
        study.measure_once(f"{name}, memory", run_in_new_process, *arguments)
    study.measure_once("speed", measure_speed, config, device, dtype)
    for B, position in decoding_sizes(config.shape):
        arguments = (config, B, position, device, dtype)
        study.measure_once(f"decoding, {B} at {position}", measure_decoding, *arguments)
    study.finish()


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
