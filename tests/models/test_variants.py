"""What every model file must compute: each model*.py of the repository's root is tested.

pytest -k model_mine   tests a model file of your own
"""

import copy
import importlib

import pytest
import torch
from variants import (
    MODELS,
    PROMPTS,
    SMALL,
    WINDOW,
    close,
    feed,
    fields,
    last_logits,
    make,
    make_vivid,
    tokens,
)

import sample


@pytest.fixture(params=MODELS)
def module(request):
    return importlib.import_module(request.param)


def change_token(idx, t):
    """Return a copy of token ids (B, T) with another token at position t."""
    changed = idx.clone()
    changed[:, t] = (idx[:, t] + 1) % SMALL["vocab_size"]
    return changed


# Shapes and dtypes ----------------------------------------------------------------------------


def test_a_forward_returns_float32_logits_or_a_loss_or_the_last_logits(module):
    model, x = make(module), tokens(2, 7)
    V = SMALL["vocab_size"]
    outputs = model(x), model(x, x), model(x, cache=model.make_cache(2))
    assert [output.shape for output in outputs] == [(2, 7, V), (), (2, 1, V)]
    assert {output.dtype for output in outputs} == {torch.float32}


def half_precision(model, x, how):
    """Return the logits and the loss of a model in bf16, or under autocast to bf16."""
    if how == "bf16":
        model = copy.deepcopy(model).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        return model(x), model(x, x)


@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_logits_and_loss_in_half_precision_are_float32_and_close(module, how):
    model, x = make_vivid(module), tokens(2, 16)
    full = model(x)
    logits, loss = half_precision(model, x, how)
    assert (logits.dtype, loss.dtype) == (torch.float32, torch.float32)
    assert (full - logits).norm() < 0.03 * full.norm()


