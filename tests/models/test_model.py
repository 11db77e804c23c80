"""What model.py alone has: GPT-2's sizes, learned positions, the logits of transformers' GPT-2."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

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


def oracle(n_layer, n_head, n_embd, block_size, vocab_size, attention="eager"):
    """Return transformers' GPT-2 with every parameter random, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=block_size,
        vocab_size=vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation=attention,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def ours(name, tensor):
    """Return a tensor of transformers' GPT-2 in model.py's orientation.

    A Conv1D weight is (in, out), a Linear weight (out, in).
    """
    is_conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T if is_conv1d else tensor


def copy_of(theirs):
    """Return model.py's model with the weights of transformers' GPT-2."""
    c = theirs.config
    config = GPTConfig(c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    with torch.device("meta"):
        model = GPT(config)
    weights = {name: ours(name, p.detach().clone()) for name, p in theirs.named_parameters()}
    model.load_state_dict(weights, assign=True)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_equal_those_of_transformers(size, attention):
    *shape, T = size
    theirs = oracle(*shape, attention=attention)
    x = tokens(3, T, vocab_size=theirs.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(copy_of(theirs)(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_loss_and_gradients_equal_those_of_transformers(size):
    *shape, T = size
    theirs = oracle(*shape)
    model = copy_of(theirs)
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
        torch.testing.assert_close(gradients[name].grad, ours(name, p.grad), atol=1e-5, rtol=1e-4)


def test_cached_logits_equal_those_of_transformers():
    theirs = oracle(2, 3, 24, 17, 61)
    model = copy_of(theirs)
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
        torch.testing.assert_close(copy_of(theirs)(x), theirs(x).logits, atol=1e-4, rtol=0)
