"""Runs of train.py in this process, taken step by step."""

import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

import train
from common.distributed import ProcessGroup
from common.files import write_json
from common.models import make_config, model_module
from tools.bench.sizes import dtype_name
from training import parallel

RANDOM_TOKENS = 1 << 18  # of a dataset that is only there to be read


def write_random_dataset(folder, vocab_size):
    """Write train.bin, val.bin and meta.json of random token ids below vocab_size."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        ids = random.integers(vocab_size, size=RANDOM_TOKENS)
        ids.astype("<u2").tofile(folder / f"{split}.bin")
    write_json(folder / "meta.json", {"tokenizer": "gpt2", "vocab_size": vocab_size})


@contextmanager
def open_run(model_options, **options):
    """Give a Run of train.py in a `with` block, prepared for its first step as by train.py.

    model_options   of GPTConfig
    options         of TrainConfig; without a dataset it trains on random tokens
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        folder = Path(folder)
        if "dataset" not in options:
            module = model_module(options.get("model", "model"))
            write_random_dataset(folder / "data", make_config(module, model_options).vocab_size)
            options["dataset"] = str(folder / "data")
        config = train.TrainConfig(**options, out_dir=str(folder / "out"))
        run = train.setup(config, model_options, ProcessGroup(timeout=60), stack)
        parallel.prepare_forward(run)
        yield run


def step_options(B, T, device, dtype):
    """Return the options of train.py for steps of one micro-step: B sequences of T tokens."""
    return {
        "batch_size": B,
        "total_batch_size": B * T,
        "device": str(device),
        "dtype": dtype_name(dtype),
    }


def take_step(run):
    """Take one optimizer step."""
    train.train_step(run)
    run.step += 1
