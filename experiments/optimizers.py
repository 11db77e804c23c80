"""The final losses of AdamW and Muon over the learning rate, at three sizes.

python -m experiments.optimizers --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import run_program
from configurator import configure
from experiments.runs import SMALL, train_run, val_losses
from experiments.study import Study, StudyConfig
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table

SHARED = {
    "block_size": 128,
    "batch_size": 8,
    "total_batch_size": 1024,
    "eval_tokens": 2**17,
}
CPU_SIZES = {
    "0.4M": {"n_layer": 2, "n_head": 4, "n_embd": 128, "max_steps": 800},
    "3M": {"n_layer": 4, "n_head": 4, "n_embd": 256, "max_steps": 300},
    "10M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "max_steps": 150},
}
GPU_SIZES = {
    "124M": {"n_layer": 12, "n_head": 12, "n_embd": 768, "max_steps": 1000, "vocab_size": 50304}
}


@dataclass
class Config:
    run: dict  # options of train.py, of all runs
    sizes: dict  # {name: options of that size}
    adamw_rates: tuple = (1e-3, 2e-3, 4e-3)
    muon_rates: tuple = (0.005, 0.01, 0.02, 0.04)  # for the matrices in blocks
    rate_beside_muon: float = 4e-3  # AdamW's, for embeddings and vectors


PRESETS = {
    "cpu": Config(run=SMALL | SHARED, sizes=CPU_SIZES),
    "gpu": Config(
        run=SMALL
        | {"dataset": "fineweb", "block_size": 1024, "batch_size": 32, "total_batch_size": 2**17},
        sizes=GPU_SIZES,
        adamw_rates=(6e-4, 1.2e-3, 2.4e-3),
        muon_rates=(0.01, 0.02, 0.04),
        rate_beside_muon=2.4e-3,
    ),
}


def runs(config):
    """Return {name: options} of the runs of each size: AdamW at each rate, Muon at each."""
    options = {}
    for rate in config.adamw_rates:
        options[f"adamw {rate:g}"] = {"optimizer": "adamw", "learning_rate": rate}
    for rate in config.muon_rates:
        options[f"muon {rate:g}"] = {
            "optimizer": "muon",
            "learning_rate": config.rate_beside_muon,
            "muon_learning_rate": rate,
        }
    return options


def measure_loss(config, size, name):
    """Train one run; return its final validation loss."""
    max_steps = config.sizes[size]["max_steps"]
    options = config.run | {"eval_interval": max_steps} | config.sizes[size] | runs(config)[name]
    run = train_run(f"optimizers-{size}-{name}", options)
    return val_losses(run)[-1][1]


def losses(result):
    """Return a table of the final losses: a row for each optimizer and rate, a column per size."""
    config = Config(**result["config"])
    rows = []
    for name in runs(config):
        losses_of_sizes = [result["values"].get(f"{size}, {name}") for size in config.sizes]
        if None not in losses_of_sizes:
            rows.append([name, *[f"{loss:.4f}" for loss in losses_of_sizes]])
    steps = ["steps", *[options["max_steps"] for options in config.sizes.values()]]
    return markdown_table(["optimizer and rate", *config.sizes], [*rows, steps])


def draw(result, panel):
    """Plot the final loss over the rate, a line for each optimizer and size."""
    config = Config(**result["config"])
    optimizers = [("adamw", config.adamw_rates, "--"), ("muon", config.muon_rates, "-")]
    ends = []
    for size, color in zip(config.sizes, COLORS, strict=False):
        for optimizer, rates, style in optimizers:
            losses_of_rates = {  # of an unfinished study, those that are measured
                rate: result["values"].get(f"{size}, {optimizer} {rate:g}") for rate in rates
            }
            points = [item for item in losses_of_rates.items() if item[1] is not None]
            if points:
                x, y = zip(*points, strict=True)
                label = f"{optimizer} {size}"
                ends.append(draw_line(panel, label, x, y, color, linestyle=style))
    for end in ends:
        label_points(panel, end)
    panel.set_xscale("log")
    panel.set_xlim(right=3 * max(config.muon_rates))  # room for the labels
    panel.set_xlabel("learning rate of the matrices in blocks")
    panel.set_ylabel("validation loss (nats per byte)")


def main(argv):
    study = Study("optimizers", configure(StudyConfig, argv, __doc__), PRESETS)
    config = study.config
    for name in runs(config):
        for size in config.sizes:
            study.add(name, f"{size}, {name}", measure_loss, config, size, name)
    study.run(losses, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
