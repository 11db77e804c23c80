"""Rotary positions: the logits of transformers' StarCoder2, float32 angles, relative positions."""

import pytest
import torch
from starcoder2 import loaded, relative_errors, starcoder2
from variants import feed, make, make_vivid, tokens

import model_rope
from model_rope import GPTConfig, rotate

# transformers ---------------------------------------------------------------------------------


# n_layer, n_head, n_embd, vocab_size, T
SHAPES = [(1, 1, 4, 11, 9), (2, 3, 30, 61, 13), (3, 4, 32, 101, 33), (2, 2, 64, 257, 1)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_those_of_transformers(shape, attention):
    *shape, T = shape
    theirs = starcoder2(*shape, attention=attention)
    ours = loaded(model_rope, theirs)
    x = tokens(3, T, vocab_size=shape[-1])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rope_theta", [10.0, 1e6])
def test_logits_for_another_rope_theta_equal_those_of_transformers(rope_theta):
    theirs = starcoder2(2, 2, 32, 61, rope_theta=rope_theta)
    ours = loaded(model_rope, theirs)
    x = tokens(3, 31)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


def test_logits_past_block_size_equal_those_of_transformers():
    theirs = starcoder2(2, 2, 32, 61)
    ours = loaded(model_rope, theirs, block_size=8)
    x = tokens(2, 41)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


def test_cached_logits_past_block_size_equal_those_of_transformers():
    theirs = starcoder2(2, 2, 32, 61)
    ours = loaded(model_rope, theirs, block_size=8)
    x = tokens(2, 41)
    cached = feed(ours, ours.make_cache(2, max_len=41), *x.split([6, 1, 20, 13, 1], dim=1))
    with torch.no_grad():
        expected = theirs(x).logits[:, [5, 6, 26, 39, 40]]
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_equal_those_of_transformers(shape):
    *shape, T = shape
    theirs = starcoder2(*shape)
    ours = loaded(model_rope, theirs)
    errors = relative_errors(ours, theirs, tokens(3, T + 1, vocab_size=shape[-1]))
    assert max(errors.values()) < 1e-3, errors


# Relative positions ---------------------------------------------------------------------------


def tables(start, end, D, rope_theta=10000.0):
    """Return the cosines and sines (end - start, D / 2) of positions, computed in float64."""
    positions = torch.arange(start, end, dtype=torch.float64)
    frequencies = [rope_theta ** (-2 * i / D) for i in range(D // 2)]
    angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return angles.cos(), angles.sin()


def float32_tables(start, end, D):
    """Return the same tables in float32."""
    cos, sin = tables(start, end, D)
    return cos.float(), sin.float()


def normal(*shape):
    """Return random float64 numbers of a shape."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shift", [1, 100, 5000])
def test_a_shift_of_all_positions_changes_no_logit(shift):
    model, x = make_vivid(model_rope), tokens(2, 16)
    expected = model(x)
    cos, sin = float32_tables(shift, shift + 16, D=8)
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda block, args: (args[0], cos, sin, args[3]))
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_a_shift_of_queries_and_keys_keeps_the_scores():
    q, k = normal(2, 1, 1, 5, 8)
    original, shifted = tables(0, 5, D=8), tables(3, 8, D=8)
    scores = rotate(q, *original) @ rotate(k, *original).mT
    torch.testing.assert_close(scores, rotate(q, *shifted) @ rotate(k, *shifted).mT)


def test_a_shift_of_the_keys_alone_changes_the_scores():
    q, k = normal(2, 1, 1, 5, 8)
    original, shifted = tables(0, 5, D=8), tables(3, 8, D=8)
    scores = rotate(q, *original) @ rotate(k, *original).mT
    assert not torch.allclose(scores, rotate(q, *original) @ rotate(k, *shifted).mT, atol=0.1)


def test_the_order_of_earlier_tokens_matters():
    # One layer of attention without positions would not depend on the order.
    model = make_vivid(model_rope, n_layer=1)
    a = torch.tensor([[3, 14, 15, 9, 26, 5]])
    b = torch.tensor([[9, 3, 15, 14, 26, 5]])
    assert (model(a)[:, -1] - model(b)[:, -1]).abs().max() > 0.1


def test_there_are_no_learned_positions():
    short, long = make(model_rope, block_size=16), make(model_rope, block_size=1024)
    assert not [name for name in short.state_dict() if "wpe" in name]
    assert sum(p.numel() for p in short.parameters()) == sum(p.numel() for p in long.parameters())


# Rotating pairs -------------------------------------------------------------------------------


def test_rotate_is_a_complex_product_of_the_pairs_i_and_i_plus_half():
    x = normal(2, 3, 7, 10)
    cos, sin = tables(0, 7, D=10)
    rotated = torch.complex(x[..., :5], x[..., 5:]) * torch.complex(cos, sin)
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected)


def test_rotate_keeps_the_norm_of_each_pair():
    x = normal(2, 3, 7, 10)
    rotated = rotate(x, *tables(40, 47, D=10))
    norms = x.unflatten(-1, (2, 5)).norm(dim=-2)
    rotated_norms = rotated.unflatten(-1, (2, 5)).norm(dim=-2)
    torch.testing.assert_close(rotated_norms, norms)


def test_rotate_keeps_position_0_and_the_dtype():
    x = torch.randn(2, 3, 1, 8).bfloat16()
    rotated = rotate(x, *float32_tables(0, 1, D=8))
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, x)


# The angles -----------------------------------------------------------------------------------


def rotation_tables(monkeypatch, model, x, cache=None):
    """Return the tables (cos, sin) that each call of rotate receives in a forward."""
    received = []

    def recording_rotate(x, cos, sin):
        received.append((cos, sin))
        return rotate(x, cos, sin)

    monkeypatch.setattr(model_rope, "rotate", recording_rotate)
    with torch.no_grad():
        model(x, cache=cache)
    return received


@pytest.mark.parametrize("how", ["float32", "bf16", "autocast"])
def test_angles_are_those_of_float64_at_far_positions_in_every_dtype(monkeypatch, how):
    model, x = make(model_rope, n_layer=1), tokens(1, 1001)
    if how == "bf16":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for_queries, _ = rotation_tables(monkeypatch, model, x)
    cos, sin = for_queries
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    expected = tables(0, 1001, D=8)
    torch.testing.assert_close((cos.double(), sin.double()), expected, atol=2e-4, rtol=0)


def test_angles_behind_a_cache_go_on_where_it_ends(monkeypatch):
    model = make(model_rope)
    cache = model.make_cache(1, max_len=600)
    feed(model, cache, tokens(1, 590))
    cos, sin = rotation_tables(monkeypatch, model, tokens(1, 3), cache)[0]
    expected = tables(590, 593, D=8)
    torch.testing.assert_close((cos.double(), sin.double()), expected, atol=2e-4, rtol=0)


def test_angles_are_computed_once_for_all_blocks(monkeypatch):
    received = rotation_tables(monkeypatch, make(model_rope, n_layer=3), tokens(1, 7))
    assert len(received) == 2 * 3  # queries and keys of each block
    first_cos, first_sin = received[0]
    for cos, sin in received:
        assert cos is first_cos
        assert sin is first_sin


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rope_theta_that_is_not_positive_and_finite_is_refused(value):
    with pytest.raises(ValueError, match=f"rope_theta={value}"):
        GPTConfig(rope_theta=value)


@pytest.mark.parametrize(("n_embd", "n_head"), [(1, 1), (9, 3), (35, 5), (12, 12)])
def test_an_odd_head_dim_is_refused_with_both_numbers(n_embd, n_head):
    with pytest.raises(ValueError, match=rf"n_embd={n_embd}\b.*n_head={n_head}\b"):
        GPTConfig(n_embd=n_embd, n_head=n_head)
