"""The models that the experiments compare, and their training runs.

A run is one of train.py's, in out/experiments/runs; several experiments look at the same ones. What is timed has the
shape of GPT-2 124M, whatever was trained.
"""

from dataclasses import dataclass, field

import torch

import train
from common.errors import UserError
from experiments.study import OUT
from prepare_data import open_dataset
from tools.plot_loss import read_log


@dataclass
class Config:
    run: dict  # options of train.py
    seeds: tuple = (1, 2)
    shape: dict = field(
        default_factory=lambda: {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
    )
    batch_size: int = 1  # sequences of block_size tokens in a timed training step
    rounds: int = 3  # of training steps taking turns; ten times as many of decoding


SMALL = {"dataset": "stdlib", "n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256}
SMALL |= {
    "batch_size": 8,
    "total_batch_size": 2048,
    "max_steps": 800,
    "eval_interval": 100,
    "eval_tokens": 2**20,
}
SMALL |= {
    "learning_rate": 4e-3,
    "min_lr": 1e-5,
    "warmup_steps": 50,
    "lr_schedule": "wsd",
    "beta2": 0.99,
}
MEDIUM = {
    "dataset": "fineweb",
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 512,
    "block_size": 1024,
    "vocab_size": 50304,
}
MEDIUM |= {
    "batch_size": 32,
    "total_batch_size": 2**17,
    "max_steps": 2000,
    "eval_interval": 250,
    "eval_tokens": 2**21,
}
MEDIUM |= {"learning_rate": 1e-3, "min_lr": 1e-5, "warmup_steps": 100, "lr_schedule": "wsd"}
PRESETS = {
    "cpu": Config(run=SMALL | {"log_interval": 100}),
    "gpu": Config(run=MEDIUM | {"log_interval": 50}, batch_size=16, rounds=10),
}


def variants(n_head, block_size, **_):
    """The models compared, for a shape, by name."""
    half, quarter = n_head // 2, n_head // 4
    return {
        "base": {"model": "model"},
        "RoPE": {"model": "model_rope"},
        "GQA 1/2": {"model": "model_gqa", "n_kv_head": half},
        "GQA 1/4": {"model": "model_gqa", "n_kv_head": quarter},
        "SWA 1/4": {"model": "model_swa", "window": block_size // 4},
        "SWA 1/16": {"model": "model_swa", "window": block_size // 16},
        "RoPE + SWA": {
            "model": "model_rope_gqa_swa",
            "n_kv_head": n_head,
            "window": block_size // 4,
        },
        "all three": {"model": "model_rope_gqa_swa", "n_kv_head": half, "window": block_size // 4},
    }


def run_of(config, name, seed):
    """The finished run of a variant, trained where it is missing."""
    return trained(
        f"{config.run['dataset']}-{name}-{seed}",
        config.run | variants(**config.run)[name] | {"seed": seed},
    )


def trained(name, options, *configs):
    """The directory of a run of train.py with config files and options, finished; UserError where it was stopped."""
    run = OUT / "runs" / name.replace(" ", "_").replace("/", "_of_")
    torch.compiler.reset()  # of the run before: compiled variants of one function are limited in number
    train.main(
        [*configs, *(f"--{key}={value}" for key, value in options.items()), f"--out_dir={run}"]
    )
    if read_log(run)[-1]["step"] < options["max_steps"]:
        raise UserError(f"{run} was stopped: the same command goes on from there")
    return run


def val_losses(run):
    """[step, validation loss] of a run, wherever it was evaluated."""
    return [
        [record["step"], record["val_loss"]] for record in read_log(run) if "val_loss" in record
    ]


def shape_of(run):
    """The shape of the models that these options train, but for the model."""
    shape = {key: run[key] for key in ("n_layer", "n_head", "n_embd", "block_size")}
    return shape | {
        "vocab_size": run.get("vocab_size") or open_dataset(run["dataset"])[1]["vocab_size"]
    }
