"""How far back does it remember? Accuracy over distance: full attention, grouped queries, windows of several sizes.

    python -m experiments.recall --preset=cpu

The task: noise, and in it one token of another kind, to be copied at every position from there on. Stacked windows see
n_layer (window - 1) tokens back, if every layer passes on what it has seen to the next: do they learn to?
"""

import sys
from dataclasses import dataclass, field
from statistics import mean

import torch

from common.errors import program
from common.optimizer import learning_rate, make_optimizer
from configurator import configure
from experiments.steps import build
from experiments.study import COLOURS, Study, StudyConfig, label, markdown, seeds_of


@dataclass
class Config:
    shape: dict = field(
        default_factory=lambda: {"n_layer": 4, "n_head": 4, "n_embd": 32, "block_size": 64}
    )
    vocab_size: int = 64  # half of it noise, half of it tokens to copy
    batch_size: int = 16
    tested: int = 2048  # sequences
    windows: tuple = (4, 8, 16)
    seeds: tuple = (1, 2)
    # As train.py has them
    max_steps: int = 1500
    learning_rate: float = 4e-3
    min_lr: float = 0.0
    warmup_steps: int = 50
    lr_schedule: str = "wsd"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98


WIDE = {"n_layer": 4, "n_head": 8, "n_embd": 512, "block_size": 1024}
PRESETS = {
    "cpu": Config(),
    "gpu": Config(shape=WIDE, windows=(32, 64, 128), max_steps=5000, learning_rate=3e-4),
}


def contestants(config):
    models = {"full": {"model": "model"}, "GQA, 1 head": {"model": "model_gqa", "n_kv_head": 1}}
    return models | {f"window {w}": {"model": "model_swa", "window": w} for w in config.windows}


def batch(config, size, generator):
    """Inputs and targets (size, T), and how far back the token to copy stands; the targets before it are -1."""
    T, half = config.shape["block_size"], config.vocab_size // 2
    x = torch.randint(half, (size, T), generator=generator)
    place, token = (torch.randint(n, (size, 1), generator=generator) for n in (T, half))
    x.scatter_(1, place, half + token)
    distance = torch.arange(T) - place
    return x, (half + token).expand(size, T).masked_fill(distance < 0, -1), distance


def accuracies(config, shape, seed, device, dtype):
    """Train a model; returns the share of tokens that it then copies, by distance (T values)."""
    torch.manual_seed(seed)
    model = build(config.shape | shape | {"vocab_size": config.vocab_size}).to(device)
    optimizer, generator = make_optimizer(model, config), torch.Generator().manual_seed(seed)
    for step in range(config.max_steps):
        x, y, _ = batch(config, config.batch_size, generator)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
    x, y, distance = batch(config, config.tested, generator)
    with torch.inference_mode():
        right = model(x.to(device)).argmax(-1).cpu() == y
    return [right[distance == d].float().mean().item() for d in range(config.shape["block_size"])]


def reach(shape, window):
    """How far back stacked windows see at most: each layer window - 1 tokens further."""
    return shape["n_layer"] * (window - 1)


def shares(state):
    """Markdown: the share that is right at some distances, among them the last in reach of a window, and the next."""
    shape, rows = state["config"]["shape"], []
    edges = [
        reach(shape, window) + more for window in state["config"]["windows"] for more in (0, 1)
    ]
    distances = sorted({1, shape["block_size"] // 4, shape["block_size"] // 2, *edges})
    for name in contestants(Config(**state["config"])):
        means = [mean(at) for at in zip(*seeds_of(state, name), strict=True)]
        rows.append([name, *(f"{means[distance]:.2f}" for distance in distances)])
    return markdown(["distance", *distances], rows)


def draw(state, panel):
    shape, windows = state["config"]["shape"], state["config"]["windows"]
    ends = [shape["block_size"] - 1] * 2 + [reach(shape, window) for window in windows]
    for i, (name, end) in enumerate(zip(contestants(Config(**state["config"])), ends, strict=True)):
        means = [mean(at) for at in zip(*seeds_of(state, name), strict=True)]
        panel.plot(means, color=COLOURS[i], linestyle="--" if name.startswith("GQA") else "-")
        panel.axvline(end, color=COLOURS[i], linestyle=":", linewidth=1)
        label(panel, (name, end, 0.9 - 0.12 * i, COLOURS[i]))
    panel.set_xlim(right=1.25 * shape["block_size"])
    panel.set_xlabel(f"distance (tokens); dotted: {shape['n_layer']} (window - 1)")
    panel.set_ylabel("share that is right")


@program
def main(argv):
    study = Study("recall", configure(StudyConfig, argv, __doc__), PRESETS)
    for seed in study.config.seeds:
        for name, shape in contestants(study.config).items():
            study.point(
                f"{name}, seed {seed}",
                accuracies,
                study.config,
                shape,
                seed,
                study.device,
                study.dtype,
            )
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
