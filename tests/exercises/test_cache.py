"""The idea of the exercise cache: keys and values are stored, and returned with all before them."""

import pytest
import torch
from checks import check_equal, check_full, check_positions, extend
from exercises import missing, version_fixture
from oracles import copy_of_gpt2, gpt2
from variants import feed, last_logits, make_vivid, tokens

module = version_fixture("cache")


def make(module, rows=2, max_len=6):
    """Return an empty cache of two layers, with two heads of four channels."""
    config = module.GPTConfig(n_layer=2, n_head=2, n_embd=8)
    return module.KVCache(config, rows, max_len, "cpu", torch.float32)


def test_the_first_tokens_are_returned_as_they_are(module):
    keys, values = extend(make(module), 0, 3)
    check_positions("extend with 3 tokens", keys, values, "0 1 2", "the cache was empty")


def test_the_first_tokens_are_stored_at_the_first_positions(module):
    cache = make(module)
    k, v = cache.k, cache.v
    extend(cache, 0, 3)
    if cache.k is not k or cache.v is not v:
        missing("extend replaced the tensor cache.k or cache.v: write into the one that is there")
    reason = "they are written into self.k[layer] and self.v[layer]"
    check_positions("cache.k[0] after 3 tokens", k[0], v[0], "0 1 2 - - -", reason)


def test_later_tokens_are_stored_from_pos_on(module):
    cache = make(module)
    extend(cache, 0, 3)
    extend(cache, 3, 2)
    reason = "2 tokens at pos = 3 are written from position 3 on, not over earlier ones"
    check_positions("cache.k[0] after 3 + 2 tokens", cache.k[0], cache.v[0], "0 1 2 3 4 -", reason)


def test_later_tokens_are_returned_with_all_before_them(module):
    cache = make(module)
    extend(cache, 0, 3)
    reason = "the 3 cached tokens, then the 2 new ones, and no position that is not in use"
    check_positions("extend with pos = 3", *extend(cache, 3, 2), "0 1 2 3 4", reason)


def test_every_layer_has_keys_and_values_of_its_own(module):
    cache = make(module)
    extend(cache, 0, 3, layer=0)
    reason = "layer 0 alone was extended"
    check_positions("cache.k[1]", cache.k[1], cache.v[1], "- - - - - -", reason)
    extend(cache, 0, 2, layer=1)
    reason = "layer 1 has 2 tokens; all layers write at the same pos"
    check_positions("cache.k[1]", cache.k[1], cache.v[1], "0 1 - - - -", reason)


def test_a_batch_of_one_fills_all_rows_and_is_returned_in_one(module):
    cache = make(module, rows=3)
    extend(cache, 0, 2, B=1)  # fails unless one row is returned
    reason = "a batch of 1 is stored in every row, for several samples of one prompt"
    for row in range(3):
        k, v = cache.k[0, row : row + 1], cache.v[0, row : row + 1]
        check_positions(f"row {row} of the cache", k, v, "0 1 - - - -", reason)


def test_a_cache_can_be_filled_to_its_end(module):
    cache = make(module)
    extend(cache, 0, 4)
    reason = "6 tokens fit into max_len = 6"
    check_positions("extend with pos = 4", *extend(cache, 4, 2), "0 1 2 3 4 5", reason)


@pytest.mark.parametrize(("first", "T", "needed"), [(0, 7, 7), (5, 2, 7), (6, 1, 7)])
def test_tokens_that_do_not_fit_raise_value_error(module, first, T, needed):
    cache = make(module)
    for position in range(first):
        extend(cache, position, 1)
    check_full(cache, first, T, needed)


def test_two_caches_in_use_at_once_keep_their_own_tokens(module):
    first, second = make(module), make(module)
    extend(first, 0, 4)
    extend(second, 0, 1)
    reason = "a second generation begins with an empty cache"
    check_positions("a second cache", *extend(second, 1, 1), "0 1", reason)


def test_cached_logits_equal_those_without_cache(module):
    model, x = make_vivid(module), tokens(2, 16)
    cached = feed(model, model.make_cache(2), *x.split([5, 1, 1, 6, 3], dim=1))
    expected = last_logits(model, x)[:, [4, 5, 6, 12, 15]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)


def test_cached_logits_equal_those_of_transformers(module):
    theirs = gpt2(2, 3, 24, 17, 61)
    ours, x = copy_of_gpt2(theirs, module), tokens(2, 17)
    cached = feed(ours, ours.make_cache(2), *x.split([6, 4, 1, 1, 5], dim=1))
    with torch.no_grad():
        expected = theirs(x).logits[:, [5, 9, 10, 11, 16]]
    check_equal("against transformers, logits [row, chunk, token id]", cached, expected)
