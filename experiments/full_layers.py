"""Local layers with some full ones: what does a full layer among local ones bring?

    python -m experiments.full_layers --preset=cpu

Most models with windows since 2024 let some of their layers attend to the whole sequence. Here
every fourth layer of model_rope_gqa_swa.py is full: LocalGlobalGPT, a subclass, so that the model
file stays about one idea. It is compared with all layers local and with all layers full.
"""

import sys
from dataclasses import dataclass

import torch

from common.dataloader import Loader
from common.errors import run_program
from common.models import model_module
from configurator import configure
from experiments.intervals import format_difference, format_mean, interval_of, verdict
from experiments.steps import Schedule, train_on
from experiments.study import COLOURS, Study, StudyConfig, points_of_seeds
from prepare_data import open_dataset
from tools.bench.results import markdown_table

MODEL = model_module("model_rope_gqa_swa")
SMALL = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 96, "block_size": 256}
MEDIUM = {"n_layer": 12, "n_head": 12, "n_kv_head": 12, "n_embd": 768, "block_size": 1024}


@dataclass
class Config:
    run: dict  # the dataset, the model's shape and the size of a batch
    schedule: Schedule
    window_fractions: tuple = (16,)  # the windows are T / 16
    eval_tokens: int = 2**17
    seeds: tuple = (1, 2, 3, 4)


PRESETS = {
    "cpu": Config({"dataset": "stdlib", "batch_size": 8, **SMALL}, Schedule(400)),
    "gpu": Config(
        {"dataset": "fineweb", "batch_size": 32, "vocab_size": 50304, **MEDIUM},
        Schedule(5000, learning_rate=3e-3, muon_learning_rate=0.02),
    ),
}


class LocalGlobalGPT(MODEL.GPT):
    """The model of model_rope_gqa_swa.py with every fourth layer full.

    For training and evaluation only: KVCache has one length for all layers.
    """

    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h[3::4]:
            block.attn.window = config.block_size

    def make_cache(self, batch_size, max_len=None):
        raise NotImplementedError("KVCache has one length for all layers")


def variants(config):
    """Return {name: (class, window)} of the models compared."""
    T = config.run["block_size"]
    models = {"all full": (MODEL.GPT, T)}
    for fraction in config.window_fractions:
        models[f"all local, T/{fraction}"] = (MODEL.GPT, T // fraction)
        models[f"every fourth full, T/{fraction}"] = (LocalGlobalGPT, T // fraction)
    return models


def measure_loss(config, name, seed, device, dtype):
    """Train a model; return its final validation loss."""
    make_model, window = variants(config)[name]
    options = dict(config.run)
    folder, meta = open_dataset(options.pop("dataset"))
    B = options.pop("batch_size")
    options = {"vocab_size": meta["vocab_size"], **options, "window": window}
    torch.manual_seed(seed)
    model = make_model(MODEL.GPTConfig(**options)).to(device)
    loader = Loader(folder, options["block_size"], options["vocab_size"], seed)
    train_on(model, lambda step: loader.train_batch(step * B, B), config.schedule, device, dtype)
    model.eval()
    total, count = 0.0, 0
    for x, y in loader.val_batches(config.eval_tokens, B):
        targets = int((y != -1).sum())
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), autocast:
            total += model(x.to(device), y.to(device)).item() * targets
        count += targets
    return total / count


def row_against_full(name, values, full):
    """Return a row of the table: the mean loss, and the paired difference from all layers full."""
    return [name, format_mean(values), format_difference(values, full), verdict(values, full)]


def losses(state):
    """Return a table of the final losses, and of their differences from all full and all local."""
    config = Config(**state["config"])
    full = points_of_seeds(state, "all full")
    rows = [["all full", format_mean(full), "", "", ""]]
    for fraction in config.window_fractions:
        local = points_of_seeds(state, f"all local, T/{fraction}")
        mixed = points_of_seeds(state, f"every fourth full, T/{fraction}")
        local_row = row_against_full(f"all local, T/{fraction}", local, full)
        mixed_row = row_against_full(f"every fourth full, T/{fraction}", mixed, full)
        rows.append([*local_row, ""])
        rows.append([*mixed_row, format_difference(mixed, local)])
    header = ["", "validation loss", "minus all full", "so it is", "minus all local"]
    return markdown_table(header, rows)


def draw(state, panel):
    """Plot the mean final losses with their 95 % intervals."""
    names = list(variants(Config(**state["config"])))
    for i, name in enumerate(names):
        loss = interval_of(points_of_seeds(state, name))
        panel.errorbar(loss.mean, i, xerr=loss.half_width, fmt="o", capsize=4, color=COLOURS[i])
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("validation loss (nats per token), 95 % interval")


def main(argv):
    study = Study("full_layers", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for name in variants(config):
        for seed in config.seeds:
            arguments = (config, name, seed, study.device, study.dtype)
            study.measure_once(f"{name}, seed {seed}", measure_loss, *arguments)
    study.finish(draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
