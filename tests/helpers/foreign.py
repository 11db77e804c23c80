"""Models of transformers, and what tests of formats share."""

import json
from pathlib import Path

import pytest
import torch
from conftest import arguments
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

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


def random_gpt_neo(n_layer=2, n_head=2, n_embd=32, window=5, **options):
    """Return a GPT-Neo of transformers with windows everywhere and large random parameters."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        num_layers=n_layer,
        num_heads=n_head,
        hidden_size=n_embd,
        window_size=window,
        vocab_size=61,
        max_position_embeddings=48,
        attention_types=[[["local"], n_layer]],
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    model = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
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


def read_as_there(folder):
    """Return whether load_model reads a folder; assert that transformers reads the same model then.

    transformers reads a folder if it loads all weights from it, without making up missing ones.
    """
    try:
        ours, _ = load_model(str(folder))
    except UserError as error:
        assert "\n" not in str(error)
        return False
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    ids = torch.arange(40)[None] % 23
    with torch.no_grad():
        expected = theirs(ids)[0]  # of a tuple, if config.json has return_dict=null
    assert max_difference(logits(ours, ids), expected) < 1e-4
    return True


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
