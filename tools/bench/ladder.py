"""The ladder: one thing at a time, from torch's defaults to our settings, on the reader's machine.

Each rung is a training step of GPT-2 124M with the settings of the rungs above it and one more; a
rung that was tried and is not used changes nothing for those after it. A rung is measured in a
process of its own, because some settings last as long as a process.
"""

import functools
import statistics
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.cpu import use_float32_attention
from common.device import keep_freed_memory, pick_dtype
from tools.bench.limits import matmul_rates, products_flops
from tools.bench.runs import open_run, step_options, take_step
from tools.results.turns import Budget, milliseconds, run_in_new_process, stopwatch, time_turns
from training import parallel


@dataclass
class Settings:
    """What the rungs change; the defaults are torch's."""

    fused_adamw: bool = False
    keep_freed_memory: bool = False  # common.device
    dtype: str = "float32"  # of autocast
    tf32: bool = False  # for float32 products on CUDA
    flash: bool = False  # on CUDA: fused attention kernels instead of plain products
    compile: bool = False
    float32_attention: bool = False  # common.cpu, in attention of any length
    fused_loss: bool = False  # F.linear_cross_entropy in chunks, instead of logits and their loss
    vocab_size: int = 50257
    batch_size: int = 2


@dataclass
class Rung:
    name: str
    changes: dict  # of Settings
    kept: bool = True  # by the rungs after it; False: measured alone, not used by train.py


LADDERS = {
    "cpu": [
        Rung("float32", {}),
        Rung("fused AdamW", {"fused_adamw": True}),
        Rung("kept memory", {"keep_freed_memory": True}),
        Rung("bfloat16", {"dtype": "bfloat16"}),
        Rung("padded vocabulary", {"vocab_size": 50304}),
        Rung("float32 attention (not used)", {"float32_attention": True}, kept=False),
        Rung("fused loss (not used)", {"fused_loss": True}, kept=False),
        Rung("torch.compile (not used)", {"compile": True}, kept=False),
    ],
    "cuda": [
        Rung("float32", {"batch_size": 8}),
        Rung("TF32", {"tf32": True}),
        Rung("bfloat16", {"dtype": "bfloat16"}),
        Rung("fused AdamW", {"fused_adamw": True}),
        Rung("fused attention", {"flash": True}),
        Rung("fused loss (not used)", {"fused_loss": True}, kept=False),
        Rung("torch.compile", {"compile": True}),
        Rung("padded vocabulary", {"vocab_size": 50304}),
        Rung("batch of 32", {"batch_size": 32}),
    ],
}
STEPS = {"cpu": 1, "cuda": 20}  # timed in one turn, after as many to warm up


def settings_of_rungs(ladder):
    """Return {rung: Settings}: each has its own changes and those that earlier rungs keep."""
    kept, rungs = {}, {}
    for rung in ladder:
        changes = kept | rung.changes
        rungs[rung.name] = Settings(**changes)
        if rung.kept:
            kept = changes
    return rungs


def apply_process_settings(settings, device):
    """Set what holds for the whole process, also where train.py has set it already."""
    if settings.keep_freed_memory:
        keep_freed_memory(device)
    if device.type != "cuda":  # the switches below would change attention on a CPU too
        return
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    torch.backends.cuda.enable_flash_sdp(settings.flash)
    torch.backends.cuda.enable_mem_efficient_sdp(settings.flash)
    torch.backends.cuda.enable_cudnn_sdp(settings.flash)


def fused_loss(model):
    """Return a loss(x, targets) by F.linear_cross_entropy, which never has all logits."""

    def loss(x, targets):
        hidden, weight = x.flatten(0, 1), model.transformer.wte.weight
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        chunks = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets.flatten(), options=chunks)

    return loss


def apply_settings(settings, run):
    """Give a run, which is not compiled, the settings of a rung."""
    apply_process_settings(settings, run.device)
    if not settings.fused_adamw:
        for param_group in run.optimizer.param_groups:
            param_group["fused"] = None
    if settings.float32_attention:
        for block in run.model.transformer.h:
            use_float32_attention(block, run.loader.block_size)
    if settings.fused_loss:
        run.model.loss = fused_loss(run.model)
    if settings.compile:
        parallel.compile_model(run)


def measure_rung(settings, model_options, device, steps):
    """Return the seconds of a step. Must run in a process of its own."""
    model_options = {"vocab_size": settings.vocab_size} | model_options
    T, dtype = model_options["block_size"], getattr(torch, settings.dtype)
    options = step_options(settings.batch_size, T, device, dtype)
    with open_run(model_options, **options, compile=False) as run:
        apply_settings(settings, run)
        turn = stopwatch(device, take_step, run, calls=steps)
        turn()  # to warm up
        return turn()


def possible_rungs(bench):
    """Return the rungs that work with this torch and on this device; note which do not."""
    ladder = LADDERS.get(bench.device.type, LADDERS["cpu"])
    if not hasattr(F, "linear_cross_entropy"):
        bench.note(f"torch {torch.__version__} has no linear_cross_entropy: no rung with it")
        ladder = [rung for rung in ladder if "fused_loss" not in rung.changes]
    if pick_dtype("auto", bench.device) != torch.bfloat16:
        bench.note("bfloat16 is not fast on this device: the rungs with it are left out")
        ladder = [r for r in ladder if not {"dtype", "float32_attention"} & r.changes.keys()]
    return ladder


def measure_ladder(bench):
    """Return one row per rung: the time of a step, and its factor over the rungs before it."""
    device, sizes = bench.device, bench.sizes
    ladder = possible_rungs(bench)
    rungs = settings_of_rungs(ladder)
    T = sizes.config().block_size
    model_options = {key: value for key, value in sizes.model.items() if key != "vocab_size"}
    model_options["block_size"] = T
    steps = STEPS.get(device.type, STEPS["cpu"])
    contestants = {}
    for name, settings in rungs.items():
        arguments = (measure_rung, settings, model_options, device, steps)
        contestants[name] = functools.partial(run_in_new_process, *arguments)
    times = time_turns(contestants, Budget(bench.deadline, least=1).allows)
    limit_rate = max(matmul_rates(bench).values())
    per_token = statistics.median(times["float32"]) / (rungs["float32"].batch_size * T)
    previous = per_token
    rows = []
    for rung in ladder:
        tokens = rungs[rung.name].batch_size * T
        seconds = statistics.median(times[rung.name])
        row = {"rung": rung.name, "step_ms": milliseconds(times[rung.name])}
        row["tokens_per_second"] = tokens / seconds
        row["first_over_this"] = per_token / (seconds / tokens)
        row["previous_over_this"] = previous / (seconds / tokens)
        flops = products_flops(sizes) * tokens / sizes.tokens
        row["of_product_limit"] = flops / limit_rate / seconds
        if rung.kept:
            previous = seconds / tokens
        rows.append(bench.show(row))
    return rows
