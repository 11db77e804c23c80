"""The models that the experiments compare, and their training runs.

A run is one of train.py, in out/experiments/runs. Several experiments use the same runs, so each is
trained only once. Size and speed are measured at the shape of GPT-2 124M, whatever was trained.

Presets:

    cpu            2 layers, 128 channels, 2.6 tokens per parameter: 40 seconds a run on two cores
    cpu_long       the same models, 20 tokens per parameter
    cpu_long_3m    4 layers, 256 channels, 5 tokens per parameter
    gpu            8 layers, 512 channels, on FineWeb
"""

from dataclasses import dataclass, field
from statistics import mean

import torch

import train
from common.errors import UserError
from experiments.study import OUT
from prepare_data import open_dataset
from tools.plot_loss import is_finished, read_log

GPT2_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}


@dataclass
class Config:
    name: str  # of the preset
    run: dict  # options of train.py
    seeds: tuple = (1, 2, 3, 4)
    shape: dict = field(default_factory=lambda: dict(GPT2_SHAPE))  # for size and speed
    batch_size: int = 1  # sequences of block_size tokens in a timed training step
    rounds: int = 3  # timed training steps of each model; ten times as many of decoding


SHARED = {"optimizer": "muon", "min_lr": 1e-5, "lr_schedule": "wsd"}
SMALL = SHARED | {
    "dataset": "stdlib",
    "n_layer": 2,
    "n_head": 8,
    "n_embd": 128,
    "block_size": 256,
    "batch_size": 8,
    "total_batch_size": 2048,
    "max_steps": 500,
    "eval_interval": 100,
    "eval_tokens": 2**17,
    "learning_rate": 8e-3,
    "muon_learning_rate": 0.01,
    "warmup_steps": 50,
    "beta2": 0.99,
    "log_interval": 100,
}
LONG = SMALL | {"max_steps": 4000, "eval_interval": 500}
LONG_3M = LONG | {
    "n_layer": 4,
    "n_embd": 256,
    "total_batch_size": 4096,
    "learning_rate": 4e-3,
}
MEDIUM = SHARED | {
    "dataset": "fineweb",
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 512,
    "block_size": 1024,
    "vocab_size": 50304,
    "batch_size": 32,
    "total_batch_size": 2**17,
    "max_steps": 2000,
    "eval_interval": 250,
    "eval_tokens": 2**21,
    "learning_rate": 2e-3,
    "muon_learning_rate": 0.02,
    "warmup_steps": 100,
    "log_interval": 50,
}
PRESETS = {
    "cpu": Config("cpu", run=SMALL),
    "cpu_long": Config("cpu_long", run=LONG),
    "cpu_long_3m": Config("cpu_long_3m", run=LONG_3M),
    "gpu": Config("gpu", run=MEDIUM, batch_size=16, rounds=10),
}


def variants(shape):
    """Return {name: model and its own options} of the models compared, those asked most first.

    GQA 1/4 has one KV head for four query heads, SWA 1/4 a window of a quarter of the sequence.

    shape   a dict with n_head and block_size, among others
    """
    H, T = shape["n_head"], shape["block_size"]
    all_three = "model_rope_gqa_swa"
    return {
        "base": {"model": "model"},
        "RoPE": {"model": "model_rope"},
        "GQA 1/4": {"model": "model_gqa", "n_kv_head": H // 4},
        "SWA 1/4": {"model": "model_swa", "window": T // 4},
        "all three": {"model": all_three, "n_kv_head": H // 4, "window": T // 4},
        "RoPE + SWA": {"model": all_three, "n_kv_head": H, "window": T // 4},
        "GQA 1/2": {"model": "model_gqa", "n_kv_head": H // 2},
        "MQA": {"model": "model_gqa", "n_kv_head": 1},
        "SWA 1/2": {"model": "model_swa", "window": T // 2},
        "SWA 1/16": {"model": "model_swa", "window": T // 16},
    }


def train_variant(config, name, seed):
    """Train a variant unless that is done; return the directory of its run."""
    return train_model(config, name, variants(config.run)[name], seed)


def train_model(config, name, model_options, seed):
    """Train a model with the preset's options unless that is done; return its run's directory."""
    options = {**config.run, **model_options, "seed": seed}
    return train_run(f"{config.name}-{config.run['dataset']}-{name}-{seed}", options)


def train_run(name, options, *config_files):
    """Start or resume a run of train.py; return its directory.

    Raises UserError if the run was stopped by a signal.
    """
    out_dir = OUT / "runs" / name.replace(" ", "_").replace("/", "_of_")
    arguments = [f"--{key}={value}" for key, value in options.items()]
    torch.compiler.reset()  # torch limits how often one function is compiled in a process
    train.main([*config_files, *arguments, f"--out_dir={out_dir}"])
    if not is_finished(out_dir):
        step = read_log(out_dir)[-1]["step"]
        raise UserError(f"{out_dir} was stopped at step {step}: the same command resumes it")
    return out_dir


def val_losses(out_dir):
    """Return [step, validation loss] of each evaluation of a run."""
    evaluations = [record for record in read_log(out_dir) if "val_loss" in record]
    return [[record["step"], record["val_loss"]] for record in evaluations]


def mean_curve(curves):
    """Return the steps of curves that were evaluated at the same steps, and their mean losses."""
    steps = [step for step, _ in curves[0]]
    mean_losses = [mean(curve[i][1] for curve in curves) for i in range(len(steps))]
    return steps, mean_losses


def shape_of_run(options):
    """Return the model options, common to all variants, that these options of train.py give."""
    _, meta = open_dataset(options["dataset"])
    shape = {key: options[key] for key in GPT2_SHAPE}
    return shape | {"vocab_size": options.get("vocab_size", meta["vocab_size"])}
