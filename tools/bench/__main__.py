"""Measure speed side by side with peers, and as a fraction of the machine's own limits.

    python -m tools.bench limits      rates of matrix products, bandwidth of memory
    python -m tools.bench train       a training step of GPT-2 124M, beside nanoGPT
    python -m tools.bench attention   sliding windows, full causal attention and a dense mask
    python -m tools.bench decode      time per token and cache bytes of windows and of KV heads
    python -m tools.bench sample      generating, one stream and ten, beside transformers
    python -m tools.bench overhead    what a run does besides computing
    python -m tools.bench loss        time to a validation loss, whole programs, beside nanoGPT
    python -m tools.bench ladder      from torch's defaults to our settings, one change at a time
    python -m tools.bench memory      peak GPU memory of a training step; on CUDA only
    python -m tools.bench all         all of these, in this order
    python -m tools.bench plots       only draw the plots of the result files again

Contestants take turns, round after round, until the budget is used; every comparison has a round
or two in any case. Median and range are printed and written to docs/bench/NAME-DEVICE.json, with a
plot; python -m experiments.report then writes the tables of docs/BENCHMARKS.md. nanoGPT takes part
with --nanogpt=PATH, transformers where it is installed.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.bench")

import gc
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import torch

from common.device import is_out_of_memory, keep_freed_memory, pick_device
from common.errors import UserError, one_line, run_program
from configurator import check_minimum, configure
from tools.bench.attention import measure_attention
from tools.bench.ladder import measure_ladder
from tools.bench.limits import measure_limits
from tools.bench.memory import measure_memory
from tools.bench.nanogpt import check_nanogpt
from tools.bench.overhead import measure_overhead
from tools.bench.sampling import measure_decode, measure_sample
from tools.bench.sizes import CPU, CUDA, TINY, Bench
from tools.bench.training import measure_loss, measure_train
from tools.results.plot import save_bars
from tools.results.result_file import describe, read_result, write_result
from tools.results.table import markdown_rows


@dataclass
class BenchConfig:
    what: str = "all"  # the benchmark, all of them, or plots
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    budget_seconds: int | None = None  # of the whole call; None: the benchmarks' own
    note: str | None = None  # a sentence that is shown with the results, such as what is unusual
    nanogpt: str | None = None  # directory with nanoGPT's train.py and model.py, a peer
    position: int = 100_000  # decode: timed here and at position = window
    tiny: bool = False  # tiny models and tensors: shows that the benchmarks run, measures nothing
    out_dir: str | None = None  # for result files and plots; None: docs/bench, if tiny out/bench


@dataclass
class Benchmark:
    measure: Callable  # function from a Bench to rows
    seconds: dict  # {"cpu": its budget, "cuda": on a GPU}, for two rounds or more; start included
    column: str = ""  # of the rows, to plot
    unit: str = ""
    labels: tuple = ()  # columns that name a bar


# The most wanted first: if the time is short, the last ones are skipped.
BENCHMARKS = {
    "limits": Benchmark(
        measure_limits,
        {"cpu": 60, "cuda": 20},
        "forward_gflops",
        "GFLOP/s of the forward product",
        ("layer", "dtype"),
    ),
    "train": Benchmark(
        measure_train,
        {"cpu": 300, "cuda": 100},
        "tokens_per_second",
        "tokens per second",
        ("contestant", "dtype"),
    ),
    "attention": Benchmark(
        measure_attention,
        {"cpu": 120, "cuda": 100},
        "full_over_sliding",
        "time of full causal attention / time of sliding windows",
        ("T", "dtype"),
    ),
    "decode": Benchmark(
        measure_decode,
        {"cpu": 120, "cuda": 40},
        "ms",
        "ms per decode step",
        ("model", "batch", "position", "dtype"),
    ),
    "sample": Benchmark(
        measure_sample,
        {"cpu": 300, "cuda": 90},
        "tokens_per_second",
        "tokens per second, all streams",
        ("contestant", "streams", "dtype"),
    ),
    "overhead": Benchmark(
        measure_overhead,
        {"cpu": 120, "cuda": 100},
        "fraction",
        "fraction of the step time",
        ("config",),
    ),
    "loss": Benchmark(
        measure_loss,
        {"cpu": 240, "cuda": 150},
        "seconds",
        "seconds to validation loss 1.885",
        ("contestant",),
    ),
    "ladder": Benchmark(
        measure_ladder,
        {"cpu": 400, "cuda": 300},
        "tokens_per_second",
        "tokens per second",
        ("rung",),
    ),
    "memory": Benchmark(
        measure_memory,
        {"cuda": 300},
        "peak_gb",
        "peak GPU memory of a training step, GB",
        ("config", "mode", "batch", "T"),
    ),
}
MIN_FRACTION = 0.5  # of its own budget, without which a benchmark is not begun


def check_benchmark(what):
    """Raise UserError if there is no such benchmark."""
    if what != "all" and what not in BENCHMARKS:
        raise UserError(f"what={what} must be one of {', '.join(BENCHMARKS)}, all or plots")


def chosen_benchmarks(what, device):
    """Return {name: seconds} of the benchmarks to run; print which one needs a GPU."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    chosen = {}
    for name in BENCHMARKS if what == "all" else [what]:
        if kind in BENCHMARKS[name].seconds:
            chosen[name] = BENCHMARKS[name].seconds[kind]
        else:
            print(f"{name} is left out: it needs CUDA")
    return chosen


