"""Measure speed and memory of attention and of decoding, side by side on this machine.

    python -m tools.bench attention   sliding windows, full causal attention and a dense mask
    python -m tools.bench decode      time per token and cache bytes of windows and of KV heads

Machines are noisy, so the functions to compare take turns: each is called once per round, and the
medians over the rounds are compared. --out=FILE writes all rows as JSON.

Shapes: B batch, T tokens, H heads, D head_dim.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.bench")

import functools
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import torch
import torch.nn.functional as F

from common.device import device_name, keep_freed_memory, peak_memory, pick_device
from common.errors import UserError, program
from common.models import model_module
from configurator import check_minimum, configure


@dataclass
class BenchConfig:
    what: str = "attention"  # the benchmark: attention or decode
    out: str | None = None  # JSON file to write
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    rounds: int = 5  # timed rounds, after one to warm up
    position: int = 100_000  # decode: timed here and at position = window


def take_turns(rounds, device, contestants):
    """Return the median seconds of each function of {name: function}; each round calls all once."""
    seconds = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


# Attention ------------------------------------------------------------------------------------

WINDOW, N_HEAD, HEAD_DIM = 256, 12, 64
BATCH_AND_LENGTH = [(2, 256), (2, 384), (2, 512), (2, 768), (2, 1000), (2, 1024), (1, 8192)]
LONGEST_DENSE = 1024  # a dense mask beyond this many tokens takes too long
SHORT, LONG = 4096, 16384  # tokens between which the growth of memory is measured


def random_inputs(B, T, device, dtype):
    """Return q, k, v and a gradient of the output, all (B, H, T, D), with the model's strides."""
    # As in the model, q, k and v are views of one tensor (B, T, 3H, D).
    qkv = torch.randn(B, T, 3 * N_HEAD, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    q, k, v = (t.detach().requires_grad_() for t in qkv.split(N_HEAD, dim=1))
    return q, k, v, torch.randn_like(q)


def full(q, k, v):
    """Full causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(q, k, v):
    """Sliding-window attention by a mask over all T x T scores."""
    T = q.size(2)
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliding():
    """Return the attention function of model_swa."""
    module = model_module("model_swa")
    config = module.GPTConfig(n_head=N_HEAD, n_embd=N_HEAD * HEAD_DIM, window=WINDOW)
    return module.CausalSelfAttention(config, 0).attend


def forward_backward(attend, q, k, v, gradient):
    return torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)


def extra_memory(T, device, dtype):
    """Return the GB by which a forward and backward pass raises the peak memory.

    Must run in a process of its own, because a process's peak never falls.
    """
    forward_backward(sliding(), *random_inputs(1, 2 * WINDOW, device, dtype))  # loads the kernels
    inputs = random_inputs(1, T, device, dtype)
    before = peak_memory(device)
    forward_backward(sliding(), *inputs)
    return peak_memory(device) - before


def attention(config, device):
    """Return rows with the milliseconds of forward and backward passes, and with peak memory."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for B, T in BATCH_AND_LENGTH:
            rows.append(attention_speed(config, device, dtype, B, T))
        rows.append(attention_memory(device, dtype))
    return rows


def attention_speed(config, device, dtype, B, T):
    """Return one row: a forward and backward pass of each kind of attention."""
    functions = {"sliding": sliding(), "full": full}
    if T <= LONGEST_DENSE:
        functions["dense"] = dense
    inputs = random_inputs(B, T, device, dtype)
    runs = {
        name: functools.partial(forward_backward, function, *inputs)
        for name, function in functions.items()
    }
    seconds = take_turns(config.rounds, device, runs)
    row = {"dtype": dtype_name(dtype), "batch": B, "T": T, "window": WINDOW}
    for name in functions:
        row[f"{name}_ms"] = 1000 * seconds[name]
    for name in functions:
        if name != "sliding":
            row[f"{name}_over_sliding"] = seconds[name] / seconds["sliding"]
    return show(row)


def attention_memory(device, dtype):
    """Return one row: the memory of sliding windows over short and long sequences."""
    arguments = [(SHORT, device, dtype), (LONG, device, dtype)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        short_gb, long_gb = pool.starmap(extra_memory, arguments, chunksize=1)
    row = {"dtype": dtype_name(dtype), "batch": 1, "window": WINDOW}
    row |= {f"gb_at_{SHORT}": short_gb, f"gb_at_{LONG}": long_gb, "ratio": long_gb / short_gb}
    return show(row)


# Decode ---------------------------------------------------------------------------------------

PREFILL_CHUNK = 1024  # tokens
SAMPLES, SAMPLES_POSITION = 10, 512  # of the comparison between models


def fill_cache(model, cache, length):
    """Prefill a cache with random tokens up to `length` of them, in chunks."""
    while cache.pos < length:
        size = (1, min(PREFILL_CHUNK, length - cache.pos))
        model(torch.randint(model.config.vocab_size, size, device=cache.k.device), cache=cache)


@torch.inference_mode()
def decode(config, device):
    """Return rows with the milliseconds of a decode step and the bytes of the KV cache.

    The models have the size of GPT-2 small, 124M parameters.
    """
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rows += decode_positions(config, device, dtype)
        rows += decode_models(config, device, dtype)
    return rows


def default_model(name, device, dtype):
    """Return a model of GPT-2 small's size with random weights."""
    module = model_module(name)
    return module.GPT(module.GPTConfig()).to(device, dtype).eval()


def decode_positions(config, device, dtype):
    """Return two rows: model_rope_gqa_swa at position = window and at a far position."""
    name = "model_rope_gqa_swa"
    model = default_model(name, device, dtype)
    window = model.config.window
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    caches, steps = {}, {}
    for position in (window, config.position):
        caches[position] = model.make_cache(1)
        fill_cache(model, caches[position], position)
        steps[position] = functools.partial(model, token, cache=caches[position])
    seconds = take_turns(10 * config.rounds, device, steps)
    rows = []
    for position in steps:
        row = {"dtype": dtype_name(dtype), "model": name, "batch": 1, "position": position}
        row |= {"ms": 1000 * seconds[position], "cache_bytes": caches[position].nbytes}
        rows.append(show(row))
    over_window = seconds[config.position] / seconds[window]
    rows[-1]["over_window"] = over_window
    print(f"position {config.position} over position {window}: {over_window:.3f}")
    return rows


def decode_models(config, device, dtype):
    """Return one row per model: a decode step of several samples, KV heads and windows compared."""
    caches, steps = {}, {}
    token = torch.zeros(SAMPLES, 1, dtype=torch.int64, device=device)
    for name in ("model", "model_gqa", "model_swa"):
        model = default_model(name, device, dtype)
        caches[name] = model.make_cache(SAMPLES)
        fill_cache(model, caches[name], SAMPLES_POSITION)
        steps[name] = functools.partial(model, token, cache=caches[name])
    seconds = take_turns(10 * config.rounds, device, steps)
    rows = []
    for name in steps:
        row = {"dtype": dtype_name(dtype), "model": name, "batch": SAMPLES}
        row |= {"position": SAMPLES_POSITION, "cache_bytes": caches[name].nbytes}
        row |= {"ms": 1000 * seconds[name], "model_over_this": seconds["model"] / seconds[name]}
        rows.append(show(row))
    return rows


# The program ----------------------------------------------------------------------------------

BENCHMARKS = {"attention": attention, "decode": decode}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def show(row):
    """Print a row and return it."""
    cells = []
    for key, value in row.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        cells.append(f"{key} {text}")
    print(" | ".join(cells), flush=True)
    return row


@program
def main(argv):
    config = configure(BenchConfig, argv, __doc__, positional="what")
    check_minimum(config, 1, "rounds", "position")
    if config.what not in BENCHMARKS:
        raise UserError(f"what={config.what} must be one of {', '.join(BENCHMARKS)}")
    device = pick_device(config.device)
    keep_freed_memory()
    torch.manual_seed(0)
    about = {
        "benchmark": config.what,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": config.rounds,
    }
    show(about)
    rows = BENCHMARKS[config.what](config, device)
    if config.out:
        with open(config.out, "w", encoding="utf-8") as file:
            json.dump(about | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
