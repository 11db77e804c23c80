"""What a sliding window promises: query i sees the keys j with 0 <= i - j < window, and pays for no others."""

import math
import random

import pytest
import torch
from test_variants import close, feed, make_vivid, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import model
import model_swa
from model_swa import CausalSelfAttention, GPTConfig


def by_brute_force(q, k, v, window):
    """Attention of the last T of S positions, by a float64 softmax over the whole matrix of scores."""
    T, S, D = q.size(2), k.size(2), q.size(3)
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)  # i - j
    scores = q.double() @ k.double().mT / D**0.5
    scores = scores.masked_fill(~((distance >= 0) & (distance < window)), float("-inf"))
    return (scores.softmax(dim=-1) @ v.double()).to(q.dtype)


def attention(window, dropout=0.0):
    return CausalSelfAttention(
        GPTConfig(n_head=2, n_embd=8, window=window, dropout=dropout), 0
    ).train(dropout > 0)


def qkv(T, S):
    """Queries (2, 2, T, 4), keys and values (2, 2, S, 4), large enough for a softmax of few keys."""
    generator = torch.Generator().manual_seed(T * S)
    return [2 * torch.randn(2, 2, n, 4, generator=generator) for n in (T, S, S)]


def vivid(window, T, n_layer=3):
    return make_vivid(model_swa, n_layer=n_layer, window=window, block_size=T)


# Who attends to whom --------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 5, 7, 8, 13])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 8, 20])
def test_attention_equals_brute_force(window, T):
    q, k, v = qkv(T, T)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


LONG = [1, 5, 64, 65, 100, 256, 257, 300, 700]


@pytest.mark.parametrize("T", [321, 512, 513, 1000])
@pytest.mark.parametrize("window", LONG)
def test_attention_over_a_long_sequence_equals_brute_force(window, T):
    q, k, v = qkv(T, T)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


@pytest.mark.parametrize("T", [2, 5, 321, 512, 769])
@pytest.mark.parametrize("window", [2, *LONG[1:]])
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_attention_of_a_later_chunk_equals_brute_force(window, T, part):
    past = math.ceil(part * (window - 1))  # keys from the cache, window - 1 at most
    q, k, v = qkv(T, T + past)
    close(attention(window).attend(q, k, v), by_brute_force(q, k, v, window))


@pytest.mark.parametrize("T", [7, 400, 513])
@pytest.mark.parametrize("window", [1, 5, 100, 257])
def test_gradients_of_queries_keys_and_values_equal_those_of_brute_force(window, T):
    q, k, v = (t.requires_grad_() for t in qkv(T, T + min(T, window) // 2))
    upstream = torch.randn_like(q)
    ours = torch.autograd.grad(attention(window).attend(q, k, v), (q, k, v), upstream)
    expected = torch.autograd.grad(by_brute_force(q, k, v, window), (q, k, v), upstream)
    for mine, its in zip(ours, expected, strict=True):
        assert (
            mine - its
        ).norm() <= 1e-3 * its.norm() + 1e-4  # a key alone: its score changes nothing


@pytest.mark.parametrize(
    ("window", "T"), [(1, 9), (3, 17), (5, 5), (9, 5), (1, 400), (7, 401), (64, 400), (130, 387)]
)
def test_logits_and_gradients_of_the_model_equal_those_of_brute_force(monkeypatch, window, T):
    ours, other = vivid(window, T, n_layer=2), vivid(window, T, n_layer=2)
    x, y = tokens(1, T), tokens(1, T, seed=2)
    logits = ours(x)
    ours(x, y).backward()
    monkeypatch.setattr(
        CausalSelfAttention, "attend", lambda self, q, k, v: by_brute_force(q, k, v, window)
    )
    torch.testing.assert_close(logits, other(x), atol=1e-4, rtol=0)
    other(x, y).backward()
    for (name, mine), its in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad - its.grad).norm() < 1e-3 * its.grad.norm(), name


@pytest.mark.parametrize(("n_layer", "window"), [(1, 3), (2, 3), (3, 2), (2, 1), (1, 70), (2, 100)])
def test_a_token_reaches_as_many_tokens_as_the_windows_of_the_layers_and_no_further(
    n_layer, window
):
    reach, t = n_layer * (window - 1), 11
    T = 340 if window > 5 else t + reach + 5  # past 320 tokens attention goes by blocks
    ours, x = vivid(window, T, n_layer), tokens(1, T)
    changed = x.clone()
    changed[:, t] = (x[:, t] + 1) % 61
    with torch.no_grad():
        difference = (ours(x) - ours(changed)).abs().amax(dim=2)[0]
    assert (difference[t] > 1e-4) and (difference[t + reach] > 0)
    assert (difference[:t] == 0).all() and (difference[t + reach + 1 :] == 0).all()


# Dropout --------------------------------------------------------------------------------------


def test_dropout_in_blocks_follows_the_seed_and_keeps_the_mean():
    q, k, _ = qkv(1000, 1000)
    a, b, other = (
        torch.manual_seed(seed) and attention(64, 0.5).attend(q, k, torch.ones_like(k))
        for seed in (3, 3, 4)
    )
    assert torch.equal(a, b) and not torch.allclose(a, other)
    assert a.mean().item() == pytest.approx(1, abs=0.05) and a.std() > 0.1


def test_a_model_trains_in_blocks_with_dropout():
    ours = make_vivid(model_swa, window=64, block_size=400, dropout=0.5).train()
    ours(tokens(1, 400), tokens(1, 400, seed=2)).backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in ours.parameters())


