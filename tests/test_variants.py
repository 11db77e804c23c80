"""What every model file promises: run over each model*.py of the repository's root, one of one's own included.

    pytest -k model_mine

A model is shrunk through the fields that it has; fields that this file does not know keep their defaults. Where
attention is tested, every parameter is random and large: with GPT-2's small initial weights attention is almost an
average, and a wrong mask or scale would hardly show.
"""

import copy
import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sample

MODELS = sorted(path.stem for path in Path(__file__).parent.parent.glob("model*.py"))
WINDOW = 5
SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32, "n_kv_head": 2, "window": WINDOW}
PROMPTS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1]  # shorter than, equal to and longer than a window


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small lose most of the time to threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=MODELS)
def module(request):
    return importlib.import_module(request.param)


def fields(module):
    return {field.name for field in dataclasses.fields(module.GPTConfig)}


def make(module, **changes):
    """A small model as it is initialized."""
    torch.manual_seed(0)
    options = {name: value for name, value in (SMALL | changes).items() if name in fields(module)}
    return module.GPT(module.GPTConfig(**options))


@torch.no_grad()
def make_vivid(module, **changes):
    """A small model in which every parameter matters, for evaluation."""
    model = make(module, **changes)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


def tokens(*shape, vocab_size=SMALL["vocab_size"], seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def last_logits(model, idx):
    """The logits after each token (B, T, V), by a forward without cache over each prefix."""
    return torch.cat([model(idx[:, : t + 1])[:, -1:] for t in range(idx.size(1))], dim=1)


@torch.no_grad()
def feed(model, cache, *chunks):
    """The logits after each chunk (B, len(chunks), V), by forwards with a cache."""
    return torch.cat([model(chunk, cache=cache) for chunk in chunks], dim=1)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# Shapes and dtypes ----------------------------------------------------------------------------------------------------


def test_without_targets_a_forward_returns_float32_logits_of_every_position(module):
    logits = make(module)(tokens(2, 7))
    assert (logits.shape, logits.dtype) == ((2, 7, SMALL["vocab_size"]), torch.float32)


def test_with_targets_a_forward_returns_a_float32_scalar(module):
    loss = make(module)(tokens(2, 7), tokens(2, 7, seed=2))
    assert (loss.shape, loss.dtype) == ((), torch.float32)


def test_with_a_cache_a_forward_returns_float32_logits_of_the_last_position(module):
    model = make(module)
    logits = model(tokens(2, 7), cache=model.make_cache(2))
    assert (logits.shape, logits.dtype) == ((2, 1, SMALL["vocab_size"]), torch.float32)


def test_logits_and_loss_of_a_bf16_model_are_float32(module):
    model, x = make(module).bfloat16(), tokens(2, 7)
    assert (model(x).dtype, model(x, x).dtype) == (torch.float32, torch.float32)


def test_logits_and_loss_under_autocast_are_float32(module):
    model, x = make(module), tokens(2, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).dtype, model(x, x).dtype) == (torch.float32, torch.float32)


def test_a_bf16_model_is_close_to_the_float32_one(module):
    model, x = make_vivid(module), tokens(2, 16)
    full, half = model(x), copy.deepcopy(model).bfloat16()(x)
    assert (full - half).norm() < 0.03 * full.norm()


def test_autocast_to_bf16_is_close_to_float32(module):
    model, x = make_vivid(module), tokens(2, 16)
    full = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert (full - half).norm() < 0.03 * full.norm()


