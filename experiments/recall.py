"""From how far back can a model recall a token? Full attention, GQA, and windows of several sizes.

    python -m experiments.recall --preset=cpu

The task: a sequence of noise holds one token of another kind, which is the target at its position
and at all later ones. n_layer layers with a sliding window have a receptive field of
n_layer * (window - 1) earlier tokens, if each layer passes on what the one below attended to. Does
training find that?
"""

import sys
from dataclasses import dataclass, field
from statistics import mean

import torch

from common.errors import run_program
from configurator import configure
from experiments.steps import TRAINING, Task, open_run, train_to_end
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS, label_points
from tools.results.table import markdown_table

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 32, "block_size": 64}
MEDIUM = {"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 1024}
ADAMW = TRAINING | {"optimizer": "adamw"}


@dataclass
class Config:
    shape: dict = field(default_factory=lambda: dict(SMALL))
    vocab_size: int = 64  # the lower half is noise, the upper half are tokens to recall
    batch_size: int = 16
    tested: int = 2048  # sequences of the test
    windows: tuple = (4, 8, 16)
    seeds: tuple = (1, 2, 3, 4)
    dtype: str = "auto"  # as train.py's option
    training: dict = field(  # options of train.py
        default_factory=lambda: ADAMW | {"max_steps": 1500, "learning_rate": 4e-3}
    )


PRESETS = {
    "cpu": Config(dtype="float32"),  # so small a model takes half as long as in bfloat16
    "gpu": Config(
        shape=MEDIUM,
        windows=(32, 64, 128),
        training=ADAMW | {"max_steps": 5000, "learning_rate": 3e-4},
    ),
}


def variants(windows):
    """Return {name: model and its own options} of the models compared."""
    models = {
        "full": {"model": "model"},
        "GQA, 1 head": {"model": "model_gqa", "n_kv_head": 1},
    }
    for window in windows:
        models[f"window {window}"] = {"model": "model_swa", "window": window}
    return models


def make_batch(config, size, generator):
    """Return inputs, targets and distances, (size, T) each, int64.

    A distance is how far back the token to recall is; where it is negative the target is -1.
    """
    T = config.shape["block_size"]
    half = config.vocab_size // 2
    x = torch.randint(half, (size, T), generator=generator)
    position = torch.randint(T, (size, 1), generator=generator)
    token = half + torch.randint(half, (size, 1), generator=generator)
    x.scatter_(1, position, token)
    distance = torch.arange(T) - position
    y = token.expand(size, T).masked_fill(distance < 0, -1)
    return x, y, distance


def measure_accuracies(config, name, seed, device, dtype):
    """Train a model; return the fraction of tokens that it recalls at each distance, T values."""
    T = config.shape["block_size"]
    shape = config.shape | variants(config.windows)[name] | {"vocab_size": config.vocab_size}
    generator = torch.Generator().manual_seed(seed)

    def next_batch(step):
        x, y, _ = make_batch(config, config.batch_size, generator)
        return x, y

    with open_run(shape, config.batch_size, device, dtype, seed=seed, **config.training) as run:
        run.loader = Task(T, next_batch)
        train_to_end(run)
    x, y, distance = make_batch(config, config.tested, generator)
    with torch.inference_mode():
        predictions = run.model(x.to(device)).argmax(-1).cpu()
    correct = predictions == y
    return [correct[distance == d].float().mean().item() for d in range(T)]


def farthest_distance(shape, window):
    """Return the largest distance in the receptive field: window - 1 tokens for each layer."""
    return shape["n_layer"] * (window - 1)


def mean_accuracies(result):
    """Return {name: accuracies by distance}, each the mean over the seeds."""
    measured = complete_rows(result, variants(result["config"]["windows"]))
    means = {}
    for name, values in measured.items():
        means[name] = [mean(of_seeds) for of_seeds in zip(*values, strict=True)]
    return means


def fractions(result):
    """Return a table of the fraction of tokens recalled, by model and distance.

    Two distances are chosen for each window: the farthest in its receptive field, and the next.
    """
    shape, windows = result["config"]["shape"], result["config"]["windows"]
    T = shape["block_size"]
    distances = {1, T // 4, T // 2}
    for window in windows:
        farthest = farthest_distance(shape, window)
        distances |= {farthest, farthest + 1}
    distances = sorted(distances)
    rows = []
    for name, accuracies in mean_accuracies(result).items():
        rows.append([name, *(f"{accuracies[distance]:.2f}" for distance in distances)])
    return markdown_table(["distance", *distances], rows)


def draw(result, panel):
    """Plot accuracy over distance, with a dotted line at the end of each receptive field."""
    shape, windows = result["config"]["shape"], result["config"]["windows"]
    T = shape["block_size"]
    for i, (name, accuracies) in enumerate(mean_accuracies(result).items()):
        options = variants(windows)[name]
        farthest = T - 1
        if "window" in options:
            farthest = farthest_distance(shape, options["window"])
        style = "--" if "n_kv_head" in options else "-"  # else GQA hides full attention
        panel.plot(accuracies, color=COLORS[i], linestyle=style)
        panel.axvline(farthest, color=COLORS[i], linestyle=":", linewidth=1)
        label_points(panel, (name, farthest, 0.9 - 0.12 * i, COLORS[i]))
    panel.set_xlim(right=1.25 * T)  # room for the labels
    panel.set_xlabel(f"distance (tokens); dotted: {shape['n_layer']} (window - 1)")
    panel.set_ylabel("fraction recalled")


def main(argv):
    study = Study("recall", configure(StudyConfig, argv, __doc__), PRESETS)
    names = variants(study.config.windows)
    study.add_seeds(names, measure_accuracies, study.device, study.dtype)
    study.run(fractions, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
