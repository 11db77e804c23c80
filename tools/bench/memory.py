"""Memory: the peak GPU memory of a training step, by config, batch and kind of run.

A step has two micro-steps in bfloat16, and is taken in a process of its own, because a process's
peak never falls. The peak includes compilation. DDP and FSDP have one rank: nothing is sharded, and
the difference from one process is what DDP and FSDP need themselves.
"""

import os
import socket
from dataclasses import dataclass

import train
from common.device import is_out_of_memory, peak_memory
from common.models import ROOT
from tools.bench.runs import open_run, take_step
from tools.results.turns import run_in_new_process
from training.start import read_options

MICRO_STEPS = 2
STEPS = 2  # the second one has the optimizer's state from its beginning


@dataclass
class Case:
    """A training step: files of config/, with a batch, a sequence length and a mode."""

    configs: str  # such as "gpt2 small_gpu", as on a command line
    batch_size: int | None  # None: the configs' own
    block_size: int
    mode: str = "one process"  # or not compiled (also one process), DDP, FSDP


def memory_cases(sizes):
    """Return the cases, the most asked for first."""
    B, T = sizes.batch_size, sizes.config().block_size
    batches = [("gpt2", None), ("gpt2", B), ("gpt2 large_gpu", None)]
    small = [("gpt2 small_gpu", None), ("gpt2_medium small_gpu", None)]
    variants = ("gpt2_rope", "gpt2_gqa", "gpt2_swa", "gpt2_rope_gqa_swa")
    long_B, long_T = max(1, B // 8), 8 * T
    return [
        *[Case(configs, batch_size, T) for configs, batch_size in batches + small],
        *[Case("gpt2", B, T, mode) for mode in ("DDP", "FSDP")],
        *[Case(configs, batch_size, T, "not compiled") for configs, batch_size in batches],
        *[Case(name, B, T) for name in variants],
        *[Case(name, long_B, long_T) for name in ("gpt2", "gpt2_swa")],
    ]


def case_options(case, bench):
    """Return the model options and train.py's options of a case."""
    paths = [str(ROOT / "config" / f"{name}.py") for name in case.configs.split()]
    config, model_options, _ = read_options(train.TrainConfig, paths, doc="")
    if bench.sizes.is_tiny:
        model_options |= bench.sizes.model
    batch_size = case.batch_size or config.batch_size
    options = {
        "model": config.model,
        "batch_size": batch_size,
        "total_batch_size": MICRO_STEPS * batch_size * case.block_size,
        "activation_checkpointing": config.activation_checkpointing,
        "device": str(bench.device),
        "dtype": "bfloat16",
        "compile": case.mode != "not compiled",
        "fsdp": case.mode == "FSDP",
    }
    return model_options | {"block_size": case.block_size}, options


def join_group_of_one():
    """Set the environment variables by which torchrun starts the only rank of a process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def step_memory(model_options, options, launched):
    """Return the peak memory of training steps in GB. Must run in a process of its own."""
    if launched:
        join_group_of_one()
    with open_run(model_options, **options) as run:
        for _ in range(STEPS):
            take_step(run)
        return peak_memory(run.device)


def measure_memory(bench):
    """Return one row per case."""
    rows = []
    for case in memory_cases(bench.sizes):
        model_options, options = case_options(case, bench)
        batch_size = options["batch_size"]
        title = f"{case.configs}, {case.mode}, {batch_size} x {case.block_size} tokens"
        if rows and bench.left() <= 0:
            bench.note(f"{title}: not measured, no time was left")
            continue
        launched = case.mode in ("DDP", "FSDP")
        try:
            gb = run_in_new_process(step_memory, model_options, options, launched)
        except Exception as error:  # its type depends on what ran out
            if not is_out_of_memory(error):
                raise
            bench.note(f"{title}: out of memory")
            continue
        row = {"config": case.configs, "mode": case.mode, "batch": batch_size}
        rows.append(bench.show(row | {"T": case.block_size, "peak_gb": gb}))
    return rows
