"""common/flops.py: the exact count against torch's counter, and PaLM's count."""

import importlib
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from variants import MODELS, SMALL, WINDOW, fields, make, tokens

from common.flops import flops_per_token, mfu_flops_per_token
from common.models import model_module

OURS = {"model", "model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa"}


# The exact count ------------------------------------------------------------------------------


def attention_flops(module, T):
    """Count the FLOPs of attention in a forward and backward pass over one sequence.

    They are 12 * head_dim per (query head, query, attended key), with the keys counted one by one.
    """
    window = WINDOW if "window" in fields(module) else T
    pairs = 0
    for i, j in itertools.product(range(T), range(T)):
        if 0 <= i - j < window:
            pairs += 1
    return 12 * SMALL["n_layer"] * SMALL["n_embd"] * pairs


@pytest.mark.parametrize("T", [1, 7, 16])
@pytest.mark.parametrize("name", MODELS)
def test_flops_per_token_are_those_of_matmuls_and_of_attended_keys(name, T):
    if name not in OURS:
        pytest.skip("another model file may attend to other keys than common/flops.py counts")
    module = importlib.import_module(name)
    model, x = make(module), tokens(2, T)
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    counts = counter.get_flop_counts()["Global"]
    matmuls = counts.get(torch.ops.aten.mm, 0) + counts.get(torch.ops.aten.addmm, 0)
    expected = matmuls / x.numel() + attention_flops(module, T) / T
    assert flops_per_token(model, T) == pytest.approx(expected, abs=1)
    assert isinstance(flops_per_token(model, T), int)


# PaLM's count ---------------------------------------------------------------------------------

WEIGHTS = 124_439_808 - 1024 * 768  # of GPT-2, without position embeddings


def gpt2_on_meta(name, **options):
    """Return a model of GPT-2's shape that takes no memory."""
    module = model_module(name)
    with torch.device("meta"):
        return module.GPT(module.GPTConfig(**options))


def test_mfu_counts_flops_by_the_convention_of_palm_nanogpt_and_llm_c():
    flops = mfu_flops_per_token(gpt2_on_meta("model"), 1024)
    assert flops == 6 * WEIGHTS + 12 * 12 * 768 * 1024 == 855_166_464


def test_mfu_counts_at_most_the_keys_of_a_window():
    flops = mfu_flops_per_token(gpt2_on_meta("model_swa", window=256), 1024)
    assert flops == 6 * WEIGHTS + 12 * 12 * 768 * 256
