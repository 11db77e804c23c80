"""RoPE, GQA and SWA together: transformers' StarCoder2 with a sliding window."""

import pytest
import torch
from starcoder2 import loaded, relative_errors, starcoder2
from variants import close, feed, make_vivid, tokens

import model_rope
import model_rope_gqa_swa
import sample

# transformers ---------------------------------------------------------------------------------

# n_layer, n_head, n_kv_head, n_embd, vocab_size, window, T
# Past 256 tokens attention is computed in blocks.
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
    """Return StarCoder2, and model_rope_gqa_swa.py's model with its weights."""
    theirs = starcoder2(
        n_layer, n_head, n_embd, vocab_size, n_kv_head, window=window, attention=attention
    )
    ours = loaded(model_rope_gqa_swa, theirs, n_kv_head=n_kv_head, window=window, **options)
    return theirs, ours


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
def test_transformers_applies_its_window(window):
    x = tokens(1, 20)
    with torch.no_grad():
        window_5 = starcoder2(2, 4, 32, 61, 2, window=5)(x).logits
        other = starcoder2(2, 4, 32, 61, 2, window=window)(x).logits
    torch.testing.assert_close(window_5[:, :4], other[:, :4], atol=1e-5, rtol=0)
    assert (window_5 - other)[:, 6:].abs().amax(dim=2).min() > 1e-3


def test_cached_logits_in_chunks_equal_those_of_transformers():
    theirs, ours = pair(2, 6, 2, 24, 61, 3, block_size=8)
    sizes = [4, 2, 9, 1, 4, 2, 3, 20, 1]
    ends = torch.tensor(sizes).cumsum(0) - 1
    x = tokens(2, sum(sizes))
    with torch.no_grad():
        expected = theirs(x).logits[:, ends]
    cached = feed(ours, ours.make_cache(2), *x.split(sizes, dim=1))
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [1, 5, 12, 40])
def test_greedy_text_far_past_window_and_block_size_equals_that_of_transformers(prompt):
    theirs, ours = pair(2, 4, 2, 32, 61, 5, block_size=8)
    x = tokens(1, prompt)
    expected = theirs.generate(x, max_new_tokens=60, do_sample=False, pad_token_id=0)
    generated = torch.stack(list(sample.generate(ours, x, 60, temperature=0)), dim=1)
    assert torch.equal(generated, expected[:, prompt:])


# model_rope.py --------------------------------------------------------------------------------


def same_weights(window):
    """Return models of model_rope_gqa_swa.py (MHA) and of model_rope.py with the same weights."""
    ours = make_vivid(model_rope_gqa_swa, n_kv_head=4, window=window)
    c = ours.config
    config = model_rope.GPTConfig(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    base = model_rope.GPT(config).eval()
    base.load_state_dict(ours.state_dict())
    return ours, base


@pytest.mark.parametrize(("window", "T"), [(16, 16), (17, 16), (340, 340), (1000, 340)])
def test_with_mha_and_a_full_window_logits_equal_those_of_model_rope(window, T):
    ours, base = same_weights(window)
    x = tokens(2, T)
    close(ours(x), base(x))


@pytest.mark.parametrize("window", [16, 100])
def test_with_mha_and_a_full_window_cached_logits_equal_those_of_model_rope(window):
    ours, base = same_weights(window)
    chunks = tokens(2, 16).split([4, 1, 1, 6, 1, 3], dim=1)
    close(feed(ours, ours.make_cache(2), *chunks), feed(base, base.make_cache(2), *chunks))


# Endless decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", [5, 10, 10**9, None])
def test_the_bytes_of_a_cache_do_not_depend_on_max_len(max_len):
    cache = make_vivid(model_rope_gqa_swa).make_cache(2, max_len)
    # keys and values, layers, rows, KV heads, window, head_dim, bytes of float32
    assert cache.nbytes == 2 * 3 * 2 * 2 * 5 * 8 * 4


def test_by_default_a_cache_accepts_tokens_past_block_size():
    ours, x = make_vivid(model_rope_gqa_swa, block_size=16), tokens(2, 48)
    close(feed(ours, ours.make_cache(2), *x.split(1, dim=1)), ours(x))


@pytest.mark.parametrize("sizes", [[7, 4], [11], [10, 1], [1] * 11], ids=str)
def test_a_cache_with_a_max_len_refuses_tokens_past_it(sizes):
    ours, x = make_vivid(model_rope_gqa_swa), tokens(1, 11)
    cache = ours.make_cache(1, max_len=10)
    *accepted, refused = x.split(sizes, dim=1)
    for chunk in accepted:
        ours(chunk, cache=cache)
    with pytest.raises(ValueError, match=r"10.*11"):
        ours(refused, cache=cache)
