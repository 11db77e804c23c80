"""Models of transformers, and what tests of formats share."""

import json
from pathlib import Path

import pytest
import torch
from conftest import arguments
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import train
from common.errors import UserError
from common.pretrained import load_model


def random_gpt2(**shape):
    """Return a GPT-2 of transformers with random weights.

    They are larger than its initialization makes them, so that wrong weights change the logits.
    """
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 301}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**(sizes | shape))).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def logits(model, ids):
    """Return the logits of our model or of one of transformers."""
    model.eval()
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)


def max_difference(first, second):
    return (first - second).abs().max()


def assert_equal_logits(first, second, length=16):
    """Assert that two models have equal logits for random tokens, up to rounding."""
    ids = torch.randint(first.config.vocab_size, (2, length))
    assert max_difference(logits(first, ids), logits(second, ids)) < 1e-4


def load_error(source):
    """Return the message of the UserError that loading this model raises; it is one line."""
    with pytest.raises(UserError) as error:
        load_model(str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


def change_json(path, changes):
    """Change fields of a JSON file."""
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder, change):
    """Change the tensors of a saved model by a function of their dict."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def train_vivid(**options):
    """Train a run whose weights are so large that each token depends on those before it."""
    shape = {"block_size": 16, "n_head": 4, "n_embd": 32}
    learning = {"max_steps": 8, "learning_rate": 0.03, "dropout": 0.0}
    intervals = {"eval_interval": 8, "checkpoint_interval": 8}
    train.main(arguments(**(shape | options), **learning, **intervals))
