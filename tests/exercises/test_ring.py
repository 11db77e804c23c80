"""The idea of the exercise ring: position p is in slot p % slots, and a chunk needs its past."""

import random

import pytest
import torch
from checks import check_equal, check_full, check_positions, extend
from exercises import missing, version_fixture
from foreign import random_gpt_neo
from oracles import copy_of_gpt_neo
from variants import feed, last_logits, make_vivid, tokens

module = version_fixture("ring")
SLOT = "position p is in slot p % 3"


def make(module, rows=2, max_len=20, window=3):
    """Return an empty cache of two layers, with two heads of four channels."""
    config = module.GPTConfig(n_layer=2, n_head=2, n_embd=8, window=window)
    return module.KVCache(config, rows, max_len, "cpu", torch.float32)


def decode(cache, end):
    """Give a cache the positions before `end`, one at a time."""
    for position in range(end):
        extend(cache, position, 1)
    return cache


def check_slots(cache, after, expected, reason=SLOT):
    check_positions(f"the slots of layer 0 {after}", cache.k[0], cache.v[0], expected, reason)


# One token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "expected"), [(1, "0 - -"), (2, "0 1 -"), (3, "0 1 2"), (4, "3 1 2"), (6, "3 4 5")]
)
def test_a_token_is_stored_in_the_slot_of_its_position(module, end, expected):
    cache = make(module)
    k, v = cache.k, cache.v
    decode(cache, end)
    if cache.k is not k or cache.v is not v:
        missing("extend replaced the tensor cache.k or cache.v: write into the one that is there")
    check_slots(cache, f"after position {end - 1}", expected)


@pytest.mark.parametrize(
    ("position", "expected"), [(0, "0"), (1, "0 1"), (2, "0 1 2"), (3, "1 2 3"), (7, "5 6 7")]
)
def test_a_token_is_returned_with_the_slots_in_use(module, position, expected):
    cache = decode(make(module), position)
    reason = "the token attends to all slots in use, its own included, and to no empty one"
    what = f"extend with one token at position {position}"
    check_positions(what, *extend(cache, position, 1), expected, reason, any_order=True)


# A chunk --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "expected"), [(2, "0 1 -"), (3, "0 1 2"), (4, "3 1 2"), (5, "3 4 2"), (7, "6 4 5")]
)
def test_of_a_first_chunk_the_last_tokens_are_stored(module, T, expected):
    cache = make(module)
    extend(cache, 0, T)
    reason = f"{SLOT}, where the last position of a chunk stays"
    check_slots(cache, f"after a first chunk of {T}", expected, reason)


@pytest.mark.parametrize("T", [2, 3, 7])
def test_a_first_chunk_is_returned_as_a_whole(module, T):
    expected = " ".join(str(position) for position in range(T))
    reason = "its first queries attend to its first keys, even if those are not stored"
    what = f"extend with a first chunk of {T}"
    check_positions(what, *extend(make(module), 0, T), expected, reason)


@pytest.mark.parametrize(
    ("first", "T", "expected"),
    [
        (1, 2, "0 1 2"),
        (3, 2, "1 2 3 4"),
        (4, 2, "2 3 4 5"),
        (5, 2, "3 4 5 6"),
        (4, 3, "2 3 4 5 6"),
        (4, 7, "2 3 4 5 6 7 8 9 10"),
    ],
)
def test_a_later_chunk_is_returned_with_the_positions_before_it(module, first, T, expected):
    cache = decode(make(module), first)
    past = " and ".join(expected.split()[:-T])
    reason = (
        f"in this order, since its first query also attends to {past} (with 3 slots, to at most 2 "
        f"positions before the chunk: read them before they are replaced)"
    )
    what = f"extend with a chunk of {T} at position {first}"
    check_positions(what, *extend(cache, first, T), expected, reason)


@pytest.mark.parametrize(
    ("first", "T", "expected"),
    [(1, 2, "0 1 2"), (4, 2, "3 4 5"), (4, 3, "6 4 5"), (4, 7, "9 10 8")],
)
def test_of_a_later_chunk_the_last_tokens_are_stored(module, first, T, expected):
    cache = decode(make(module), first)
    extend(cache, first, T)
    check_slots(cache, f"after a chunk of {T} at position {first}", expected)


# Rows, layers, limits -------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2])
def test_every_layer_has_slots_of_its_own(module, T):
    cache = make(module)
    extend(cache, 0, T, layer=1)
    expected = {1: "0 - -", 2: "0 1 -"}[T]
    check_slots(cache, "after layer 1 was extended", "- - -", "layer 1 alone was extended")
    check_positions("the slots of layer 1", cache.k[1], cache.v[1], expected, SLOT)


@pytest.mark.parametrize("T", [1, 2, 5])
def test_a_batch_of_one_fills_all_rows_and_is_returned_in_one(module, T):
    cache = make(module, rows=3)
    extend(cache, 0, T, B=1)  # fails unless one row is returned
    expected = {1: "0 - -", 2: "0 1 -", 5: "3 4 2"}[T]
    reason = "a batch of 1 is stored in every row, for several samples of one prompt"
    for row in range(3):
        k, v = cache.k[0, row : row + 1], cache.v[0, row : row + 1]
        check_positions(f"row {row} after a chunk of {T}", k, v, expected, reason)


@pytest.mark.parametrize(("first", "T", "needed"), [(0, 5, 5), (3, 2, 5), (4, 1, 5)])
def test_tokens_beyond_max_len_raise_value_error(module, first, T, needed):
    check_full(decode(make(module, max_len=4), first), first, T, needed)


def test_a_cache_shorter_than_its_window_raises_value_error_too(module):
    check_full(decode(make(module, max_len=2), 2), 2, 1, needed=3)


def test_two_caches_in_use_at_once_keep_their_own_tokens(module):
    decode(make(module), 5)
    reason = "a second generation begins with an empty cache"
    check_slots(decode(make(module), 1), "of a second cache after position 0", "0 - -", reason)


# Independent computations ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_chunks_of_random_sizes_return_what_a_list_of_all_tokens_has(module, seed):
    generator = random.Random(seed)
    window = generator.randint(1, 5)
    cache, first = make(module, max_len=100, window=window), 0
    for _ in range(12):
        T = generator.choice([1, 1, 2, 3, 7])
        expected = " ".join(str(p) for p in range(max(0, first - window + 1), first + T))
        what = f"with window {window}, extend with {T} tokens at position {first}"
        reason = "the last window - 1 positions before, then its own"
        keys, values = extend(cache, first, T)
        if T == 1:  # in any order: sort both
            order = keys[0, 0, :, 0].argsort()
            keys, values = keys[:, :, order], values[:, :, order]
        check_positions(what, keys, values, expected, reason)
        first += T


def test_cached_logits_equal_those_without_cache(module):
    model, x = make_vivid(module), tokens(2, 16)
    cached = feed(model, model.make_cache(2), *x.split([2, 1, 1, 7, 1, 4], dim=1))
    expected = last_logits(model, x)[:, [1, 2, 3, 10, 11, 15]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)


def test_cached_logits_equal_those_of_transformers(module):
    theirs = random_gpt_neo(window=5)
    ours, x = copy_of_gpt_neo(theirs, module), tokens(2, 40)
    cached = feed(ours, ours.make_cache(2), *x.split([7, 1, 20, 11, 1], dim=1))
    with torch.no_grad():
        expected = theirs(x).logits[:, [6, 7, 27, 38, 39]]
    check_equal("against transformers, logits [row, chunk, token id]", cached, expected)
