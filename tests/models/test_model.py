"""What model.py alone has: GPT-2's sizes, learned positions, the logits of transformers' GPT-2."""

import pytest
import torch
import torch.nn.functional as F
from oracles import copy_of_gpt2, gpt2, in_our_orientation
from transformers import GPT2Config, GPT2LMHeadModel

import model as model_py
from model import GPT, GPTConfig


def tokens(*shape, vocab_size):
    """Return random token ids of a shape."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


# Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_the_number_of_parameters_is_that_of_gpt2(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert sum(p.numel() for p in model.parameters()) == parameters


# block_size -----------------------------------------------------------------------------------


@pytest.fixture
def small():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=8)).eval()


def test_a_sequence_as_long_as_block_size_is_accepted(small):
    assert small(tokens(1, 8, vocab_size=61)).shape == (1, 8, 61)


def test_a_sequence_past_block_size_is_refused_with_both_numbers(small):
    with pytest.raises(ValueError, match=r"9 .*block_size=8"):
        small(tokens(1, 9, vocab_size=61))


@pytest.mark.parametrize(("past", "new"), [(8, 1), (7, 2), (0, 9)])
def test_a_cached_sequence_past_block_size_is_refused_in_a_longer_cache(small, past, new):
    cache = small.make_cache(1, max_len=20)
    if past:
        small(tokens(1, past, vocab_size=61), cache=cache)
    with pytest.raises(ValueError, match=r"9 .*block_size=8"):
        small(tokens(1, new, vocab_size=61), cache=cache)


def test_a_refused_sequence_leaves_pos_of_the_cache_unchanged(small):
    cache = small.make_cache(1, max_len=20)
    small(tokens(1, 7, vocab_size=61), cache=cache)
    with pytest.raises(ValueError):
        small(tokens(1, 2, vocab_size=61), cache=cache)
    assert cache.pos == 7


# transformers ---------------------------------------------------------------------------------

# n_layer, n_head, n_embd, block_size, vocab_size, T
SIZES = [
    (1, 1, 4, 8, 11, 8),
    (2, 3, 24, 17, 61, 13),
    (3, 4, 32, 33, 101, 33),
    (2, 2, 64, 64, 257, 1),
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_equal_those_of_transformers(size, attention):
    *shape, T = size
    theirs = gpt2(*shape, attention=attention)
    x = tokens(3, T, vocab_size=theirs.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(
            copy_of_gpt2(theirs, model_py)(x), theirs(x).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_loss_and_gradients_equal_those_of_transformers(size):
    *shape, T = size
    theirs = gpt2(*shape)
    model = copy_of_gpt2(theirs, model_py)
    text = tokens(3, T, vocab_size=theirs.config.vocab_size)
    x, y = text[:, :-1], text[:, 1:].clone()
    y[0, 2] = -1
    loss = model(x, y)
    loss.backward()
    expected = F.cross_entropy(theirs(x).logits.transpose(1, 2), y, ignore_index=-1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name].grad, in_our_orientation(name, p.grad), atol=1e-5, rtol=1e-4
        )


def test_cached_logits_equal_those_of_transformers():
    theirs = gpt2(2, 3, 24, 17, 61)
    model = copy_of_gpt2(theirs, model_py)
    x = tokens(2, 17, vocab_size=61)
    cache = model.make_cache(2)
    chunks = x.split([6, 4, 1, 1, 5], dim=1)
    with torch.no_grad():
        cached = torch.cat([model(chunk, cache=cache) for chunk in chunks], dim=1)
        expected = theirs(x).logits[:, [5, 9, 10, 11, 16]]
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)


def test_logits_at_the_size_of_gpt2_small_equal_those_of_transformers():
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()
    x = tokens(1, 19, vocab_size=50257)
    with torch.no_grad():
        torch.testing.assert_close(
            copy_of_gpt2(theirs, model_py)(x), theirs(x).logits, atol=1e-4, rtol=0
        )
