"""How many key-value pairs can a model look up, and from how far back?

    python -m experiments.associative --preset=cpu

The task (multi-query associative recall, Arora et al. 2023, "Zoology", section 3.2): a sequence
holds `pairs` pairs of a key and a value among noise. Each pair occurs twice, and at the second
occurrence of its key the target is the value that followed the first one. A model that has not
learned to look up can only guess: one of all values, or one of those that the sequence holds.

A window in one layer must hold the first occurrence, or the layers must pass pairs on, which takes
room in the residual stream for each pair. So the table is over the number of pairs, too.
"""

import sys
from dataclasses import dataclass, field
from statistics import mean

import torch

from common.errors import run_program
from configurator import configure
from experiments.intervals import format_mean
from experiments.steps import TRAINING, Task, open_run, train_to_end
from experiments.study import Study, StudyConfig, complete_rows
from tools.results.plot import COLORS, draw_line
from tools.results.table import markdown_table

# Two heads of 64 channels: with heads of 16 or 32, no trial learned this in 400 steps.
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 32}
MEDIUM = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 512}
RATES = {"learning_rate": 2e-3, "muon_learning_rate": 0.02}


@dataclass
class Config:
    shape: dict = field(default_factory=lambda: dict(SMALL))
    keys: int = 16  # kinds of tokens: as many keys as values as noise tokens
    pairs: tuple = (1, 2, 4, 8)  # in a sequence
    windows: tuple = (8, 16)
    batch_size: int = 64
    tested: int = 1024  # sequences of the test, for each number of pairs
    distances: tuple = (4, 8, 16, 32)  # upper ends of the classes of distances in the table
    seeds: tuple = (1, 2, 3, 4)
    training: dict = field(  # options of train.py
        default_factory=lambda: TRAINING | RATES | {"max_steps": 1000}
    )


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        shape=MEDIUM,
        keys=128,
        pairs=(4, 16, 64, 128),
        windows=(64, 128, 256),
        distances=(64, 128, 256, 512),
        training=TRAINING | RATES | {"max_steps": 5000},
    ),
}


def variants(config):
    """Return {name: model and its own options} of the models compared."""
    H, T = config.shape["n_head"], config.shape["block_size"]
    models = {
        "RoPE": {"model": "model_rope"},
        "RoPE + MQA": {"model": "model_rope_gqa_swa", "n_kv_head": 1, "window": T},
    }
    for window in config.windows:
        options = {"model": "model_rope_gqa_swa", "n_kv_head": H, "window": window}
        models[f"RoPE, window {window}"] = options
    return models


