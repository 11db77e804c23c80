"""The idea of the exercise window: a query attends to the last `window` keys, its own included."""

import pytest
import torch
from checks import (
    by_loops,
    check_device,
    check_dropout,
    check_equal,
    check_mask,
    check_scale,
    check_shape,
    random_qkv,
    with_shapes,
)
from exercises import missing, version_fixture
from foreign import random_gpt_neo
from oracles import copy_of_gpt_neo
from variants import make_vivid, tokens

module = version_fixture("window")
HEADS = 2, 2  # query and KV heads


def make(module, window, dropout=0.0):
    """Return an attention layer of two heads, in evaluation mode."""
    config = module.GPTConfig(n_head=2, n_embd=8, window=window, dropout=dropout)
    layer = module.CausalSelfAttention(config, layer=0).eval()
    layer.attend_dense = with_shapes(layer.attend_dense)
    return layer


def test_the_result_has_the_shape_of_the_queries(module):
    q, k, v = random_qkv(HEADS, T=2, S=4)
    y = make(module, 3).attend_dense(q, k, v)
    check_shape("the result of attend_dense", y, "(B, H, T, D)", (2, 2, 2, 4))


# window, T, S
WITHIN_THE_WINDOW = [(5, 4, 4), (3, 3, 3)]
LONGER = [(3, 7, 7), (1, 4, 4)]
AFTER_CACHED_TOKENS = [(3, 2, 4), (4, 5, 8), (2, 2, 7)]


@pytest.mark.parametrize(("window", "T", "S"), WITHIN_THE_WINDOW + LONGER + AFTER_CACHED_TOKENS)
def test_each_query_attends_to_the_keys_of_its_window(module, window, T, S):
    check_mask(make(module, window).attend_dense, HEADS, T, S, window)


@pytest.mark.parametrize(("T", "S"), [(3, 3), (7, 7), (2, 4)])
def test_scores_are_divided_by_the_root_of_the_head_dim(module, T, S):
    check_scale(make(module, 4).attend_dense, HEADS, T, S)


@pytest.mark.parametrize(("T", "S"), [(3, 3), (7, 7), (2, 4)])
def test_probabilities_are_dropped_in_training_only(module, T, S):
    attention = make(module, 4, dropout=0.5)
    check_dropout(attention, attention.attend_dense, HEADS, T, S)


@pytest.mark.parametrize(("T", "S"), [(3, 3), (7, 7), (2, 4)])
def test_masks_are_on_the_device_of_the_queries(module, T, S):
    check_device(make(module, 4).attend_dense, *random_qkv(HEADS, T, S))


@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (2, 4), (3, 11)])
def test_attention_equals_a_loop_over_heads_and_queries(module, window, T, S):
    heads = 3, 3  # attend_blocks calls attend_dense with blocks as heads: any number of them
    q, k, v = random_qkv(heads, T, S)
    y = make(module, window).attend_dense(q, k, v)
    what = f"with window {window}, {T} queries and {S} keys, the result [row, head, query, channel]"
    check_equal(what, y, by_loops(q, k, v, window))


def test_the_receptive_field_grows_by_window_minus_one_per_layer(module):
    model, x = make_vivid(module, n_layer=2, window=3), tokens(1, 12)
    changed = x.clone()
    changed[0, 2] = (x[0, 2] + 1) % 61
    with torch.no_grad():
        differs = (model(x) - model(changed)).abs().amax(dim=2)[0] > 1e-6
    reached = differs.nonzero().flatten().tolist()
    if reached != [2, 3, 4, 5, 6]:
        missing(
            f"with window 3 and 2 layers, a change of token 2 must change the logits of positions "
            f"2 to 6, 2 * (3 - 1) tokens further, but changes those of {reached}"
        )


def test_logits_equal_those_of_transformers(module):
    theirs, x = random_gpt_neo(window=5), tokens(2, 40)
    with torch.no_grad():
        logits, expected = copy_of_gpt_neo(theirs, module)(x), theirs(x).logits
    check_equal("against transformers, logits [row, position, token id]", logits, expected)
