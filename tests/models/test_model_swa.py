"""Sliding-window attention: query i attends to key j if 0 <= i - j < window, and costs no more."""

import math
import random

import pytest
import torch
from variants import close, feed, make_vivid, tokens
from windows import LargestTensor, attention, by_brute_force

import model
import model_swa
from model_swa import CausalSelfAttention


def qkv(T, S):
    """Return queries (2, 2, T, 4), and keys and values (2, 2, S, 4), all random.

    They are large, so that softmax has few large probabilities.
    """
    generator = torch.Generator().manual_seed(T * S)
    return [2 * torch.randn(2, 2, length, 4, generator=generator) for length in (T, S, S)]


def vivid(window, T, n_layer=3):
    """Return a model with large random parameters and block_size T."""
    return make_vivid(model_swa, n_layer=n_layer, window=window, block_size=T)


# The mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5, 7, 8, 13])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 8, 20])
def test_attention_equals_brute_force(window, T):
    q, k, v = qkv(T, T)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


LONG = [1, 5, 64, 65, 256, 257, 700]


@pytest.mark.parametrize("T", [321, 512, 1000])
@pytest.mark.parametrize("window", LONG)
def test_attention_over_a_long_sequence_equals_brute_force(window, T):
    q, k, v = qkv(T, T)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


@pytest.mark.parametrize("T", [2, 321, 769])
@pytest.mark.parametrize("window", [2, *LONG[1:]])
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_attention_of_a_later_chunk_equals_brute_force(window, T, part):
    past = math.ceil(part * (window - 1))  # keys from the cache, window - 1 at most
    q, k, v = qkv(T, T + past)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


@pytest.mark.parametrize("T", [7, 400, 513])
@pytest.mark.parametrize("window", [1, 5, 100, 257])
def test_gradients_of_queries_keys_and_values_equal_those_of_brute_force(window, T):
    q, k, v = [tensor.requires_grad_() for tensor in qkv(T, T + min(T, window) // 2)]
    upstream = torch.randn_like(q)
    ours = torch.autograd.grad(attention(window).attend(q, k, v), (q, k, v), upstream)
    expected = torch.autograd.grad(by_brute_force(q, k, v, window), (q, k, v), upstream)
    for our_gradient, gradient in zip(ours, expected, strict=True):
        # With a single key softmax is constant: the gradients of q and k are 0 but for rounding.
        assert (our_gradient - gradient).norm() <= 1e-3 * gradient.norm() + 1e-4


@pytest.mark.parametrize(
    ("window", "T"), [(1, 9), (3, 17), (5, 5), (9, 5), (1, 400), (7, 401), (64, 400), (130, 387)]
)
def test_logits_and_gradients_of_the_model_equal_those_of_brute_force(monkeypatch, window, T):
    ours, other = vivid(window, T, n_layer=2), vivid(window, T, n_layer=2)
    x, y = tokens(1, T), tokens(1, T, seed=2)
    logits = ours(x)
    ours(x, y).backward()

    def attend_by_brute_force(self, q, k, v):
        return by_brute_force(q, k, v, window)

    monkeypatch.setattr(CausalSelfAttention, "attend", attend_by_brute_force)
    torch.testing.assert_close(logits, other(x), atol=1e-4, rtol=0)
    other(x, y).backward()
    expected = {name: p.grad for name, p in other.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - expected[name]).norm() < 1e-3 * expected[name].norm(), name


@pytest.mark.parametrize(("n_layer", "window"), [(1, 3), (2, 3), (3, 2), (2, 1), (1, 70), (2, 100)])
def test_the_receptive_field_is_the_windows_of_all_layers(n_layer, window):
    reach = n_layer * (window - 1)
    t = 11
    T = 340 if window > 5 else t + reach + 5  # past 256 tokens attention is computed in blocks
    ours, x = vivid(window, T, n_layer), tokens(1, T)
    changed = x.clone()
    changed[:, t] = (x[:, t] + 1) % 61
    with torch.no_grad():
        difference = (ours(x) - ours(changed)).abs().amax(dim=2)[0]
    assert difference[t] > 1e-4
    assert difference[t + reach] > 0
    assert (difference[:t] == 0).all()
    assert (difference[t + reach + 1 :] == 0).all()


# Dropout --------------------------------------------------------------------------------------


def drop_in_blocks(seed):
    """Return attention with dropout to values of 1: the mean of a row without dropout is 1."""
    q, k, _ = qkv(1000, 1000)
    torch.manual_seed(seed)
    return attention(64, dropout=0.5).attend(q, k, torch.ones_like(k))


def test_dropout_in_blocks_follows_the_seed():
    first = drop_in_blocks(seed=3)
    assert torch.equal(drop_in_blocks(seed=3), first)
    assert not torch.allclose(drop_in_blocks(seed=4), first)


def test_dropout_in_blocks_keeps_the_mean():
    y = drop_in_blocks(seed=3)
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert y.std() > 0.1


def test_a_model_trains_in_blocks_with_dropout():
    ours = make_vivid(model_swa, window=64, block_size=400, dropout=0.5).train()
    ours(tokens(1, 400), tokens(1, 400, seed=2)).backward()
    for name, p in ours.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.norm() > 0, name


# model.py -------------------------------------------------------------------------------------


def same_weights(window, T):
    """Return models of model_swa.py and of model.py with the same weights."""
    ours = vivid(window, T)
    c = ours.config
    config = model.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    base = model.GPT(config).eval()
    base.load_state_dict(ours.state_dict())
    return ours, base


@pytest.mark.parametrize(("window", "T"), [(16, 16), (17, 16), (500, 16), (340, 340), (1000, 340)])
def test_with_a_window_of_the_whole_sequence_logits_equal_those_of_model_py(window, T):
    ours, base = same_weights(window, T)
    x = tokens(2, T)
    close(ours(x), base(x))


@pytest.mark.parametrize("window", [16, 17, 500])
def test_with_a_window_of_the_whole_sequence_cached_logits_equal_those_of_model_py(window):
    ours, base = same_weights(window, 16)
    chunks = tokens(2, 16).split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(2), *chunks), feed(base, base.make_cache(2), *chunks))


