"""What the three ideas promise together: transformers' StarCoder2 with its sliding window, and text without end."""

import pytest
import torch
from test_model_rope import loaded, relative_errors, starcoder2
from test_variants import close, feed, make_vivid, tokens

import model_rope
import model_rope_gqa_swa
import sample

# transformers ---------------------------------------------------------------------------------

# n_layer, n_head, n_kv_head, n_embd, vocab_size, window, T; past 320 tokens attention goes by blocks
SHAPES = [
    (1, 2, 1, 4, 11, 1, 7),
    (2, 6, 2, 24, 61, 3, 13),
    (3, 4, 2, 32, 101, 5, 33),
    (2, 4, 4, 32, 61, 8, 9),
    (2, 4, 1, 64, 257, 16, 50),
    (1, 4, 2, 16, 61, 5, 321),
    (2, 4, 2, 16, 61, 70, 389),
    (1, 4, 1, 16, 61, 300, 601),
]


def pair(n_layer, n_head, n_kv_head, n_embd, vocab_size, window, attention="eager", **options):
    """StarCoder2 and model_rope_gqa_swa.py with its weights."""
    theirs = starcoder2(
        n_layer, n_head, n_embd, vocab_size, n_kv_head, window=window, attention=attention
    )
    return theirs, loaded(model_rope_gqa_swa, theirs, n_kv_head=n_kv_head, window=window, **options)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_those_of_transformers(shape, attention):
    *shape, T = shape
    theirs, ours = pair(*shape, attention=attention)
    x = tokens(2, T, vocab_size=ours.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_those_of_transformers(shape):
    *shape, T = shape
    theirs, ours = pair(*shape)
    errors = relative_errors(ours, theirs, tokens(2, T + 1, vocab_size=ours.config.vocab_size))
    assert max(errors.values()) < 1e-3, errors


@pytest.mark.parametrize("window", [4, 6, None])
def test_the_window_of_transformers_is_in_use(window):
    x = tokens(1, 20)
    with torch.no_grad():
        here, there = (starcoder2(2, 4, 32, 61, 2, window=w)(x).logits for w in (5, window))
    torch.testing.assert_close(here[:, :4], there[:, :4], atol=1e-5, rtol=0)
    assert (here - there)[:, 6:].abs().amax(dim=2).min() > 1e-3


def test_cached_logits_in_chunks_equal_those_of_transformers():
    theirs, ours = pair(2, 6, 2, 24, 61, 3, block_size=8)
    sizes = [4, 2, 9, 1, 4, 2, 3, 20, 1]
    x, ends = tokens(2, sum(sizes)), torch.tensor(sizes).cumsum(0) - 1
    with torch.no_grad():
        expected = theirs(x).logits[:, ends]
    torch.testing.assert_close(
        feed(ours, ours.make_cache(2), *x.split(sizes, dim=1)), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("prompt", [1, 5, 12, 40])
def test_greedy_text_far_past_window_and_block_size_equals_that_of_transformers(prompt):
    theirs, ours = pair(2, 4, 2, 32, 61, 5, block_size=8)
    x = tokens(1, prompt)
    expected = theirs.generate(x, max_new_tokens=60, do_sample=False, pad_token_id=0)
    made = torch.stack(list(sample.generate(ours, x, 60, temperature=0)), dim=1)
    assert torch.equal(made, expected[:, prompt:])


# model_rope.py --------------------------------------------------------------------------------


def without_groups_and_window(window):
    """model_rope_gqa_swa.py with n_kv_head = n_head, and model_rope.py with the same weights."""
    ours = make_vivid(model_rope_gqa_swa, n_kv_head=4, window=window)
    c = ours.config
    base = model_rope.GPT(
        model_rope.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    ).eval()
    base.load_state_dict(ours.state_dict())
    return ours, base


@pytest.mark.parametrize(("window", "T"), [(16, 16), (17, 16), (340, 340), (1000, 340)])
def test_with_all_heads_and_a_full_window_logits_equal_model_rope_s(window, T):
    ours, base = without_groups_and_window(window)
    close(ours(tokens(2, T)), base(tokens(2, T)))


@pytest.mark.parametrize("window", [16, 100])
def test_with_all_heads_and_a_full_window_cached_logits_equal_model_rope_s(window):
    ours, base = without_groups_and_window(window)
    chunks = tokens(2, 16).split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(2), *chunks), feed(base, base.make_cache(2), *chunks))


# Text without end -----------------------------------------------------------------------------


def test_a_cache_has_the_same_bytes_however_long_the_text():
    ours = make_vivid(model_rope_gqa_swa)
    sizes = {ours.make_cache(2, max_len).nbytes for max_len in (5, 10, 10**9, None)}
    assert sizes == {
        2 * 3 * 2 * 2 * 5 * 8 * 4
    }  # keys and values, layers, rows, kv heads, window, head size, bytes


def test_by_default_a_cache_takes_tokens_without_end():
    ours, x = make_vivid(model_rope_gqa_swa, block_size=16), tokens(2, 48)
    close(feed(ours, ours.make_cache(2), *x.split(1, dim=1)), ours(x))


@pytest.mark.parametrize("sizes", [[7, 4], [11], [10, 1], [*[1] * 11]], ids=str)
def test_a_cache_with_a_max_len_refuses_tokens_past_it(sizes):
    ours, x = make_vivid(model_rope_gqa_swa), tokens(1, 11)
    cache, *chunks = ours.make_cache(1, max_len=10), *x.split(sizes, dim=1)
    for chunk in chunks[:-1]:
        ours(chunk, cache=cache)
    with pytest.raises(ValueError, match=r"10.*11"):
        ours(chunks[-1], cache=cache)
