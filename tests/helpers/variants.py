"""Small models of every model*.py, and what tests of several files do with them.

A model is made small through the fields that its GPTConfig has; other fields keep their defaults.
Where attention is tested, every parameter is random and large: with GPT-2's small initial weights
attention is almost an average, and a wrong mask or scale would hardly show.
"""

import dataclasses
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# Without the exercises of tools/exercise.py; conftest.py adds those that pytest -k names.
MODELS = [path.stem for path in sorted(ROOT.glob("model*.py")) if "_my_" not in path.stem]
WINDOW = 5
SMALL = {
    "block_size": 16,
    "vocab_size": 61,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "n_kv_head": 2,
    "window": WINDOW,
}
# Prompt lengths shorter than, equal to and longer than the window.
PROMPTS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1]


def fields(module):
    """Return the names of the fields of a module's GPTConfig."""
    return {field.name for field in dataclasses.fields(module.GPTConfig)}


def make(module, **changes):
    """Return a small model with its initial weights."""
    torch.manual_seed(0)
    options = SMALL | changes
    own = {name: value for name, value in options.items() if name in fields(module)}
    return module.GPT(module.GPTConfig(**own))


@torch.no_grad()
def make_vivid(module, **changes):
    """Return a small model with large random parameters, in evaluation mode."""
    model = make(module, **changes)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


def tokens(*shape, vocab_size=SMALL["vocab_size"], seed=1):
    """Return random token ids of a shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def last_logits(model, idx):
    """Return the logits after each token (B, T, V), by a forward without cache per prefix."""
    prefixes = [idx[:, : t + 1] for t in range(idx.size(1))]
    return torch.cat([model(prefix)[:, -1:] for prefix in prefixes], dim=1)


@torch.no_grad()
def feed(model, cache, *chunks):
    """Return the logits after each chunk (B, len(chunks), V), by forwards with a cache."""
    return torch.cat([model(chunk, cache=cache) for chunk in chunks], dim=1)


def close(a, b):
    """Assert that two tensors agree up to float32 rounding."""
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