def test_a_model_without_biases_has_none(module):
    model = make(module, bias=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model(tokens(2, 7)).isfinite().all()


# The mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, WINDOW, 15])
def test_changing_a_token_changes_no_logit_before_it(module, t):
    model, x = make_vivid(module), tokens(2, 16)
    changed = model(change_token(x, t))
    torch.testing.assert_close(model(x)[:, :t], changed[:, :t], atol=1e-6, rtol=0)


def test_changing_a_token_changes_every_logit_from_it_to_the_end_of_its_window(module):
    model, x = make_vivid(module), tokens(1, 16)
    changed = model(change_token(x, 4))
    difference = (model(x) - changed).abs().amax(dim=2)[0]
    assert (difference[4 : 4 + WINDOW] > 1e-3).all()


@pytest.mark.parametrize(("past", "t"), [(1, 1), (1, 5), (WINDOW, 3), (9, 1), (9, 5)])
def test_in_a_later_chunk_changing_a_token_changes_nothing_before_it(module, past, t):
    model, x = make_vivid(module), tokens(2, past + 6)
    outputs = []  # of the last block, for all positions of the chunk: logits have the last only
    last_block = model.transformer.h[-1]
    last_block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    for idx in (x, change_token(x, past + t)):
        feed(model, model.make_cache(2), idx[:, :past], idx[:, past:])
    _, original, _, changed = outputs
    torch.testing.assert_close(original[:, :t], changed[:, :t], atol=1e-6, rtol=0)


def test_rows_of_a_batch_do_not_attend_to_each_other(module):
    model, x = make_vivid(module), tokens(3, 16)
    one_by_one = torch.cat([model(row[None]) for row in x])
    close(model(x), one_by_one)


# The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "prompt"), [(1, WINDOW), *[(3, prompt) for prompt in PROMPTS]])
def test_prefill_then_token_by_token_gives_the_logits_of_full_forwards(module, B, prompt):
    model, x = make_vivid(module), tokens(B, 16)
    cached = feed(model, model.make_cache(B), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, last_logits(model, x)[:, prompt - 1 :])


@pytest.mark.parametrize(
    "chunks",
    [[2, 2, 12], [5, 5, 6], [1, 6, 1, 8], [11, 5]],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_prefill_in_chunks_gives_the_logits_of_full_forwards(module, chunks):
    model, x = make_vivid(module), tokens(2, 16)
    ends = torch.tensor(chunks).cumsum(0) - 1
    cached = feed(model, model.make_cache(2), *x.split(chunks, dim=1))
    close(cached, last_logits(model, x)[:, ends])


def test_two_generations_in_a_row_with_separate_caches_are_equal(module):
    model, x, other = make_vivid(module), tokens(2, 16), tokens(2, 16, seed=2)
    first = feed(model, model.make_cache(2), x[:, :7], *x[:, 7:].split(1, dim=1))
    feed(model, model.make_cache(2), other[:, :3], *other[:, 3:].split(1, dim=1))
    second = feed(model, model.make_cache(2), x[:, :7], *x[:, 7:].split(1, dim=1))
    assert torch.equal(second, first)


def test_two_caches_in_use_at_once_do_not_affect_each_other(module):
    model, x, other = make_vivid(module), tokens(2, 16), tokens(2, 16, seed=2)
    x_cache, other_cache = model.make_cache(2), model.make_cache(2)
    x_logits, other_logits = [], []
    for t in range(16):
        x_logits.append(feed(model, x_cache, x[:, t : t + 1]))
        other_logits.append(feed(model, other_cache, other[:, t : t + 1]))
    close(torch.cat(x_logits, dim=1), last_logits(model, x))
    close(torch.cat(other_logits, dim=1), last_logits(model, other))


@pytest.mark.parametrize("prompt", [WINDOW - 1, 2 * WINDOW + 1])
def test_a_batch_of_one_prefills_a_cache_of_several_rows(module, prompt):
    model, x = make_vivid(module), tokens(3, 16)
    x[:, :prompt] = x[:1, :prompt]
    cache = model.make_cache(3)
    prefill = feed(model, cache, x[:1, :prompt]).expand(3, -1, -1)
    decoded = feed(model, cache, *x[:, prompt:].split(1, dim=1))
    close(torch.cat([prefill, decoded], dim=1), last_logits(model, x)[:, prompt - 1 :])


def test_a_batch_of_one_prefills_a_cache_of_several_rows_in_chunks(module):
    model, x = make_vivid(module), tokens(3, 16)
    x[:, :9] = x[:1, :9]
    cache = model.make_cache(3)
    feed(model, cache, x[:1, :2], x[:1, 2:8], x[:1, 8:9])
    decoded = feed(model, cache, *x[:, 9:].split(1, dim=1))
    close(decoded, last_logits(model, x)[:, 9:])


@pytest.mark.parametrize("prompt", [WINDOW - 1, 2 * WINDOW + 1])
def test_a_cached_bf16_model_is_close_to_its_full_forward(module, prompt):
    model, x = make_vivid(module).bfloat16(), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    full = last_logits(model, x)[:, prompt - 1 :]
    assert (cached - full).norm() < 0.03 * full.norm()


def test_pos_of_a_cache_is_the_number_of_tokens_processed(module):
    model = make(module)
    cache = model.make_cache(2)
    before = cache.pos
    feed(model, cache, tokens(2, 7), tokens(2, 1))
    assert (before, cache.pos) == (0, 8)


def test_a_cache_has_the_dtype_and_the_device_of_its_model(module):
    model = make(module).to("meta")
    cache = model.make_cache(1)
    bf16_cache = make(module).bfloat16().make_cache(1)
    tensors = [value for value in vars(cache).values() if torch.is_tensor(value)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert bf16_cache.nbytes * 2 == cache.nbytes


@pytest.mark.parametrize("max_len", [WINDOW + 3, None])
def test_the_bytes_of_a_cache_are_those_of_its_keys_and_values(module, max_len):
    slots = max_len or SMALL["block_size"]
    if "window" in fields(module):
        slots = min(slots, WINDOW)
    kv_heads = SMALL["n_kv_head"] if "n_kv_head" in fields(module) else SMALL["n_head"]
    head_dim = SMALL["n_embd"] // SMALL["n_head"]
    numbers = 2 * SMALL["n_layer"] * 3 * kv_heads * slots * head_dim  # keys and values, 3 rows
    assert make(module).make_cache(3, max_len).nbytes == 4 * numbers  # float32


def test_tokens_that_do_not_fit_the_cache_raise_value_error_and_leave_it_unchanged(module):
    model = make_vivid(module)
    cache = model.make_cache(2, max_len=4)
    feed(model, cache, tokens(2, 3))
    before = copy.deepcopy(vars(cache))
    with pytest.raises(ValueError, match=r"(?=.*\b4\b)(?=.*\b5\b)"):
        model(tokens(2, 2), cache=cache)
    after = vars(cache)
    for name, value in before.items():
        if torch.is_tensor(value):
            assert torch.equal(after[name], value), name
        else:
            assert after[name] == value, name


def test_a_cache_can_be_filled_to_its_last_slot(module):
    model, x = make_vivid(module), tokens(2, 4)
    cached = feed(model, model.make_cache(2, max_len=4), *x.split(1, dim=1))
    close(cached, last_logits(model, x))


def test_greedy_generation_equals_that_by_full_forwards(module):
    model, text = make_vivid(module), tokens(1, 4)
    generated = torch.stack(list(sample.generate(model, text, 12, temperature=0)), dim=1)
    for _ in range(12):
        next_token = model(text)[:, -1:].argmax(dim=2)
        text = torch.cat([text, next_token], dim=1)
    assert torch.equal(generated, text[:, 4:])
