"""Measure speed side by side with peers, and as a fraction of the machine's own limits.

    python -m tools.bench limits      rates of matrix products, bandwidth of memory
    python -m tools.bench train       a training step of GPT-2 124M, beside nanoGPT
    python -m tools.bench loss        time to a validation loss, whole programs, beside nanoGPT
    python -m tools.bench sample      generating, one stream and ten, beside transformers
    python -m tools.bench attention   sliding windows, full causal attention and a dense mask
    python -m tools.bench decode      time per token and cache bytes of windows and of KV heads
    python -m tools.bench data        tokenizing, beside tiktoken
    python -m tools.bench overhead    what a run does besides computing
    python -m tools.bench ladder      from torch's defaults to our settings, one change at a time
    python -m tools.bench all         all of these, then which of the project's goals fall short
    python -m tools.bench document    only write docs/BENCHMARKS.md from the result files

Contestants take turns, round after round, until the budget is used. Median and range are printed
and written to docs/bench/NAME-DEVICE.json, from which docs/BENCHMARKS.md is made. nanoGPT takes
part with --nanogpt=PATH, transformers where it is installed.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.bench")

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # see train.py

import torch

from common.device import is_out_of_memory, keep_freed_memory, pick_device
from common.errors import UserError, run_program
from configurator import check_minimum, configure
from tools.bench.attention import measure_attention
from tools.bench.data import measure_data
from tools.bench.document import write_document
from tools.bench.goals import goal_values, shortfalls
from tools.bench.ladder import measure_ladder
from tools.bench.limits import limits
from tools.bench.nanogpt import check_nanogpt
from tools.bench.overhead import measure_overhead
from tools.bench.results import FOLDER, Bench, describe, write_results
from tools.bench.sampling import measure_decode, measure_sample
from tools.bench.training import measure_loss, measure_train


@dataclass
class BenchConfig:
    what: str = "all"  # the benchmark, all of them, or document
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    budget_seconds: int | None = None  # of the whole call; None: the benchmarks' own
    nanogpt: str | None = None  # directory with nanoGPT's train.py and model.py, a peer
    position: int = 100_000  # decode: timed here and at position = window
    out_dir: str = FOLDER  # for the result files; BENCHMARKS.md is written beside it


@dataclass
class Benchmark:
    measure: Callable  # function from a Bench to rows
    seconds: dict  # the budget of its rounds on a CPU and on a GPU


BENCHMARKS = {
    "limits": Benchmark(limits, {"cpu": 60, "cuda": 20}),
    "train": Benchmark(measure_train, {"cpu": 240, "cuda": 90}),
    "sample": Benchmark(measure_sample, {"cpu": 180, "cuda": 60}),
    "loss": Benchmark(measure_loss, {"cpu": 240, "cuda": 120}),
    "attention": Benchmark(measure_attention, {"cpu": 90, "cuda": 20}),
    "decode": Benchmark(measure_decode, {"cpu": 60, "cuda": 20}),
    "data": Benchmark(measure_data, {"cpu": 60, "cuda": 30}),
    "overhead": Benchmark(measure_overhead, {"cpu": 120, "cuda": 40}),
    "ladder": Benchmark(measure_ladder, {"cpu": 240, "cuda": 180}),
}
SMALLEST_PART = 0.3  # of its own budget, below which a benchmark is left out of `all`


def chosen_benchmarks(what):
    """Return the names of the benchmarks to run. Raises UserError for an unknown one."""
    if what == "all":
        return list(BENCHMARKS)
    if what not in BENCHMARKS:
        raise UserError(f"what={what} must be one of {', '.join(BENCHMARKS)}, all or document")
    return [what]


class Plan:
    """Divides the seconds of a call over its benchmarks, in proportion to their own budgets."""

    def __init__(self, names, device, budget_seconds):
        kind = "cuda" if device.type == "cuda" else "cpu"
        self.own = {name: BENCHMARKS[name].seconds[kind] for name in names}
        self.budget = sum(self.own.values()) if budget_seconds is None else budget_seconds
        self.is_only = len(names) == 1
        self.start = time.perf_counter()

    def seconds(self, name):
        """Return the seconds of the next benchmark, of those that are left; None: too few."""
        left = self.budget - (time.perf_counter() - self.start)
        seconds = max(0.0, left * self.own[name] / sum(self.own.values()))
        own = self.own.pop(name)
        return seconds if self.is_only or seconds >= SMALLEST_PART * own else None


def run_benchmark(name, config, device, seconds):
    """Run one benchmark and write its result file; return the results."""
    bench = Bench(device, seconds, config.nanogpt, config.position)
    options = {
        "device": config.device,
        "budget_seconds": config.budget_seconds,
        "nanogpt": config.nanogpt is not None,  # without its path
        "position": config.position,
    }
    results = describe(name, device, options)
    print(f"{name}: {seconds:.0f} s, {results['machine']}, {results['versions']}", flush=True)
    torch.manual_seed(0)
    results["rows"] = BENCHMARKS[name].measure(bench)
    results["notes"] = bench.notes
    results["goals"] = goal_values(results)
    if results["rows"]:
        print(write_results(config.out_dir, results))
    return results


def run_all(names, config, device):
    """Run benchmarks within the budget, whatever becomes of the others; return their results."""
    plan = Plan(names, device, config.budget_seconds)
    all_results = []
    for name in names:
        seconds = plan.seconds(name)
        if seconds is None:
            print(f"{name} is skipped: too little is left of {plan.budget} s (--budget_seconds)")
            continue
        try:
            all_results.append(run_benchmark(name, config, device, seconds))
        except Exception as error:  # of any kind: the other benchmarks still run
            if len(names) == 1 and not is_users(error):
                raise
            message = explain(name, error)
            if len(names) == 1:
                raise UserError(message) from error
            print(f"{name} failed: {message}", flush=True)
        release_memory(device)
    return all_results


def is_users(error):
    """Return whether an error is one that the user can cure, and not a bug."""
    return isinstance(error, UserError) or is_out_of_memory(error)


def explain(name, error):
    """Return a benchmark's error as one line."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory in the benchmark {name}, which needs a larger device"
    reason = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {reason}"


def release_memory(device):
    """Give back the GPU memory that torch keeps, which the processes of later benchmarks need."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv):
    config = configure(BenchConfig, argv, __doc__, positional="what")
    check_minimum(config, 1, "budget_seconds", "position")
    if config.what == "document":
        print(write_document(config.out_dir))
        return
    names = chosen_benchmarks(config.what)
    if config.nanogpt is not None:
        check_nanogpt(config.nanogpt)
    device = pick_device(config.device)
    keep_freed_memory()
    all_results = run_all(names, config, device)
    print(write_document(config.out_dir))
    lines = shortfalls(all_results)
    if lines:
        print("goals that fall short:")
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