def test_a_window_one_shorter_than_the_sequence_changes_the_last_logits_alone():
    ours, base = same_weights(15, 16)
    x = tokens(2, 16)
    difference = (ours(x) - base(x)).abs().amax(dim=2)
    assert (difference[:, :-1] < 1e-5).all()
    assert (difference[:, -1] > 1e-4).all()


# The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", [5, 10, 500, None])
def test_the_bytes_of_a_cache_do_not_depend_on_max_len(max_len):
    cache = vivid(5, 600).make_cache(2, max_len)
    # keys and values, layers, rows, heads, window, head_dim, bytes of float32
    assert cache.nbytes == 2 * 3 * 2 * 4 * 5 * 8 * 4


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_decoding_far_past_the_window_gives_the_logits_of_a_full_forward(window, prompt):
    ours, x = vivid(window, 150), tokens(2, 150)
    cached = feed(ours, ours.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, ours(x)[:, prompt - 1 :])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_chunks_of_random_sizes_give_the_logits_of_a_full_forward(window, seed):
    generator = random.Random(seed)
    sizes = []
    while sum(sizes) < 12 * window:
        is_single = generator.random() >= 0.7
        sizes.append(1 if is_single else generator.randint(1, 3 * window))
    x = tokens(2, sum(sizes), seed=seed)
    ours = vivid(window, sum(sizes))
    ends = torch.tensor(sizes).cumsum(0) - 1
    cached = feed(ours, ours.make_cache(2), *x.split(sizes, dim=1))
    close(cached, ours(x)[:, ends])


@pytest.mark.parametrize("window", [1, 5, 70, 257, 300])
def test_chunks_computed_in_blocks_give_the_logits_of_a_full_forward(window):
    sizes = [3, 400, 1, 330, 5, 1]
    ours, x = vivid(window, sum(sizes)), tokens(1, sum(sizes))
    ends = torch.tensor(sizes).cumsum(0) - 1
    cached = feed(ours, ours.make_cache(1), *x.split(sizes, dim=1))
    close(cached, ours(x)[:, ends])


# Memory ---------------------------------------------------------------------------------------


def largest_tensor(T, window):
    """Return the elements of the largest tensor of a training step.

    With dropout, scores and probabilities are tensors of their own.
    """
    ours = make_vivid(
        model_swa, n_layer=1, n_head=1, n_embd=4, window=window, block_size=T, dropout=0.1
    )
    ours.train()
    with LargestTensor() as largest:
        ours(tokens(1, T), tokens(1, T)).backward()
    return largest.numel


def test_a_training_step_with_a_full_window_makes_a_tensor_of_all_pairs_of_tokens():
    assert largest_tensor(2048, window=2048) >= 2048 * 2048


def test_a_training_step_with_a_short_window_makes_no_tensor_of_all_pairs_of_tokens():
    # A query is multiplied with the keys of its own block and of the block before.
    assert largest_tensor(2048, window=64) <= 2 * 2048 * 64


def test_the_largest_tensor_of_a_training_step_is_linear_in_the_sequence_length():
    assert largest_tensor(4096, window=64) <= 2.1 * largest_tensor(2048, window=64)