def make_batch(config, size, pairs, generator):
    """Return inputs, targets and distances, (size, T) each, int64.

    pairs   (size,), the number of pairs of each sequence

    Targets are -1 except at the second occurrence of a key; there the distance is how many tokens
    back the first one is.
    """
    T, K = config.shape["block_size"], config.keys
    # Two tokens are a slot. In a random order of the slots, those of number 2p and 2p + 1 are the
    # two occurrences of pair p, the earlier one the first; the slots that are left hold noise.
    order = torch.rand(size, T // 2, generator=generator).argsort(1)
    key = torch.rand(size, K, generator=generator).argsort(1)  # pair p has key[p]: all differ
    value = torch.randint(K, (size, K), generator=generator)
    x = 2 * K + torch.randint(K, (size, T), generator=generator)  # noise
    y = torch.full((size, T), -1)
    distance = torch.zeros(size, T, dtype=torch.int64)
    for p in range(int(pairs.max())):
        rows = (pairs > p).nonzero()[:, 0]
        slots = order[rows, 2 * p : 2 * p + 2].sort(1).values
        first, second = 2 * slots[:, 0], 2 * slots[:, 1]  # positions of the key
        for position in (first, second):
            x[rows, position] = key[rows, p]
            x[rows, position + 1] = K + value[rows, p]
        y[rows, second] = K + value[rows, p]
        distance[rows, second] = second - first
    return x, y, distance


def train_model(config, name, seed, generator, device, dtype):
    """Train a model; return it."""
    shape = config.shape | variants(config)[name] | {"vocab_size": 3 * config.keys}
    choices = torch.tensor(config.pairs)

    def next_batch(step):
        # First the most pairs only, which have the most targets: looking up is learned sooner.
        first_half = step < config.training["max_steps"] // 2
        of = choices[-1:] if first_half else choices
        chosen = torch.randint(len(of), (config.batch_size,), generator=generator)
        x, y, _ = make_batch(config, config.batch_size, of[chosen], generator)
        return x, y

    with open_run(shape, config.batch_size, device, dtype, seed=seed, **config.training) as run:
        run.loader = Task(shape["block_size"], next_batch)
        train_to_end(run)
        return run.model


def measure_accuracies(config, name, seed, device, dtype):
    """Train a model; return {number of pairs: fraction looked up in each class of distances}."""
    generator = torch.Generator().manual_seed(seed)
    model = train_model(config, name, seed, generator, device, dtype)
    accuracies = {}
    for pairs in config.pairs:
        counts = torch.full((config.tested,), pairs)
        x, y, distance = make_batch(config, config.tested, counts, generator)
        with torch.inference_mode():
            predictions = model(x.to(device)).argmax(-1).cpu()
        correct = (predictions == y).float()
        by_distance = []
        lower = 0
        for upper in config.distances:
            chosen = (y != -1) & (distance > lower) & (distance <= upper)
            by_distance.append(correct[chosen].mean().item())
            lower = upper
        accuracies[str(pairs)] = by_distance
    return accuracies


# Tables and plot ------------------------------------------------------------------------------


def mean_accuracies(values, pairs):
    """Return, for each seed, the mean accuracy over the classes of distances.

    So each class counts alike.
    """
    return [mean(value[str(pairs)]) for value in values]


def accuracies_over_distance(values, pairs):
    """Return, for each class of distances, the accuracies of the seeds."""
    return list(zip(*(value[str(pairs)] for value in values), strict=True))


def by_pairs(result):
    """Return a table of the fraction looked up, by model and number of pairs."""
    config = Config(**result["config"])
    rows = []
    for name, values in complete_rows(result, variants(config)).items():
        of_pairs = [mean_accuracies(values, pairs) for pairs in config.pairs]
        rows.append([name, *(format_mean(accuracies, digits=2) for accuracies in of_pairs)])
    return markdown_table(["pairs", *config.pairs], rows)


def by_distance(result):
    """Return a table of the fraction looked up, by model and distance, with the most pairs."""
    config = Config(**result["config"])
    most = config.pairs[-1]
    rows = []
    for name, values in complete_rows(result, variants(config)).items():
        of_distances = accuracies_over_distance(values, most)
        rows.append([name, *(format_mean(accuracies, digits=2) for accuracies in of_distances)])
    lowers = (1, *[upper + 1 for upper in config.distances[:-1]])
    spans = [f"{low} to {high}" for low, high in zip(lowers, config.distances, strict=True)]
    return markdown_table([f"distance ({most} pairs)", *spans], rows)


def draw(result, over_pairs, over_distance):
    """Plot the fraction looked up over the number of pairs, and over the distance."""
    config = Config(**result["config"])
    most = config.pairs[-1]
    measured = complete_rows(result, variants(config))
    for (name, values), color in zip(measured.items(), COLORS, strict=False):
        means = [mean(mean_accuracies(values, pairs)) for pairs in config.pairs]
        draw_line(over_pairs, name, config.pairs, means, color, markersize=3, label=name)
        means = [mean(accuracies) for accuracies in accuracies_over_distance(values, most)]
        draw_line(over_distance, name, config.distances, means, color, markersize=3)
    for panel in (over_pairs, over_distance):
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.axhline(1 / config.keys, color="gray", linewidth=0.8, linestyle=":")
        panel.set_ylim(0, 1.05)
    over_pairs.set_xlabel("pairs in a sequence (dotted: a guess among all values)")
    over_distance.set_xlabel(f"distance, up to (tokens), with {most} pairs")
    over_pairs.set_ylabel("fraction looked up")
    over_pairs.legend(frameon=False, fontsize="small")


def main(argv):
    study = Study("associative", configure(StudyConfig, argv, __doc__), PRESETS)
    study.add_seeds(variants(study.config), measure_accuracies, study.device, study.dtype)
    study.run(by_pairs, by_distance, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
