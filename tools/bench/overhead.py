"""Overhead: the fraction of a run's time that is not computation.

The computation is forward and backward passes, gradient norm and clipping, and the optimizer. The
rest is overhead: the loader, the log and the console, the data side of an evaluation (not its
forward passes), and checkpoints.

Method: train.py's own loop runs in this process, with a clock around its functions. Overhead is all
time of the loop that is outside of train_step and of evaluate's forward passes, and what train_step
spends in the functions of IN_STEP. (The difference of a whole run and of bare steps would also be
overhead, but one or two percent are below the noise of two such runs.) Saves and evaluations are
rare, so a short run gives the seconds of one of each, and the intervals of the config say how many
there are per step, if every evaluation is a new best loss, which is saved.
"""

import contextlib
import functools
import io
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import train
from common import run_dir
from common.dataloader import Loader
from common.device import pick_dtype
from common.distributed import ProcessGroup
from common.models import ROOT, model_module
from tools.bench.runs import open_run, step_options
from tools.results.turns import Budget, spread, synchronize, time_turns
from training.start import read_options

BYTES = 257  # the vocabulary of quickstart's dataset

# What train_step calls that is not computation.
IN_STEP = {
    "loader": (Loader, "train_batch"),
    "prefetch": (Loader, "prefetch"),
    "signals": (ProcessGroup, "any_rank"),
    "dropout_seed": (train, "seed_dropout"),
    "finite_check": (train, "check_finite"),
    "schedule": (train, "learning_rate"),
}
IN_LOOP = {
    "step": (train, "train_step"),
    "evaluate": (train, "evaluate"),
    "save": (run_dir, "save_step"),
}


@dataclass
class ShortRun:
    """A run to measure: a config, shortened to some steps and two evaluations."""

    name: str
    config_file: str
    steps: int
    eval_batches: int


def short_runs(bench):
    quickstart, gpt2 = bench.sizes.run_steps
    return [
        ShortRun("quickstart", "config/quickstart.py", steps=quickstart, eval_batches=8),
        ShortRun("GPT-2 124M", "config/gpt2.py", steps=gpt2, eval_batches=1),
    ]


class Clock:
    """Adds up the seconds and the calls of functions, by their place in the calls: step/loader."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.calls = defaultdict(int)
        self.names = []

    def timed(self, name, function):
        """Return the function with the clock around it, in the thread that trains."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self.names.append(name)
            place = "/".join(self.names)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[place] += time.perf_counter() - start
                self.calls[place] += 1
                self.names.pop()

        return call

    @contextlib.contextmanager
    def around(self, functions):
        """Put the clock around functions {name: (owner, attribute)} in a `with` block."""
        originals = [(*place, getattr(*place)) for place in functions.values()]
        try:
            for name, (owner, attribute) in functions.items():
                setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))
            yield
        finally:
            for owner, attribute, function in originals:
                setattr(owner, attribute, function)


def forward_and_wait(run, clock):
    """Return run.wrapped, which in an evaluation waits for the device and is timed."""
    forward = run.wrapped

    def finish(*inputs):
        loss = forward(*inputs)
        synchronize(run.device)
        return loss

    timed = clock.timed("forward", finish)

    def call(*inputs):
        # In a step it must not wait: the device would be idle while the host prepares its work.
        return timed(*inputs) if "evaluate" in clock.names else forward(*inputs)

    return call


def read_config(short, bench):
    """Return the filled TrainConfig and the model options of a config file."""
    path = str(ROOT / short.config_file)
    config, model_options, _ = read_options(train.TrainConfig, [path], doc="")
    device = bench.device
    if short.name == "quickstart":
        return replace(config, device=str(device)), model_options | {"vocab_size": BYTES}
    B, T = bench.sizes.batch_size, bench.sizes.config().block_size
    options = step_options(B, T, device, pick_dtype("auto", device))
    if bench.sizes.keeps_total_batch_size:
        del options["total_batch_size"]
    return replace(config, **options), bench.sizes.model


def time_run(short, bench):
    """Train a short run; return its Clock, the seconds of its loop, its Run and its config."""
    config, model_options = read_config(short, bench)
    changed = vars(config) | {
        "max_steps": short.steps,
        "eval_interval": short.steps,
        "warmup_steps": 0,
    }
    del changed["dataset"], changed["out_dir"]
    clock = Clock()
    T = model_module("model").GPTConfig(**model_options).block_size
    changed["eval_tokens"] = short.eval_batches * config.batch_size * T
    with open_run(model_options, **changed) as run:
        train.train_step(run)  # allocates the optimizer's state; not counted as a step
        run.out_dir.mkdir(exist_ok=True)
        run.wrapped = forward_and_wait(run, clock)
        with clock.around(IN_STEP | IN_LOOP), contextlib.redirect_stdout(io.StringIO()):
            start = time.perf_counter()
            train.train_loop(run)
            seconds = time.perf_counter() - start
    return clock, seconds, run, config


def measure_run(short, bench):
    """Return the parts of the overhead of one step, in seconds, and their fraction of its time."""
    clock, seconds, run, config = time_run(short, bench)
    spent = clock.seconds
    in_step = {name: spent[f"step/{name}"] / short.steps for name in IN_STEP}
    outside = seconds - spent["step"] - spent["evaluate"] - spent["save"]
    save = spent["save"] / clock.calls["save"]
    evaluated = clock.calls["evaluate/forward"]  # batches
    eval_batch = (spent["evaluate"] - spent["evaluate/forward"]) / evaluated
    eval_batches = -(-config.eval_tokens // (config.batch_size * run.loader.block_size))
    parts = {
        "loader": in_step.pop("loader"),
        "log_and_loop": outside / short.steps + sum(in_step.values()),
        "evaluation": eval_batch * eval_batches / config.eval_interval,
        "checkpoints": save / min(config.eval_interval, config.checkpoint_interval),
    }
    not_computation = sum(spent[f"step/{name}"] for name in IN_STEP)
    computation = (spent["step"] - not_computation) / short.steps
    overhead = sum(parts.values())
    return parts | {"step": computation + overhead, "fraction": overhead / (computation + overhead)}


def measure_overhead(bench):
    """Return one row per config: milliseconds per step of each part, and the whole fraction."""
    contestants = {
        short.name: functools.partial(measure_run, short, bench) for short in short_runs(bench)
    }
    turns = time_turns(contestants, Budget(bench.deadline, least=1).allows)
    rows = []
    for name, results in turns.items():
        row = {"config": name}
        for part in results[0]:
            scale = 1 if part == "fraction" else 1000
            column = part if part == "fraction" else f"{part}_ms"
            row[column] = spread([scale * result[part] for result in results])
        rows.append(bench.show(row))
    return rows
