"""The ladder: one thing at a time, from nanoGPT's settings to ours, on the reader's machine.

Each rung is a training step of GPT-2 124M with the settings of the rungs above it and one more. A
rung is measured in a process of its own, because some settings last as long as a process.
"""

import functools
import statistics
import time
from dataclasses import dataclass

import torch

from common.device import keep_freed_memory
from common.models import model_module
from common.optimizer import make_optimizer
from tools.bench.limits import matmul_rates, products_flops, workload
from tools.bench.turns import Budget, milliseconds, run_in_new_process, synchronize, time_turns
from train import TrainConfig


@dataclass
class Settings:
    """What the rungs change; the defaults are those of nanoGPT, or of torch."""

    fused_adamw: bool = False
    keep_freed_memory: bool = False  # common.device
    dtype: str = "float32"  # of autocast
    tf32: bool = False  # for float32 products on CUDA
    flash: bool = False  # on CUDA: fused attention kernels instead of plain products
    compile: bool = False
    vocab_size: int = 50257
    batch_size: int = 2


# Rungs: what each is called and what it changes. A setting of train.py or of the models becomes a
# rung by a field of Settings, its use in make_step, and a line here: float32 attention inside
# bfloat16 and the fused linear cross-entropy belong after bfloat16.
LADDERS = {
    "cpu": [
        ("float32", {}),
        ("fused AdamW", {"fused_adamw": True}),
        ("kept memory", {"keep_freed_memory": True}),
        ("bfloat16", {"dtype": "bfloat16"}),
        ("padded vocabulary", {"vocab_size": 50304}),
        ("torch.compile", {"compile": True}),
    ],
    "cuda": [
        ("float32", {"batch_size": 8}),
        ("TF32", {"tf32": True}),
        ("bfloat16", {"dtype": "bfloat16"}),
        ("fused AdamW", {"fused_adamw": True}),
        ("flash attention", {"flash": True}),
        ("torch.compile", {"compile": True}),
        ("padded vocabulary", {"vocab_size": 50304}),
        ("batch of 32", {"batch_size": 32}),
    ],
}
STEPS = {"cpu": 1, "cuda": 20}  # timed in one turn, after as many to warm up


def settings_of_rungs(ladder):
    """Return {rung: Settings}: each rung keeps the changes of the rungs before it."""
    changes, rungs = {}, {}
    for name, change in ladder:
        changes = changes | change
        rungs[name] = Settings(**changes)
    return rungs


def apply_process_settings(settings):
    """Set what holds for the whole process."""
    if settings.keep_freed_memory:
        keep_freed_memory()
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.backends.cuda.enable_flash_sdp(settings.flash)
    torch.backends.cuda.enable_mem_efficient_sdp(settings.flash)
    torch.backends.cuda.enable_cudnn_sdp(settings.flash)


def make_step(settings, model_options, device):
    """Return a function that takes one training step on random tokens."""
    module = model_module("model")
    config = module.GPTConfig(**{"vocab_size": settings.vocab_size} | model_options)
    model = module.GPT(config).to(device)
    optimizer = make_optimizer(model, TrainConfig())
    if not settings.fused_adamw:
        for param_group in optimizer.param_groups:
            param_group["fused"] = None
    forward = torch.compile(model) if settings.compile else model
    size = (settings.batch_size, config.block_size + 1)
    tokens = torch.randint(config.vocab_size, size, device=device)
    dtype = getattr(torch, settings.dtype)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_rung(settings, model_options, device, steps):
    """Return the seconds of a step. Must run in a process of its own."""
    apply_process_settings(settings)
    step = make_step(settings, model_options, device)
    for _ in range(steps):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def measure_ladder(bench):
    """Return one row per rung: the time of a step, and its factor over the rungs before it."""
    device = bench.device
    kind = device.type if device.type in LADDERS else "cpu"
    rungs = settings_of_rungs(LADDERS[kind])
    model_options = {k: v for k, v in workload(device).model.items() if k != "vocab_size"}
    contestants = {}
    for name, settings in rungs.items():
        arguments = (measure_rung, settings, model_options, device, STEPS[kind])
        contestants[name] = functools.partial(run_in_new_process, *arguments)
    times = time_turns(contestants, Budget(bench.seconds).allows)
    T = workload(device).config().block_size
    limit_rate = max(matmul_rates(device).values())
    per_token = statistics.median(times["float32"]) / (rungs["float32"].batch_size * T)
    previous = per_token
    rows = []
    for name, settings in rungs.items():
        tokens = settings.batch_size * T
        seconds = statistics.median(times[name])
        row = {"rung": name, "step_ms": milliseconds(times[name])}
        row["tokens_per_second"] = tokens / seconds
        row["over_first"] = per_token / (seconds / tokens)
        row["over_previous"] = previous / (seconds / tokens)
        flops = products_flops(workload(device)) * tokens / workload(device).tokens
        row["of_product_limit"] = flops / limit_rate / seconds
        previous = seconds / tokens
        rows.append(bench.show(row))
    return rows