def choose_deadline(seconds, end):
    """Return the deadline of the next benchmark; None if there is no time for it.

    seconds   the budgets of the next one and of those after it
    end       the deadline of all

    The time that is left is divided in proportion to these budgets. The last ones get none if there
    is not enough for all.
    """
    now = time.monotonic()
    count = len(seconds)
    while count > 0 and MIN_FRACTION * sum(seconds[:count]) > end - now:
        count -= 1
    if count == 0:
        return None
    return now + (end - now) * seconds[0] / sum(seconds[:count])


def run_benchmark(name, config, device, deadline):
    """Run one benchmark; print its tables, and write its result file and its plot."""
    if config.tiny:
        sizes = TINY
    else:
        sizes = CUDA if device.type == "cuda" else CPU
    bench = Bench(device, deadline, sizes, config.nanogpt, config.position)
    if config.note is not None:
        bench.note(config.note)
    options = {
        "device": config.device,
        "budget_seconds": config.budget_seconds,
        "nanogpt": config.nanogpt is not None,  # without its path
        "position": config.position,
    }
    result = describe(name, f"python -m tools.bench {name}", options, device)
    print(f"{name}: {bench.left():.0f} s, {result['machine']}, {result['versions']}", flush=True)
    torch.manual_seed(0)
    result["values"] = BENCHMARKS[name].measure(bench)
    result["notes"] = bench.notes
    if result["values"]:
        path = Path(config.out_dir) / f"{name}-{slug(result['machine']['device'])}.json"
        write_result(path, result)
        draw_plot(path)
        print(f"\n{markdown_rows(result['values'])}\n\n{path}", flush=True)


def slug(text):
    """Return a device's name as a part of a file name: lower case, words joined by "-"."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def draw_plot(path):
    """Draw the plot of a result file beside it."""
    result = read_result(path)
    benchmark = BENCHMARKS[result["name"]]
    plot = path.with_suffix(".png")
    save_bars(result["values"], benchmark.column, benchmark.labels, benchmark.unit, plot)


def run_all(chosen, config, device, start):
    """Run benchmarks {name: seconds}; if there are several, one that fails does not end them.

    start   time.monotonic() when the budget began
    """
    names, seconds = list(chosen), list(chosen.values())
    budget = sum(seconds) if config.budget_seconds is None else config.budget_seconds
    end = start + budget
    for index, name in enumerate(names):
        deadline = end if len(names) == 1 else choose_deadline(seconds[index:], end)
        if deadline is None:
            print(f"{name} is skipped: only {end - time.monotonic():.0f} s are left", flush=True)
            continue
        try:
            run_benchmark(name, config, device, deadline)
        except Exception as error:  # of any kind: the other benchmarks still run
            if is_out_of_memory(error):
                error = UserError(f"out of memory in the benchmark {name}: use a larger device")
            if len(names) == 1:
                raise error
            print(f"{name} failed: {type(error).__name__}: {one_line(error)[:300]}", flush=True)
        release_memory(device)


def release_memory(device):
    """Give back the GPU memory that torch keeps, which the processes of later benchmarks need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv):
    start = time.monotonic()
    config = configure(BenchConfig, argv, __doc__, positional="what")
    check_minimum(config, 1, "budget_seconds", "position")
    if config.out_dir is None:
        config.out_dir = "out/bench" if config.tiny else "docs/bench"
    if config.what == "plots":
        for path in sorted(Path(config.out_dir).glob("*.json")):
            draw_plot(path)
        return
    check_benchmark(config.what)
    if config.nanogpt is not None:
        check_nanogpt(config.nanogpt)
    device = pick_device(config.device)
    keep_freed_memory(device)
    run_all(chosen_benchmarks(config.what, device), config, device, start)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