def test_a_model_without_biases_has_none(module):
    model = make(module, bias=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert model(tokens(2, 7)).isfinite().all()


# Who attends to whom --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, WINDOW, 15])
def test_changing_a_token_changes_no_logit_before_it(module, t):
    model, x = make_vivid(module), tokens(2, 16)
    changed = x.clone()
    changed[:, t] = (x[:, t] + 1) % SMALL["vocab_size"]
    torch.testing.assert_close(model(x)[:, :t], model(changed)[:, :t], atol=1e-6, rtol=0)


def test_changing_a_token_changes_every_logit_from_it_to_the_end_of_its_window(module):
    model, x = make_vivid(module), tokens(1, 16)
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % SMALL["vocab_size"]
    difference = (model(x) - model(changed)).abs().amax(dim=2)[0]
    assert (difference[4 : 4 + WINDOW] > 1e-3).all()


@pytest.mark.parametrize("past", [1, WINDOW, 9])
@pytest.mark.parametrize("t", [1, 3, 5])
def test_in_a_later_chunk_changing_a_token_changes_nothing_before_it(module, past, t):
    model, x = make_vivid(module), tokens(2, past + 6)
    changed = x.clone()
    changed[:, past + t] = (x[:, past + t] + 1) % SMALL["vocab_size"]
    streams = []
    model.transformer.h[-1].register_forward_hook(lambda block, inputs, output: streams.append(output))
    for idx in (x, changed):
        feed(model, model.make_cache(2), idx[:, :past], idx[:, past:])
    _, before, _, after = streams
    torch.testing.assert_close(before[:, :t], after[:, :t], atol=1e-6, rtol=0)


def test_rows_of_a_batch_do_not_see_each_other(module):
    model, x = make_vivid(module), tokens(3, 16)
    close(model(x), torch.cat([model(row[None]) for row in x]))


# The cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("B", [1, 3])
def test_prefill_then_token_by_token_gives_the_logits_of_full_forwards(module, prompt, B):
    model, x = make_vivid(module), tokens(B, 16)
    cached = feed(model, model.make_cache(B), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    close(cached, last_logits(model, x)[:, prompt - 1 :])


def test_token_by_token_from_the_first_gives_the_logits_of_full_forwards(module):
    model, x = make_vivid(module), tokens(2, 16)
    close(feed(model, model.make_cache(2), *x.split(1, dim=1)), last_logits(model, x))


@pytest.mark.parametrize(
    "chunks",
    [[2, 2, 12], [5, 5, 6], [4, 1, 11], [1, 6, 1, 8], [3, 10, 3], [11, 5], [15, 1], [6, 2, 2, 6]],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_prefill_in_chunks_gives_the_logits_of_full_forwards(module, chunks):
    model, x = make_vivid(module), tokens(2, 16)
    ends = torch.tensor(chunks).cumsum(0) - 1
    close(feed(model, model.make_cache(2), *x.split(chunks, dim=1)), last_logits(model, x)[:, ends])


def test_two_generations_in_a_row_with_caches_of_their_own_are_equal(module):
    model, x, other = make_vivid(module), tokens(2, 16), tokens(2, 16, seed=2)
    first = feed(model, model.make_cache(2), x[:, :7], *x[:, 7:].split(1, dim=1))
    feed(model, model.make_cache(2), other[:, :3], *other[:, 3:].split(1, dim=1))
    assert torch.equal(feed(model, model.make_cache(2), x[:, :7], *x[:, 7:].split(1, dim=1)), first)


def test_two_caches_in_use_at_once_do_not_disturb_each_other(module):
    model, x, other = make_vivid(module), tokens(2, 16), tokens(2, 16, seed=2)
    a, b = model.make_cache(2), model.make_cache(2)
    pairs = [(feed(model, a, x[:, t : t + 1]), feed(model, b, other[:, t : t + 1])) for t in range(16)]
    close(torch.cat([logits for logits, _ in pairs], dim=1), last_logits(model, x))
    close(torch.cat([logits for _, logits in pairs], dim=1), last_logits(model, other))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_batch_of_one_prefills_a_cache_of_several_rows(module, prompt):
    model, x = make_vivid(module), tokens(3, 16)
    x[:, :prompt] = x[:1, :prompt]
    cached = feed(model, cache := model.make_cache(3), x[:1, :prompt])
    cached = torch.cat([cached.expand(3, -1, -1), feed(model, cache, *x[:, prompt:].split(1, dim=1))], dim=1)
    close(cached, last_logits(model, x)[:, prompt - 1 :])


def test_a_batch_of_one_prefills_a_cache_of_several_rows_in_chunks(module):
    model, x = make_vivid(module), tokens(3, 16)
    x[:, :9] = x[:1, :9]
    feed(model, cache := model.make_cache(3), x[:1, :2], x[:1, 2:8], x[:1, 8:9])
    close(feed(model, cache, *x[:, 9:].split(1, dim=1)), last_logits(model, x)[:, 9:])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_cached_bf16_model_is_close_to_its_full_forward(module, prompt):
    model, x = make_vivid(module).bfloat16(), tokens(2, 16)
    cached = feed(model, model.make_cache(2), x[:, :prompt], *x[:, prompt:].split(1, dim=1))
    full = last_logits(model, x)[:, prompt - 1 :]
    assert (cached - full).norm() < 0.03 * full.norm()


def test_a_cache_counts_the_tokens_that_it_has_seen(module):
    model = make(module)
    cache = model.make_cache(2)
    before = cache.pos
    feed(model, cache, tokens(2, 7), tokens(2, 1))
    assert (before, cache.pos) == (0, 8)


def test_a_cache_has_the_dtype_of_its_model(module):
    model = make(module)
    assert make(module).bfloat16().make_cache(1).nbytes * 2 == model.make_cache(1).nbytes


def test_a_cache_is_on_the_device_of_its_model(module):
    cache = make(module).to("meta").make_cache(2)
    assert {value.device.type for value in vars(cache).values() if torch.is_tensor(value)} == {"meta"}


@pytest.mark.parametrize("max_len", [WINDOW + 3, None])
def test_the_bytes_of_a_cache_are_those_of_its_keys_and_values(module, max_len):
    slots = max_len or SMALL["block_size"]
    slots = min(slots, WINDOW) if "window" in fields(module) else slots
    heads = SMALL["n_kv_head"] if "n_kv_head" in fields(module) else SMALL["n_head"]
    head_dim = SMALL["n_embd"] // SMALL["n_head"]
    by_hand = 2 * SMALL["n_layer"] * 3 * heads * slots * head_dim * 4  # keys and values, 3 rows, float32
    assert make(module).make_cache(3, max_len).nbytes == by_hand


def test_a_full_cache_raises_value_error_with_both_numbers(module):
    model = make(module)
    cache = model.make_cache(2, max_len=4)
    feed(model, cache, tokens(2, 3))
    with pytest.raises(ValueError, match=r"4.*5"):
        model(tokens(2, 2), cache=cache)


def test_a_token_that_does_not_fit_leaves_the_cache_as_it_was(module):
    model = make_vivid(module)
    cache = model.make_cache(2, max_len=4)
    feed(model, cache, tokens(2, 3))
    before = copy.deepcopy(vars(cache))
    with pytest.raises(ValueError):
        model(tokens(2, 2), cache=cache)
    after = vars(cache)
    assert all(torch.equal(after[k], v) if torch.is_tensor(v) else after[k] == v for k, v in before.items())


def test_a_cache_can_be_filled_to_its_last_place(module):
    model, x = make_vivid(module), tokens(2, 4)
    close(feed(model, model.make_cache(2, max_len=4), *x.split(1, dim=1)), last_logits(model, x))


def test_greedy_generation_chooses_what_full_forwards_would(module):
    model, text = make_vivid(module), tokens(1, 4)
    made = torch.stack(list(sample.generate(model, text, 12, temperature=0)), dim=1)
    for _ in range(12):
        text = torch.cat([text, model(text)[:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(made, text[:, 4:])


# The loss -------------------------------------------------------------------------------------------------------------


def test_the_untrained_loss_is_close_to_that_of_guessing(module):
    loss = make(module, vocab_size=509)(tokens(8, 16, vocab_size=509), tokens(8, 16, vocab_size=509, seed=2))
    assert loss.item() == pytest.approx(math.log(509), abs=0.05)


def test_the_loss_is_the_mean_negative_log_probability_of_the_targets_that_are_not_minus_1(module):
    model, x, y = make_vivid(module), tokens(3, 7), tokens(3, 7, seed=2)
    y[0, 2:5] = y[2] = -1
    p = model(x).detach().double().softmax(dim=2)
    by_hand = [-math.log(p[b, t, y[b, t]]) for b in range(3) for t in range(7) if y[b, t] >= 0]
    assert model(x, y).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_the_loss_is_0_where_there_is_no_target(module):
    assert make(module)(tokens(2, 7), torch.full((2, 7), -1)).item() == 0


def test_the_gradients_are_0_where_there_is_no_target(module):
    model = make(module)
    model(tokens(2, 7), torch.full((2, 7), -1)).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_every_parameter_has_a_gradient(module):
    model = make_vivid(module)
    model(tokens(2, 16), tokens(2, 16, seed=2)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() == 0] == []


def test_a_few_steps_of_training_learn_a_batch_by_heart(module):
    model, x, y = make(module, n_layer=1), tokens(2, 16), tokens(2, 16, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    assert model(x, y).item() < 0.5


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_is_off_in_evaluation(module):
    plain, dropping = make_vivid(module), make_vivid(module, dropout=0.5)
    x = tokens(2, 7)
    assert torch.equal(dropping(x), plain(x))


def test_dropout_is_on_in_training(module):
    model, x = make_vivid(module, dropout=0.5).train(), tokens(2, 7)
    assert not torch.allclose(model(x), model(x))


def test_dropout_follows_the_seed(module):
    model, x = make_vivid(module, dropout=0.5).train(), tokens(2, 7)
    a, b = (torch.manual_seed(3) and model(x) for _ in range(2))
    assert torch.equal(a, b)


def test_dropout_reaches_embedding_attention_and_mlp_of_every_block(module):
    model, dropped = make_vivid(module, dropout=0.5).train(), []
    model.transformer.h[0].register_forward_pre_hook(lambda block, inputs: dropped.append(inputs[0]))
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            part.register_forward_hook(lambda part, inputs, output: dropped.append(output))
    model(tokens(2, 16))
    assert len(dropped) == 1 + 2 * SMALL["n_layer"]
    assert all(0.4 < (output == 0).float().mean() < 0.6 for output in dropped)


# Parameters -----------------------------------------------------------------------------------------------------------


def test_parameters_have_gpt2_s_names(module):
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{i}.{part}.{what}" for i in range(3) for part in parts for what in ("weight", "bias")]
    names += ["ln_f.weight", "ln_f.bias"]
    learned = {name.removeprefix("transformer.") for name, _ in make(module).named_parameters()}
    assert learned | {"wpe.weight"} == set(names)  # a model with rotary positions has no wpe


def test_weights_are_out_by_in(module):
    C, head_dim = SMALL["n_embd"], SMALL["n_embd"] // SMALL["n_head"]
    heads = SMALL["n_kv_head"] if "n_kv_head" in fields(module) else SMALL["n_head"]
    shapes = {name: tuple(p.shape) for name, p in make(module).transformer.h[0].named_parameters() if p.dim() == 2}
    assert shapes == {
        "attn.c_attn.weight": (C + 2 * heads * head_dim, C),
        "attn.c_proj.weight": (C, C),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_proj.weight": (C, 4 * C),
    }


def test_the_head_is_the_token_embedding(module):
    model = make_vivid(module)
    seen = []
    model.transformer.ln_f.register_forward_hook(lambda norm, inputs, output: seen.append(output))
    logits = model(tokens(2, 7))
    close(logits, seen[0] @ model.transformer.wte.weight.T)


def test_the_state_dict_is_the_parameters_and_nothing_else(module):
    model = make(module)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert not any("lm_head" in name for name in model.state_dict())


def test_there_are_no_buffers(module):
    assert list(make(module).buffers()) == []


def test_a_model_loads_by_name_what_another_saved(module, tmp_path):
    model, x = make_vivid(module), tokens(2, 7)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(module)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.eval()(x), model(x))


def test_a_model_is_made_on_the_meta_device_without_memory(module):
    with torch.device("meta"):
        model = module.GPT(module.GPTConfig())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_from_the_meta_device_loads_weights_and_works(module):
    model, x = make_vivid(module), tokens(2, 7)
    with torch.device("meta"):
        other = make(module)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(x), model(x))


def test_initialization_is_gpt2_s(module):
    n_layer = 8
    model = make(module, n_layer=n_layer, n_embd=64, vocab_size=500, block_size=100)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:  # LayerNorm
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            assert p.mean().abs() < 0.1 * std and p.std().item() == pytest.approx(std, rel=0.05), name


def test_initial_weights_are_normal(module):
    model = make(module, n_embd=64)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            within = [(p.abs() < n * p.std()).float().mean().item() for n in (1, 2)]
            assert within == pytest.approx([0.683, 0.954], abs=0.03), name


def test_the_seed_decides_the_initial_weights(module):
    a, b = make(module).state_dict(), make(module).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# Compilation and arithmetic -------------------------------------------------------------------------------------------


def test_training_compiles_without_graph_breaks(module):
    model, x, y = make(module, n_layer=1), tokens(2, 16), tokens(2, 16, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x, y), model(x, y))


def test_evaluation_compiles_without_graph_breaks(module):
    model, x = make_vivid(module, n_layer=1), tokens(2, 16)
    torch._dynamo.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def attention_flops(module, T):
    """Of a training step over one sequence: 12 D for each query head and key in sight, the keys counted one by one."""
    window = WINDOW if "window" in fields(module) else T
    keys = sum(1 for i in range(T) for j in range(T) if 0 <= i - j < window)
    return 12 * SMALL["n_layer"] * SMALL["n_embd"] * keys


@pytest.mark.parametrize("T", [1, 7, 16])
def test_flops_per_token_are_those_of_matrix_products_and_of_keys_in_sight(module, T):
    model, x = make(module), tokens(2, T)
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    expected = products / x.numel() + attention_flops(module, T) / T
    assert model.flops_per_token(T) == pytest.approx(expected, abs=1)


def test_flops_per_token_are_a_whole_number(module):
    assert isinstance(make(module).flops_per_token(16), int)


# Configs --------------------------------------------------------------------------------------------------------------


def test_the_defaults_are_gpt2_small(module):
    c = module.GPTConfig()
    shape = (c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias)
    assert shape == (1024, 50257, 12, 12, 768, 0.0, True)


@pytest.mark.parametrize("name", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "window"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_1_is_refused(module, name, value):
    if name not in fields(module):
        pytest.skip(f"has no {name}")
    with pytest.raises(ValueError, match=f"{name}={value}.*1"):
        module.GPTConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability_below_1_is_refused(module, value):
    with pytest.raises(ValueError, match=f"dropout={value}"):
        module.GPTConfig(dropout=value)


def test_channels_that_the_heads_do_not_divide_are_refused_with_both_numbers(module):
    with pytest.raises(ValueError, match=r"n_embd=100 .*n_head=3"):
        make(module, n_embd=100, n_head=3, n_kv_head=3)


@pytest.mark.parametrize(("n_embd", "n_head"), [(100, 3), (101, 3), (1, 3), (7, 4)])
def test_the_n_embd_that_the_refusal_proposes_is_accepted(module, n_embd, n_head):
    with pytest.raises(ValueError) as error:
        make(module, n_embd=n_embd, n_head=n_head, n_kv_head=1)
    proposed = int(re.findall(r"n_embd=(\d+)", str(error.value))[-1])
    if "rope_theta" not in fields(module):  # rotary positions need an even head size too
        assert make(module, n_embd=proposed, n_head=n_head, n_kv_head=1).config.n_embd == proposed


def test_query_heads_that_the_kv_heads_do_not_divide_are_refused_with_both_numbers(module):
    if "n_kv_head" not in fields(module):
        pytest.skip("has no n_kv_head")
    with pytest.raises(ValueError, match=r"(?=.*n_head=4)(?=.*n_kv_head=3)"):
        make(module, n_head=4, n_kv_head=3)
