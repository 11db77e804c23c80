"""How far back can it copy from? Accuracy over distance: full attention, grouped queries, windows.

    python -m experiments.recall --preset=cpu

The task: a random text of d tokens, again and again. From its second round on each next token is known, and stands d
tokens back, behind the same token as now: what induction heads find (Olsson et al. 2022). Two stacked windows see
2 (window - 1) tokens back; but the second layer's head must find the match in one look of `window` keys.
"""

import sys
from dataclasses import dataclass, field
from statistics import mean

import torch

from configurator import configure, program
from experiments.steps import build
from experiments.study import COLOURS, Study, StudyConfig, markdown, seeds_of
from optimizer import learning_rate, make_optimizer

DISTANCES = (4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass
class Config:
    shape: dict = field(default_factory=lambda: {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128})
    vocab_size: int = 64
    batch_size: int = 16
    windows: tuple = (8, 16, 32)
    seeds: tuple = (1, 2)
    # As train.py has them
    max_steps: int = 2000
    learning_rate: float = 2e-3
    min_lr: float = 0.0
    warmup_steps: int = 50
    lr_schedule: str = "wsd"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98


WIDE = {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 128}
PRESETS = {"cpu": Config(), "gpu": Config(shape=WIDE, batch_size=128, max_steps=5000, learning_rate=3e-4)}


def contestants(config):
    models = {"full": {"model": "model"}, "GQA, 1 head": {"model": "model_gqa", "n_kv_head": 1}}
    return models | {f"window {w}": {"model": "model_swa", "window": w} for w in config.windows}


def batch(config, generator, distances):
    """Inputs and targets (B, T); the targets of a text's first round are -1: nobody can know them."""
    T = config.shape["block_size"]
    text = torch.randint(config.vocab_size, (len(distances), T + 1), generator=generator)
    text = text.gather(1, torch.arange(T + 1) % distances[:, None])
    targets = text[:, 1:].masked_fill(torch.arange(T) < distances[:, None], -1)
    return text[:, :-1], targets


def accuracies(config, shape, seed, device, dtype):
    """Train a model; returns the share of tokens that it then predicts at each of DISTANCES."""
    torch.manual_seed(seed)
    model = build(config.shape | shape | {"vocab_size": config.vocab_size}).to(device)
    optimizer, generator = make_optimizer(model, config), torch.Generator().manual_seed(seed)
    low, high = DISTANCES[0], DISTANCES[-1]
    for step in range(config.max_steps):
        share = torch.rand(config.batch_size, generator=generator)
        x, y = batch(config, generator, (low * ((high + 1) / low) ** share).long())  # as many short ones as long ones
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
    right = []
    for distance in DISTANCES:
        x, y = batch(config, generator, torch.full((64,), distance))
        with torch.inference_mode():
            guess = model(x.to(device)).argmax(-1).cpu()
        right.append((guess == y)[y != -1].float().mean().item())
    return right


def shares(state):
    """Markdown: the share of tokens that are right, at each distance, means over the seeds."""
    names = [key.removesuffix(", seed 1") for key in state["points"] if key.endswith(", seed 1")]
    rows = [[n, *(f"{mean(a):.2f}" for a in zip(*seeds_of(state, n), strict=True))] for n in names]
    return markdown(["distance", *DISTANCES], rows)


def draw(study, panel):
    for name, colour in zip(contestants(study.config), COLOURS, strict=False):
        runs = [study.state["points"][f"{name}, seed {seed}"] for seed in study.config.seeds]
        mean = torch.tensor(runs).mean(0).tolist()
        panel.plot(DISTANCES, mean, color=colour, marker="o", markersize=4)
        place = next((i for i, a in enumerate(mean) if a < 0.5), len(mean) - 1)
        panel.annotate(name, (DISTANCES[place], mean[place]), (6, 4), textcoords="offset points", color=colour)
    panel.set_xscale("log", base=2)
    panel.set_xticks(DISTANCES, [str(d) for d in DISTANCES])
    panel.set_xlim(right=100)
    panel.set_xlabel("distance of the token to copy (tokens)")
    panel.set_ylabel("accuracy")


@program
def main(argv):
    study = Study("recall", configure(StudyConfig, argv, __doc__), PRESETS)
    for seed in study.config.seeds:
        for name, shape in contestants(study.config).items():
            study.point(f"{name}, seed {seed}", accuracies, study.config, shape, seed, study.device, study.dtype)
    study.finish(lambda panel: draw(study, panel))


if __name__ == "__main__":
    main(sys.argv[1:])
