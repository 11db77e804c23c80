"""Training: the time of a step, and the time to a validation loss, beside nanoGPT's train.py."""

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.device import device_name, peak_flops
from common.errors import UserError
from common.flops import mfu_flops_per_token
from common.models import ROOT
from common.tokenizer import get_tokenizer
from prepare_data import open_dataset
from tools.bench.limits import attention_products, step_products
from tools.bench.nanogpt import (
    copy_given_nanogpt,
    device_options,
    iteration_seconds,
    last_val_loss,
    run_nanogpt,
)
from tools.bench.runs import open_run, step_options, take_step, write_random_dataset
from tools.bench.sizes import dtype_name, dtypes
from tools.plot_loss import read_log
from tools.results.turns import Budget, compare, milliseconds, ratio, spread, stopwatch, time_turns

NANOGPT_ITERATIONS = {"cpu": 2, "cuda": 40}  # of one turn, after the first one

# A step --------------------------------------------------------------------------------------


def nanogpt_step(copy, sizes, device):
    """Return the seconds of an iteration of nanoGPT's train.py, with the same batch as ours."""
    config = sizes.config()
    output = run_nanogpt(
        copy,
        "train.py",
        *device_options(device),
        "--dataset=random",
        "--gradient_accumulation_steps=1",
        "--bias=True",  # GPT-2 and ours have biases, nanoGPT's default has none
        f"--batch_size={sizes.batch_size}",
        f"--block_size={config.block_size}",
        f"--n_layer={config.n_layer}",
        f"--n_head={config.n_head}",
        f"--n_embd={config.n_embd}",
        f"--max_iters={NANOGPT_ITERATIONS.get(device.type, 2)}",
        "--eval_iters=1",
        "--eval_interval=1000000",
    )
    return iteration_seconds(output)


def nanogpt_contestants(bench, folder):
    """Return {"nanoGPT": function}, or {} and a note if its directory is not given."""
    copy = copy_given_nanogpt(bench, folder)
    if copy is None:
        return {}
    # Without a meta.pkl beside the bins, nanoGPT takes its default vocabulary, GPT-2's padded.
    write_random_dataset(copy / "data" / "random", bench.sizes.config().vocab_size)
    return {"nanoGPT": functools.partial(nanogpt_step, copy, bench.sizes, bench.device)}


def measure_train(bench):
    """Return rows with the time of a training step: ours in each dtype, and nanoGPT's.

    Ours is train_step of train.py: batch, forward and backward pass, gradient norm, clipping,
    AdamW. nanoGPT's is an iteration of its train.py, run as a program. "linear" are the matrix
    products of the weights alone, measured in the same rounds. On a CPU "products" are these and
    those of attention; on a GPU a fused kernel computes attention faster than such products, which
    write all scores to memory.
    """
    device, sizes = bench.device, bench.sizes
    kinds = dtypes(device)[-1:] if device.type == "cuda" else dtypes(device)
    contestants, runs = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for dtype in kinds:
            options = step_options(sizes.batch_size, sizes.config().block_size, device, dtype)
            runs[dtype] = stack.enter_context(open_run(sizes.model, **options))
            contestants["step", dtype] = stopwatch(device, take_step, runs[dtype])
            linear = step_products(sizes, device, dtype)
            contestants["linear", dtype] = stopwatch(device, linear)
            if device.type == "cpu":
                attention = attention_products(sizes, device, dtype)
                contestants["attention", dtype] = stopwatch(device, attention)
        programs = nanogpt_contestants(bench, folder)
        times = compare(bench.deadline, contestants, programs)
    rows = [bench.show(step_row(sizes, runs[dtype], dtype, times)) for dtype in kinds]
    if programs:
        row = {"contestant": "nanoGPT", "dtype": "its own"}
        rows.append(bench.show(row | speed(sizes, times["nanoGPT"])))
    return rows


def speed(sizes, times):
    tokens_per_second = spread([sizes.tokens / t for t in times])
    return {"step_ms": milliseconds(times), "tokens_per_second": tokens_per_second}


def step_row(sizes, run, dtype, times):
    """Return the row of our step in one dtype."""
    step, linear = times["step", dtype], times["linear", dtype]
    row = {"contestant": "ours", "dtype": dtype_name(dtype)} | speed(sizes, step)
    if ("attention", dtype) in times:
        products = [a + b for a, b in zip(linear, times["attention", dtype], strict=True)]
        row |= {"products_ms": milliseconds(products), "products_over_step": ratio(products, step)}
    row |= {"linear_ms": milliseconds(linear), "linear_over_step": ratio(linear, step)}
    if "nanoGPT" in times:
        row["nanogpt_over_this"] = ratio(times["nanoGPT"], step)
    peak = peak_flops(run.device, dtype)
    if peak is not None:
        flops = sizes.tokens * mfu_flops_per_token(run.model, run.loader.block_size)
        row |= {"mfu": flops / statistics.median(step) / peak, "mfu_of": device_name(run.device)}
    return row


