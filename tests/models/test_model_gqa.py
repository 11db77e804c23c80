"""Grouped-query attention: transformers' GPTBigCode, and model.py with repeated KV heads."""

import pytest
import torch
import torch.nn.functional as F
from oracles import copy_of_gpt_bigcode, gpt_bigcode
from variants import close, feed, make_vivid, tokens

import model
import model_gqa

# transformers ---------------------------------------------------------------------------------

# n_layer, n_head, n_embd, block_size, vocab_size, T
SHAPES = [
    (1, 1, 4, 8, 11, 8),
    (2, 3, 24, 17, 61, 13),
    (3, 4, 32, 33, 101, 33),
    (2, 8, 64, 64, 257, 1),
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_with_one_kv_head_equal_those_of_transformers(shape, attention):
    *shape, T = shape
    theirs = gpt_bigcode(*shape, attention=attention)
    x = tokens(3, T, vocab_size=shape[-1])
    with torch.no_grad():
        torch.testing.assert_close(
            copy_of_gpt_bigcode(theirs, model_gqa)(x), theirs(x).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_with_one_kv_head_equal_those_of_transformers(shape):
    *shape, T = shape
    theirs = gpt_bigcode(*shape)
    ours = copy_of_gpt_bigcode(theirs, model_gqa)
    text = tokens(3, T, vocab_size=shape[-1])
    x, y = text[:, :-1], text[:, 1:]
    ours(x, y).backward()
    F.cross_entropy(theirs(x).logits.transpose(1, 2), y).backward()
    gradients = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert (gradients[name].grad - p.grad).norm() < 1e-3 * p.grad.norm(), name


def test_cached_logits_with_one_kv_head_equal_those_of_transformers():
    theirs, x = gpt_bigcode(2, 3, 24, 17, 61), tokens(2, 17)
    ours = copy_of_gpt_bigcode(theirs, model_gqa)
    cached = feed(ours, ours.make_cache(2), *x.split([6, 4, 1, 1, 5], dim=1))
    with torch.no_grad():
        expected = theirs(x).logits[:, [5, 9, 10, 11, 16]]
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)


# model.py -------------------------------------------------------------------------------------


def model_py(ours, state):
    """Return model.py's model with the shape of a GQA model and with these weights."""
    c = ours.config
    config = model.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    base = model.GPT(config).eval()
    base.load_state_dict(state)
    return base


def repeat_kv_heads(rows, n_head, n_kv_head):
    """Return the rows of c_attn (weight or bias) with one KV head for each query head.

    The first n_head / n_kv_head query heads have the first KV head, the next ones the second.
    """
    D = rows.size(0) // (n_head + 2 * n_kv_head)
    q, k, v = rows.split([n_head * D, n_kv_head * D, n_kv_head * D])
    kv_head_of = [h // (n_head // n_kv_head) for h in range(n_head)]
    k_heads, v_heads = k.split(D), v.split(D)
    repeated_k = [k_heads[g] for g in kv_head_of]
    repeated_v = [v_heads[g] for g in kv_head_of]
    return torch.cat([q, *repeated_k, *repeated_v])


def with_repeated_heads(ours):
    """Return model.py's model that computes the same as a model of model_gqa.py."""
    c = ours.config
    state = ours.state_dict()
    for name in state:
        if "c_attn" in name:
            state[name] = repeat_kv_heads(state[name], c.n_head, c.n_kv_head)
    return model_py(ours, state)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_logits_equal_those_of_model_py_with_repeated_kv_heads(n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(3, 16)
    close(ours(x), with_repeated_heads(ours)(x))


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_cached_logits_equal_those_of_model_py_with_repeated_kv_heads(n_kv_head):
    ours = make_vivid(model_gqa, n_head=6, n_embd=48, n_kv_head=n_kv_head)
    base = with_repeated_heads(ours)
    chunks = tokens(3, 16).split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(3), *chunks), feed(base, base.make_cache(3), *chunks))


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_the_gradient_of_a_kv_head_is_the_sum_over_its_query_heads(n_kv_head):
    ours = make_vivid(model_gqa, n_kv_head=n_kv_head)
    base = with_repeated_heads(ours)
    x, y = tokens(3, 16), tokens(3, 16, seed=2)
    ours(x, y).backward()
    base(x, y).backward()
    for our_block, base_block in zip(ours.transformer.h, base.transformer.h, strict=True):
        gradient = our_block.attn.c_attn.weight.grad
        base_gradient = base_block.attn.c_attn.weight.grad
        q, k, v = base_gradient.unflatten(0, (3, n_kv_head, 4 // n_kv_head, 8))
        expected = torch.cat(
            [q.flatten(0, 2), k.sum(dim=1).flatten(0, 1), v.sum(dim=1).flatten(0, 1)]
        )
        assert (gradient - expected).norm() < 1e-3 * expected.norm()


def as_many_kv_heads():
    """Return models of model_gqa.py with n_kv_head = n_head and of model.py, weights equal."""
    ours = make_vivid(model_gqa, n_kv_head=4)
    return ours, model_py(ours, ours.state_dict())


def test_with_n_kv_head_equal_n_head_logits_equal_those_of_model_py():
    ours, base = as_many_kv_heads()
    x = tokens(3, 16)
    close(ours.train()(x), base.train()(x))


def test_with_n_kv_head_equal_n_head_cached_logits_equal_those_of_model_py():
    ours, base = as_many_kv_heads()
    chunks = tokens(3, 16).split([5, 1, 1, 4, 1, 4], dim=1)
    close(feed(ours, ours.make_cache(3), *chunks), feed(base, base.make_cache(3), *chunks))


def test_with_n_kv_head_equal_n_head_initial_weights_equal_those_of_model_py():
    config = dict(block_size=8, vocab_size=61, n_layer=2, n_head=2, n_embd=16)
    torch.manual_seed(0)
    base = model.GPT(model.GPTConfig(**config)).state_dict()
    torch.manual_seed(0)
    ours = model_gqa.GPT(model_gqa.GPTConfig(**config, n_kv_head=2)).state_dict()
    assert list(ours) == list(base)
    assert all(torch.equal(ours[name], base[name]) for name in base)


# One token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("B", [1, 3])
def test_decoding_gives_the_logits_of_a_chunk_of_two_tokens(B, n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(B, 9)
    decoded = feed(ours, ours.make_cache(B), x[:, :7], x[:, 7:8], x[:, 8:9])
    chunked = feed(ours, ours.make_cache(B), x[:, :7], x[:, 7:9])
    close(decoded[:, -1], chunked[:, -1])


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_a_sequence_of_one_token_has_the_first_logits_of_a_longer_one(n_kv_head):
    ours, x = make_vivid(model_gqa, n_kv_head=n_kv_head), tokens(3, 9)
    close(ours(x[:, :1]), ours(x)[:, :1])


# The cache ------------------------------------------------------------------------------------


def test_by_default_the_cache_is_a_third_of_that_of_model_py():
    with torch.device("meta"):
        ours = model_gqa.GPT(model_gqa.GPTConfig())
        base = model.GPT(model.GPTConfig())
    # keys and values, layers, tokens, heads, head_dim, bytes of float32; 4 KV heads of 12
    expected = 2 * 12 * 1024 * 12 * 64 * 4
    assert base.make_cache(1).nbytes == expected
    assert ours.make_cache(1).nbytes == expected // 3


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 4, 6, 12])
def test_the_bytes_of_the_cache_are_proportional_to_n_kv_head(n_kv_head):
    with torch.device("meta"):
        ours = model_gqa.GPT(model_gqa.GPTConfig(n_kv_head=n_kv_head, n_layer=2))
    assert ours.make_cache(5).nbytes == n_kv_head * 2 * 2 * 5 * 1024 * 64 * 4


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_head", "n_kv_head"), [(12, 5), (12, 13), (12, 24), (7, 5), (7, 8), (7, 14)]
)
def test_an_n_kv_head_that_does_not_divide_n_head_is_refused(n_head, n_kv_head):
    with pytest.raises(
        ValueError, match=rf"(?=.*\bn_head={n_head}\b)(?=.*n_kv_head={n_kv_head}\b)"
    ):
        model_gqa.GPTConfig(n_head=n_head, n_embd=84, n_kv_head=n_kv_head)


def test_every_n_kv_head_that_divides_n_head_is_accepted():
    for n_kv_head in (1, 2, 3, 4, 6, 12):
        assert model_gqa.GPTConfig(n_kv_head=n_kv_head).n_kv_head == n_kv_head
