"""Attention alone: sliding windows, full causal attention and a dense mask.

On CUDA also FlashAttention's kernel with a window, alone and in a training step. model_swa.py does
not use that kernel: it runs on CUDA in half precision only, and would be a second path to trust. It
is worth that if a step of 4096 tokens or more becomes 1.5 times as fast.

Shapes: B batch, T tokens, H heads, D head_dim.
"""

import itertools
from contextlib import ExitStack

import torch
import torch.nn.functional as F

from common.device import peak_memory, pick_dtype
from common.models import model_module
from tools.bench.limits import matmul_rates
from tools.bench.runs import open_run, step_options, take_step
from tools.bench.sizes import dtype_name
from tools.results.turns import (
    compare,
    milliseconds,
    ratio,
    run_in_new_process,
    split,
    stopwatch,
)
from training.parallel import compile_model

N_HEAD, HEAD_DIM = 12, 64
LONGEST_DENSE = 1024  # a dense mask beyond this many tokens takes too long
# A training step of GPT-2 124M with windows and long sequences, on CUDA.
STEP_MODEL = {"block_size": 4096, "vocab_size": 50304}
STEP_BATCH = 8
STEP_SECONDS = 40  # it is measured if so many are left: its two models are compiled


def random_inputs(B, T, device, dtype):
    """Return q, k, v and a gradient of the output, all (B, H, T, D), with the model's strides."""
    # As in the model, q, k and v are views of one tensor (B, T, 3H, D).
    qkv = torch.randn(B, T, 3 * N_HEAD, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    q, k, v = (t.detach().requires_grad_() for t in qkv.split(N_HEAD, dim=1))
    return q, k, v, torch.randn_like(q)


def full(q, k, v):
    """Full causal attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(window):
    """Return sliding-window attention by a mask over all T x T scores, made as by a model."""

    def attend(q, k, v):
        T = q.size(2)
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def sliding(window):
    """Return the attention function of model_swa."""
    module = model_module("model_swa")
    config = module.GPTConfig(n_head=N_HEAD, n_embd=N_HEAD * HEAD_DIM, window=window)
    return module.CausalSelfAttention(config, 0).attend


def flash(window):
    """Return sliding-window attention by FlashAttention's kernel: CUDA, in half precision.

    torch.nn.attention.varlen takes sequences of any lengths, one after the other. Its
    window_size=(left, right) does not count the token itself.
    """
    # Not imported at the top: it imports the compiler, which --help does not need.
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v):
        B, H, T, D = q.shape
        q, k, v = [t.transpose(1, 2).reshape(B * T, H, D) for t in (q, k, v)]
        ends = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
        y = varlen_attn(q, k, v, ends, ends, T, T, window_size=(window - 1, 0))
        return y.view(B, T, H, D).transpose(1, 2)

    return attend


def forward_backward(attend, q, k, v, gradient):
    return torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)


def extra_memory(T, window, device, dtype):
    """Return the GB by which a forward and backward pass raises the peak memory.

    Must run in a process of its own, because a process's peak never falls.
    """
    attend = sliding(window)
    forward_backward(attend, *random_inputs(1, 2 * window, device, dtype))  # loads the kernels
    inputs = random_inputs(1, T, device, dtype)
    before = peak_memory(device)
    forward_backward(attend, *inputs)
    return None if before is None else peak_memory(device) - before


def attention_flops(B, T, window):
    """Return the FLOPs of a forward and backward pass: 12 * D per (query, attended key, head)."""
    pairs = T * (T + 1) // 2
    beyond = max(0, T - window)
    pairs -= beyond * (beyond + 1) // 2
    return 12 * HEAD_DIM * N_HEAD * B * pairs


def measure_attention(bench):
    """Return rows with the milliseconds of forward and backward passes, and with peak memory.

    "of_product_limit" is the fraction of the rate at which a large matrix product runs in the same
    dtype.
    """
    rates = matmul_rates(bench)
    rows = []
    if bench.device.type == "cuda" and not bench.sizes.is_tiny:
        if bench.left() >= STEP_SECONDS:
            rows.append(bench.show(step_speed(bench.device, bench.deadline - bench.left() / 2)))
        else:
            bench.note(f"No training step: it needs {STEP_SECONDS} of the seconds of the budget")
    for dtype in rates:
        rows.append(bench.show(attention_memory(bench, dtype)))
    cases = list(itertools.product(rates, bench.sizes.attention))
    costs = [B * T * T for _, (B, T, _) in cases]
    for case, deadline in zip(cases, split(bench.deadline, costs), strict=True):
        dtype, (B, T, window) = case
        inputs = random_inputs(B, T, bench.device, dtype)
        rows.append(bench.show(attention_speed(inputs, window, deadline, rates[dtype])))
    return rows


def attention_speed(inputs, window, deadline, rate):
    """Return one row: a forward and backward pass of each kind of attention.

    inputs   of random_inputs()
    rate     of a large matrix product, in FLOP/s
    """
    q = inputs[0]
    B, _, T, _ = q.shape
    functions = {"sliding": sliding(window), "full": full}
    if T <= LONGEST_DENSE:
        functions["dense"] = dense(window)
    if q.device.type == "cuda" and q.dtype != torch.float32:
        functions["flash"] = flash(window)
    contestants = {
        name: stopwatch(q.device, forward_backward, function, *inputs)
        for name, function in functions.items()
    }
    times = compare(deadline, contestants)
    row = {"dtype": dtype_name(q.dtype), "batch": B, "T": T, "window": window}
    for name in functions:
        row[f"{name}_ms"] = milliseconds(times[name])
    for name in functions:
        if name != "sliding":
            row[f"{name}_over_sliding"] = ratio(times[name], times["sliding"])
    limit = attention_flops(B, T, window) / rate
    row["sliding_of_product_limit"] = ratio([limit], times["sliding"])
    return row


def attention_memory(bench, dtype):
    """Return one row: the memory of sliding windows over short and long sequences."""
    short, long = bench.sizes.memory_lengths
    window = bench.sizes.attention[-1][2]
    row = {"dtype": dtype_name(dtype), "batch": 1, "window": window}
    for T in (short, long):
        row[f"gb_at_{T}"] = run_in_new_process(extra_memory, T, window, bench.device, dtype)
    before, after = row[f"gb_at_{short}"], row[f"gb_at_{long}"]
    return row | {"ratio": after / before if before else None}


def step_speed(device, deadline):
    """Return one row: a training step of model_swa, with its own windows and with the kernel's."""
    dtype = pick_dtype("auto", device)
    options = step_options(STEP_BATCH, STEP_MODEL["block_size"], device, dtype)
    options |= {"model": "model_swa", "compile": False}
    contestants = {}
    with ExitStack() as stack:
        for name in ("sliding", "flash"):
            run = stack.enter_context(open_run(STEP_MODEL, **options))
            if name == "flash":
                for block in run.model.transformer.h:
                    block.attn.attend = flash(block.attn.window)
            if device.type == "cuda":
                compile_model(run)
            contestants[name] = stopwatch(device, take_step, run)
        times = compare(deadline, contestants)
    row = {"dtype": dtype_name(dtype), "batch": STEP_BATCH, "T": STEP_MODEL["block_size"]}
    row["window"] = run.model.config.window
    row["sliding_step_ms"] = milliseconds(times["sliding"])
    row["flash_step_ms"] = milliseconds(times["flash"])
    return row | {"sliding_over_flash": ratio(times["sliding"], times["flash"])}