# Time to a loss ------------------------------------------------------------------------------

TARGET_LOSS = 1.885  # where nanoGPT's recipe ends


@dataclass
class Recipe:
    """A way to train nanoGPT's CPU architecture on Shakespeare's characters to TARGET_LOSS."""

    name: str
    options: tuple  # for train.py, after config/shakespeare_char.py


# The fewest steps, in fifties, whose last validation loss over the whole split is at most
# TARGET_LOSS: python train.py config/shakespeare_char.py --max_steps=N
RECIPES = [
    Recipe("ours, AdamW", ("--max_steps=1200",)),
    Recipe(
        "ours, Muon",
        (
            "--optimizer=muon",
            "--muon_learning_rate=0.03",
            "--warmup_steps=50",
            "--max_steps=500",
        ),
    ),
]
TINY_RECIPES = [Recipe("ours, AdamW", ("--max_steps=2", "--n_layer=1", "--eval_tokens=64"))]
# nanoGPT's README, "i only have a macbook"
NANOGPT_RECIPE = (
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
)


def run_recipe(recipe, dataset, device):
    """Train by one of our recipes; return (seconds of the whole program, steps, last loss)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            ROOT / "train.py",
            ROOT / "config" / "shakespeare_char.py",
            *recipe.options,
            f"--dataset={dataset}",
            f"--out_dir={folder}/run",
            f"--device={device}",
        ]
        start = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if result.returncode != 0:
            raise UserError(f"{recipe.name}: {result.stderr.strip()[-300:]}")
        record = read_log(Path(folder) / "run")[-1]
    return seconds, record["step"], record["val_loss"]


def write_shakespeare(copy, dataset, meta):
    """Let nanoGPT prepare its data set from the same text, which our bins hold as ids."""
    tokenizer = get_tokenizer(meta)
    ids = [np.fromfile(dataset / f"{split}.bin", "<u2") for split in ("train", "val")]
    text = "".join(tokenizer.chars[token_id] for token_id in np.concatenate(ids))
    folder = copy / "data" / "shakespeare_char"
    with open(folder / "input.txt", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    run_nanogpt(copy, "data/shakespeare_char/prepare.py")


def run_nanogpt_recipe(copy, device):
    """Train by nanoGPT's recipe; return (seconds of the whole program, iterations, last loss)."""
    options = [*device_options(device), *NANOGPT_RECIPE]
    start = time.perf_counter()
    output = run_nanogpt(copy, "train.py", "config/train_shakespeare_char.py", *options)
    return time.perf_counter() - start, *last_val_loss(output)


def loss_contestants(bench, dataset, meta, folder):
    """Return {name: function} of the recipes that can run here."""
    contestants = {}
    copy = copy_given_nanogpt(bench, folder)
    if copy is not None:
        write_shakespeare(copy, dataset, meta)
        contestants["nanoGPT"] = functools.partial(run_nanogpt_recipe, copy, bench.device)
    for recipe in TINY_RECIPES if bench.sizes.is_tiny else RECIPES:
        contestants[recipe.name] = functools.partial(run_recipe, recipe, dataset, bench.device)
    return contestants


def measure_loss(bench):
    """Return one row per recipe: the wall time of the whole program, and the loss it ends at.

    Our loss is that of the whole validation split; nanoGPT's is its own estimate from 20 batches.
    """
    dataset, meta = open_dataset("shakespeare_char")
    with tempfile.TemporaryDirectory() as folder:
        contestants = loss_contestants(bench, dataset.resolve(), meta, folder)
        # A program of a minute is an average already: one round, if there is no time for more.
        turns = time_turns(contestants, Budget(bench.deadline, least=1).allows)
    rows = []
    for name, results in turns.items():
        seconds, steps, losses = zip(*results, strict=True)
        row = {"contestant": name, "steps": steps[0], "seconds": spread(seconds)}
        row |= {"val_loss": max(losses)}
        if name != "nanoGPT" and max(losses) > TARGET_LOSS:
            bench.note(f"{name} ended at {max(losses):.4f}, above {TARGET_LOSS}: no result")
        elif name != "nanoGPT" and "nanoGPT" in turns:
            nanogpt_seconds = [turn[0] for turn in turns["nanoGPT"]]
            row["nanogpt_over_this"] = ratio(nanogpt_seconds, seconds)
        rows.append(bench.show(row))
    return rows
