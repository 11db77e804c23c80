"""The idea of the exercise blocks: a block of queries is computed with the keys it needs alone."""

from unittest import mock

import pytest
import torch
from checks import check_equal, check_mask, check_shape, random_qkv, with_shapes
from exercises import missing, version_fixture
from windows import LargestTensor, by_brute_force

module = version_fixture("blocks")


def in_blocks(module, q, k, v, window, record=None):
    """Return the result of attend_blocks; fail with a sentence unless it has the shape of q.

    record   is called with the q, k and v of each call of attend_dense
    """
    config = module.GPTConfig(n_head=2, n_embd=8, window=window)
    attention = module.CausalSelfAttention(config, layer=0).eval()

    case = case_of(window, q.size(2), k.size(2))

    def attend_dense(q, k, v):
        if not q.dim() == k.dim() == v.dim() == 4 or q.shape[:2] != k.shape[:2]:
            shapes = " and ".join(str(tuple(x.shape)) for x in (q, k))
            missing(
                f"{case}: attend_dense must get q and k with the same first two sizes, (B, H) or "
                f"(BH, n_blocks), but gets {shapes}"
            )
        if record is not None:
            record(q, k, v)
        return attention.attend_dense(q, k, v)

    def with_earlier_blocks(x, n_blocks, n_before, size):
        if (n_blocks + n_before) * size > x.size(2):
            missing(
                f"{case}: n_blocks = {n_blocks}, n_before = {n_before} and size = {size} need keys "
                f"at {(n_blocks + n_before) * size} positions: leave more of the first queries over"
            )
        return original(x, n_blocks, n_before, size)

    original = module.with_earlier_blocks
    with mock.patch.object(module, "with_earlier_blocks", with_earlier_blocks):
        y = with_shapes(module.attend_blocks)(attend_dense, q, k, v, window)
    check_shape(f"{case}: the result of attend_blocks", y, "(B, H, T, D)", tuple(q.shape))
    return y


def sizes(window):
    """Return the number of queries in a block, and of blocks before it."""
    size = min(max(window, 64), 256)
    return size, (window - 1 + size - 1) // size


def case_of(window, T, S):
    return f"window {window}, {T} queries, {S} keys"


# window, T, S; blocks of 64 queries for windows up to 64, of 256 for windows from 256
TOO_SHORT = [(64, 64, 64), (64, 70, 70), (300, 500, 500)]  # no block has all blocks before it
WHOLE = [(64, 128, 128), (64, 256, 256), (100, 300, 300)]
WITH_A_REST = [(64, 200, 200), (100, 330, 330), (5, 190, 190)]
CACHED = [(64, 128, 191), (64, 128, 192), (64, 150, 170), (5, 128, 132)]
LONG_WINDOWS = [(257, 600, 600), (258, 800, 800), (300, 520, 819)]
CASES = [*TOO_SHORT, *WHOLE, *WITH_A_REST, *CACHED, *LONG_WINDOWS, (1, 130, 130)]
each_case = pytest.mark.parametrize(("window", "T", "S"), CASES)


@each_case
def test_each_query_attends_to_the_keys_of_its_window(module, window, T, S):
    size, n_before = sizes(window)
    case = f"{case_of(window, T, S)} (size = {size}, n_before = {n_before}): "
    check_mask(
        lambda q, k, v: in_blocks(module, q, k, v, window),
        (1, 1),
        T,
        S,
        window,
        case,
    )


@each_case
def test_the_result_of_each_query_is_in_its_own_place(module, window, T, S):
    angles = 2 * torch.pi * torch.arange(S, dtype=torch.float64) / S
    k = torch.stack([angles.cos(), angles.sin()], dim=-1).float().view(1, 1, S, 2)
    q = 1e6 * k[:, :, S - T :]  # a query's score is largest with its own key
    v = torch.arange(S).view(1, 1, S, 1).expand(1, 1, S, 2).float()  # the position
    came = in_blocks(module, q, k, v, window)[0, 0, :, 0]
    wrong = ((came - v[0, 0, S - T :, 0]).abs() > 1e-2).nonzero()
    if len(wrong):
        t = int(wrong[0])
        missing(
            f"{case_of(window, T, S)}: the result of the query at position {S - T + t} must be "
            f"that of its own query, but is that of a query at position {came[t]:.4g}"
        )


@each_case
def test_rows_and_heads_do_not_mix(module, window, T, S):
    q, k = torch.zeros(2, 3, T, 4), torch.zeros(2, 3, S, 4)
    v = torch.arange(6.0).view(2, 3, 1, 1).expand(2, 3, S, 4)  # 3 * row + head
    y = in_blocks(module, q, k, v, window)
    wrong = ((y - v[:, :, :T]).abs() > 1e-3).nonzero()
    if len(wrong):
        row, head, t, channel = wrong[0].tolist()
        other_row, other_head = divmod(round(y[row, head, t, channel].item()), 3)
        missing(
            f"{case_of(window, T, S)}: query {t} of row {row}, head {head} gets values of row "
            f"{other_row}, head {other_head}: (B, H, n_blocks, size, D) becomes "
            f"(BH, n_blocks, size, D) and back"
        )


@pytest.mark.parametrize(("window", "T", "S"), [*WHOLE[1:], *WITH_A_REST, *CACHED, *LONG_WINDOWS])
def test_queries_are_multiplied_with_the_keys_they_need_alone(module, window, T, S):
    counts = []
    q, k, v = random_qkv((1, 1), T, S)
    q, k, v = q[:1], k[:1], v[:1]
    in_blocks(
        module, q, k, v, window, lambda q, k, v: counts.append(q[..., 0].numel() * k.size(-2))
    )
    size, n_before = sizes(window)
    most = T * (n_before + 1) * size
    if sum(counts) > most:
        missing(
            f"{case_of(window, T, S)}: attend_dense computes {sum(counts):,} scores, but at most "
            f"{most:,} are needed: {T} queries, each times the keys of (n_before + 1) size = "
            f"{(n_before + 1) * size} positions"
        )


def test_no_tensor_has_as_many_numbers_as_all_pairs_of_tokens(module):
    q, k, v = random_qkv((1, 1), 2048, 2048)
    with LargestTensor() as largest:
        in_blocks(module, q[:1], k[:1], v[:1], window=64)
    if largest.numel > 2048 * 2048 // 8:
        missing(
            f"with window 64 and 2,048 tokens a tensor has {largest.numel:,} numbers: "
            f"2,048 * 128 are enough, and 2,048 * 2,048 make the cost quadratic in the length"
        )


# Independent computations ---------------------------------------------------------------------


@each_case
def test_attention_equals_brute_force(module, window, T, S):
    q, k, v = random_qkv((2, 2), T, S)
    y = in_blocks(module, q, k, v, window)
    what = f"{case_of(window, T, S)}: the result [row, head, query, channel]"
    check_equal(what, y, by_brute_force(q, k, v, window))


def test_gradients_equal_those_of_brute_force(module):
    inputs = [x.requires_grad_() for x in random_qkv((2, 2), 200, 210)]
    q, k, v = inputs
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad(in_blocks(module, q, k, v, 30), inputs, upstream)
    expected = torch.autograd.grad(by_brute_force(q, k, v, 30), inputs, upstream)
    for name, gradient, other in zip("qkv", ours, expected, strict=True):
        what = f"the gradient of {name} [row, head, position, channel]"
        check_equal(what, gradient, other, 1e-3)
