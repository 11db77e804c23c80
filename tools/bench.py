"""Measure speed and memory of attention and of decoding, side by side on this machine.

    python -m tools.bench attention   sliding windows, full causal attention and a dense mask
    python -m tools.bench decode      time per token and cache bytes of windows and of KV heads

Machines are noisy: what is compared takes turns, round after round, and medians are divided.
--out=FILE writes all rows as JSON.
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
from configurator import check_range, configure


@dataclass
class BenchConfig:
    what: str = "attention"  # attention or decode
    out: str | None = None  # JSON file to write
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    rounds: int = 5  # rounds of turns, after one to warm up
    position: int = 100_000  # of decode, compared with position = window


def take_turns(rounds, device, contestants):
    """Median seconds of each of the functions, by name: one call each a round."""
    seconds = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in seconds.items()}


# Attention ------------------------------------------------------------------------------------

WINDOW, N_HEAD, HEAD_DIM = 256, 12, 64


def inputs(B, T, device, dtype):
    """Random q, k, v and a gradient, laid out as the model has them: (B, H, T, D), of (B, T, 3H, D)."""
    qkv = torch.randn(B, T, 3 * N_HEAD, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    q, k, v = (t.detach().requires_grad_() for t in qkv.split(N_HEAD, dim=1))
    return q, k, v, torch.randn_like(q)


def full(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(q, k, v):
    T = q.size(2)
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - WINDOW)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sliding():
    """model_swa's attention."""
    module = model_module("model_swa")
    config = module.GPTConfig(n_head=N_HEAD, n_embd=N_HEAD * HEAD_DIM, window=WINDOW)
    return module.CausalSelfAttention(config, 0).attend


def forward_backward(attend, q, k, v, gradient):
    return torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)


def extra_memory(T, device, dtype):
    """Peak GB of a forward and backward beyond its inputs; in a process of its own, as a peak knows no way back."""
    forward_backward(sliding(), *inputs(1, 2 * WINDOW, device, dtype))  # loads the kernels
    given = inputs(1, T, device, dtype)
    before = peak_memory(device)
    forward_backward(sliding(), *given)
    return peak_memory(device) - before


def attention(config, device):
    """Rows of forward plus backward: B, T, and milliseconds of each."""
    attend, rows = sliding(), []
    for dtype in (torch.float32, torch.bfloat16):
        for B, T in [(2, 256), (2, 384), (2, 512), (2, 768), (2, 1000), (2, 1024), (1, 8192)]:
            given = inputs(B, T, device, dtype)
            contestants = {"sliding": attend, "full": full} | (
                {"dense": dense} if T <= 1024 else {}
            )
            runs = {
                name: functools.partial(forward_backward, f, *given)
                for name, f in contestants.items()
            }
            seconds = take_turns(config.rounds, device, runs)
            row = {"dtype": str(dtype).removeprefix("torch."), "batch": B, "T": T, "window": WINDOW}
            row |= {f"{name}_ms": 1000 * s for name, s in seconds.items()}
            row |= {
                f"{name}_over_sliding": s / seconds["sliding"]
                for name, s in seconds.items()
                if name != "sliding"
            }
            rows.append(show(row))
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            sizes = pool.starmap(
                extra_memory, [(T, device, dtype) for T in (4096, 16384)], chunksize=1
            )
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "batch": 1,
            "window": WINDOW,
            "gb_at_4096": sizes[0],
        }
        rows.append(show(row | {"gb_at_16384": sizes[1], "ratio": sizes[1] / sizes[0]}))
    return rows


# Decode ---------------------------------------------------------------------------------------


def fill_cache(model, cache, length):
    """Fill a cache with random tokens up to a length, in chunks."""
    while cache.pos < length:
        size = (1, min(1024, length - cache.pos))
        model(torch.randint(model.config.vocab_size, size, device=cache.k.device), cache=cache)


@torch.inference_mode()
def decode(config, device):
    """Rows of single-token forwards of models of 124M: milliseconds and cache bytes."""
    rows, samples = [], 10
    for dtype in (torch.float32, torch.bfloat16):
        name = {"dtype": str(dtype).removeprefix("torch.")}
        module = model_module("model_rope_gqa_swa")
        model = module.GPT(module.GPTConfig()).to(device, dtype).eval()
        caches = {length: model.make_cache(1) for length in (model.config.window, config.position)}
        for length, cache in caches.items():
            fill_cache(model, cache, length)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        steps = {
            length: functools.partial(model, token, cache=cache) for length, cache in caches.items()
        }
        for length, s in take_turns(10 * config.rounds, device, steps).items():
            row = {"model": module.__name__, "batch": 1, "position": length}
            rows.append(show(name | row | {"ms": 1000 * s, "cache_bytes": caches[length].nbytes}))
        rows[-1]["over_window"] = rows[-1]["ms"] / rows[-2]["ms"]
        print(
            f"position {config.position} over position {model.config.window}: {rows[-1]['over_window']:.3f}"
        )
        contestants = {}
        for variant in ("model", "model_gqa", "model_swa"):
            module = model_module(variant)
            model = module.GPT(module.GPTConfig()).to(device, dtype).eval()
            cache = model.make_cache(samples)
            fill_cache(model, cache, 512)
            contestants[variant] = (
                functools.partial(model, token.expand(samples, 1), cache=cache),
                cache.nbytes,
            )
        seconds = take_turns(
            10 * config.rounds, device, {key: run for key, (run, _) in contestants.items()}
        )
        for variant, s in seconds.items():
            row = {
                "model": variant,
                "batch": samples,
                "position": 512,
                "cache_bytes": contestants[variant][1],
            }
            rows.append(
                show(name | row | {"ms": 1000 * s, "model_over_this": seconds["model"] / s})
            )
    return rows


# The program ----------------------------------------------------------------------------------

BENCHMARKS = {"attention": attention, "decode": decode}


def show(row):
    """Print a row and return it."""
    cells = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in row.items()
    )
    print(" | ".join(cells), flush=True)
    return row


@program
def main(argv):
    config = configure(BenchConfig, argv, __doc__, positional="what")
    check_range(config, 1, "rounds", "position")
    if config.what not in BENCHMARKS:
        raise UserError(f"no benchmark {config.what}: choose one of {', '.join(BENCHMARKS)}")
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