# model.py -------------------------------------------------------------------------------------


def same_weights(window, T):
    """model_swa.py and model.py."""
    ours = vivid(window, T)
    c = ours.config
    base = model.GPT(
        model.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    ).eval()
    base.load_state_dict(ours.state_dict())
    return ours, base


@pytest.mark.parametrize(("window", "T"), [(16, 16), (17, 16), (500, 16), (340, 340), (1000, 340)])
def test_with_a_window_of_the_whole_sequence_logits_equal_those_of_model_py(window, T):
    ours, base = same_weights(window, T)
    close(ours(tokens(2, T)), base(tokens(2, T)))


@pytest.mark.parametrize("window", [16, 17, 500])
def test_with_a_window_of_the_whole_sequence_cached_logits_equal_those_of_model_py(window):
    ours, base = same_weights(window, 16)
    chunks = tokens(2, 16).split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(2), *chunks), feed(base, base.make_cache(2), *chunks))


def test_a_window_one_shorter_than_the_sequence_changes_the_last_logits_alone():
    ours, base = same_weights(15, 16)
    difference = (ours(tokens(2, 16)) - base(tokens(2, 16))).abs().amax(dim=2)
    assert (difference[:, :-1] < 1e-5).all() and (difference[:, -1] > 1e-4).all()


# The cache ------------------------------------------------------------------------------------


def test_a_cache_has_the_same_bytes_however_long_the_text():
    ours = vivid(5, 600)
    sizes = {ours.make_cache(2, max_len).nbytes for max_len in (5, 10, 500, None)}
    assert sizes == {
        2 * 3 * 2 * 4 * 5 * 8 * 4
    }  # keys and values, layers, rows, heads, window, head size, bytes


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_decoding_far_past_the_window_gives_the_logits_of_a_full_forward(window, prompt):
    ours, x = vivid(window, 150), tokens(2, 150)
    cached = feed(ours, ours.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, ours(x)[:, prompt - 1 :])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_chunks_of_random_sizes_give_the_logits_of_a_full_forward(window, seed):
    draw, sizes = random.Random(seed), []
    while sum(sizes) < 12 * window:
        sizes.append(draw.randint(1, 3 * window) if draw.random() < 0.7 else 1)
    x = tokens(2, sum(sizes), seed=seed)
    ours = vivid(window, sum(sizes))
    ends = torch.tensor(sizes).cumsum(0) - 1
    close(feed(ours, ours.make_cache(2), *x.split(sizes, dim=1)), ours(x)[:, ends])


@pytest.mark.parametrize("window", [1, 5, 70, 257, 300])
def test_chunks_that_are_attended_in_blocks_give_the_logits_of_a_full_forward(window):
    sizes = [3, 400, 1, 330, 5, 1]
    x, ours = tokens(1, sum(sizes)), vivid(window, sum(sizes))
    ends = torch.tensor(sizes).cumsum(0) - 1
    close(feed(ours, ours.make_cache(1), *x.split(sizes, dim=1)), ours(x)[:, ends])


# Memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        made_tensors = [
            t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *(t.numel() for t in made_tensors)])
        return made


def largest_tensor(T, window):
    """In a training step; under dropout, as scores and probabilities are tensors of their own then."""
    ours = make_vivid(
        model_swa, n_layer=1, n_head=1, n_embd=4, window=window, block_size=T, dropout=0.1
    ).train()
    with Largest() as largest:
        ours(tokens(1, T), tokens(1, T)).backward()
    return largest.numel


def test_a_training_step_makes_no_tensor_of_all_pairs_of_tokens():
    assert largest_tensor(2048, window=2048) >= 2048 * 2048  # where all pairs are in sight
    assert (
        largest_tensor(2048, window=64) <= 2 * 2048 * 64
    )  # a query with its own block of keys and one more


def test_the_largest_tensor_of_a_training_step_is_linear_in_the_sequence():
    assert largest_tensor(4096, window=64) <= 2.1 * largest_tensor(2048, window=64)
