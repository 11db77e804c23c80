"""Local layers with some full ones: what does a full layer among local ones bring?

    python -m experiments.full_layers --preset=cpu

Most models with windows since 2024 let some of their layers attend to the whole sequence. Here
every fourth layer of a model_rope_gqa_swa is given a window of the whole sequence, so that the
model file stays about one idea. It is compared with all layers local and with all layers full.
"""

import sys
from dataclasses import dataclass

import train
from common.errors import run_program
from configurator import configure
from experiments.intervals import format_difference, format_mean, interval_of, verdict
from experiments.steps import TRAINING, open_run, train_to_end
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS
from tools.results.table import markdown_table

SMALL = {"n_layer": 4, "n_head": 4, "n_kv_head": 4, "n_embd": 96, "block_size": 256}
MEDIUM = {"n_layer": 12, "n_head": 12, "n_kv_head": 12, "n_embd": 768, "block_size": 1024}


@dataclass
class Config:
    run: dict  # the dataset, the model's shape and the size of a batch
    training: dict  # options of train.py
    window_fractions: tuple = (16,)  # the windows are T / 16
    eval_tokens: int = 2**17
    seeds: tuple = (1, 2, 3, 4)


ON_A_GPU = TRAINING | {"max_steps": 5000, "learning_rate": 3e-3, "muon_learning_rate": 0.02}
PRESETS = {
    "cpu": Config({"dataset": "stdlib", "batch_size": 8, **SMALL}, TRAINING | {"max_steps": 400}),
    "gpu": Config(
        {"dataset": "fineweb", "batch_size": 32, "vocab_size": 50304, **MEDIUM}, ON_A_GPU
    ),
}


def variants(config):
    """Return {name: (window, whether every fourth layer is full)} of the models compared."""
    T = config.run["block_size"]
    models = {"all full": (T, False)}
    for fraction in config.window_fractions:
        models[f"all local, T/{fraction}"] = (T // fraction, False)
        models[f"every fourth full, T/{fraction}"] = (T // fraction, True)
    return models


def widen_every_fourth_layer(model):
    """Give every fourth layer a window of the whole sequence; in place.

    For training and evaluation only: KVCache has one length for all layers.
    """
    for block in model.transformer.h[3::4]:
        block.attn.window = model.config.block_size


def measure_loss(config, name, seed, device, dtype):
    """Train a model; return its final validation loss."""
    window, is_mixed = variants(config)[name]
    shape = {**config.run, "model": "model_rope_gqa_swa", "window": window}
    B = shape.pop("batch_size")
    options = {"dataset": shape.pop("dataset"), "eval_tokens": config.eval_tokens, "seed": seed}
    with open_run(shape, B, device, dtype, **config.training, **options) as run:
        if is_mixed:
            widen_every_fourth_layer(run.model)
        train_to_end(run)
        return train.evaluate(run)["val_loss"]


def losses(result):
    """Return a table of the final losses, and of their differences from all full and all local."""
    final = complete_rows(result, variants(Config(**result["config"])))
    full = final.get("all full")
    rows = []
    for name, values in final.items():
        row = [name, format_mean(values)]
        if name != "all full":
            row += [format_difference(values, full), verdict(values, full)]
        if name.startswith("every fourth"):
            local = final.get(name.replace("every fourth full", "all local"))
            row.append(format_difference(values, local))
        rows.append(row)
    header = ["", "validation loss", "minus all full", "verdict", "minus all local"]
    return markdown_table(header, rows)


def draw(result, panel):
    """Plot the mean final losses with their 95 % intervals."""
    final = complete_rows(result, variants(Config(**result["config"])))
    for i, values in enumerate(final.values()):
        loss = interval_of(values)
        panel.errorbar(loss.mean, i, xerr=loss.half_width, fmt="o", capsize=4, color=COLORS[i])
    panel.set_yticks(range(len(final)), list(final))
    panel.set_xlabel("validation loss (nats per token), 95 % interval")


def main(argv):
    study = Study("full_layers", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(variants(study.config), measure_loss, study.device, study.dtype)
    study.run(losses, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
