"""Training and decoding outside of a whole run: on data made on the spot, and to be timed."""

from contextlib import ExitStack
from functools import partial

import torch

from common.cpu import prepare_for_sampling
from common.device import peak_memory
from common.models import model_module
from tools.bench import runs as bench_runs
from tools.bench.runs import take_step
from tools.bench.sampling import make_decode_step
from tools.results.turns import take_turns

# Options of train.py for small models on data that are made on the spot.
TRAINING = {
    "optimizer": "muon",
    "learning_rate": 8e-3,
    "muon_learning_rate": 0.01,
    "min_lr": 0.0,
    "warmup_steps": 50,
    "lr_schedule": "wsd",
    "beta2": 0.98,
}


def build_model(shape):
    """Return a new model.

    shape   "model", the name of the model file, and options of its GPTConfig
    """
    options = dict(shape)
    module = model_module(options.pop("model"))
    return module.GPT(module.GPTConfig(**options))


def cache_bytes(shape, tokens):
    """Return the bytes of the KV cache of a sequence of this length, in float32."""
    with torch.device("meta"):
        return build_model(shape).make_cache(1, tokens).nbytes


# Training -------------------------------------------------------------------------------------


def open_run(shape, B, device, dtype, **options):
    """Give a Run of train.py with one micro-step of B sequences in a `with` block.

    shape     "model", the name of the model file, and options of its GPTConfig
    options   further options of train.py; without a dataset it trains on random tokens
    """
    model_options = dict(shape)
    options |= {"model": model_options.pop("model")}
    options |= bench_runs.step_options(B, shape["block_size"], device, dtype)
    return bench_runs.open_run(model_options, **options)


class Task:
    """Takes the place of a run's Loader: batches that a function makes on the spot.

    next_batch   function from the step to inputs and targets (B, T), int64, on the CPU
    """

    def __init__(self, block_size, next_batch):
        self.block_size = block_size
        self.next_batch = next_batch

    def train_batch(self, first, count):
        """Return the `count` sequences of a step, as Loader does from the number `first` on."""
        return self.next_batch(first // count)

    def prefetch(self, *arguments):
        """Do nothing: these batches are made when they are used."""


def train_to_end(run):
    """Take all steps of a run; nothing is logged or saved."""
    while run.step < run.config.max_steps:
        take_step(run)


def time_steps(shapes, B, rounds, device, dtype, **options):
    """Return the median seconds of a training step of each of {name: shape}; they take turns.

    options   further options of train.py
    """
    steps = {}
    with ExitStack() as stack:
        for name, shape in shapes.items():
            run = stack.enter_context(open_run(shape, B, device, dtype, **options))
            steps[name] = partial(take_step, run)
        return take_turns(rounds, device, steps)


def measure_step_memory(shape, B, device, dtype):
    """Return the peak memory of training steps in GB, beyond what the process used before."""
    before = peak_memory(device)
    with open_run(shape, B, device, dtype) as run:
        for _ in range(2):  # the first step creates the optimizer state, the second begins with it
            take_step(run)
    return peak_memory(device) - before


# Decoding -------------------------------------------------------------------------------------


def time_decoding(shapes, B, position, rounds, device, dtype):
    """Return two dicts: seconds of a decode step, and bytes of the KV cache, of {name: shape}.

    The models take turns, with B samples each. A step decodes at the same position each time, with
    the same cached tokens before it, as sample.py does for B samples of one prompt.
    """
    steps, bytes_of_caches = {}, {}
    for name, shape in shapes.items():
        model = build_model(shape).to(device, dtype).eval()
        prepare_for_sampling(model, rows=B)  # on a CPU, as sample.py does
        cache = model.make_cache(B, position + 1)
        steps[name] = make_decode_step(model, cache, position)
        bytes_of_caches[name] = cache.nbytes
    return take_turns(rounds, device, steps), bytes_of_caches
