"""common/cpu.py: attention in float32 inside bfloat16 autocast, and packed linear layers."""

import types

import pytest
import torch
import torch.nn.functional as F

import sample
from common.cpu import (
    MAX_FLOAT32_QUERIES,
    PRIVATE_OPS,
    Float32Attention,
    PackedLinear,
    can_pack,
    pack_linear_layers,
    prepare_for_sampling,
    use_float32_attention,
    use_float32_cache,
    wants_float32_attention,
)
from common.device import pick_dtype
from common.models import model_module
from training.parallel import checkpoint_activations

CPU = torch.device("cpu")
MODELS = ("model", "model_rope", "model_gqa", "model_swa", "model_rope_gqa_swa")
needs_packing = pytest.mark.skipif(not can_pack(torch.float32), reason="torch without oneDNN")
needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.bfloat16), reason="a CPU without packed products in bfloat16"
)


def small_model(name, dtype=torch.float32, **options):
    module = model_module(name)
    sizes = {"block_size": 64, "vocab_size": 101, "n_layer": 2, "n_head": 4, "n_embd": 32}
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(**sizes, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # logits that differ, biases too
    return model.to(dtype).eval()


def attention_inputs(T, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(2, 3, T, 8).to(dtype).requires_grad_() for _ in range(3)]


# Float32Attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_short_attention_is_that_of_float32_rounded_once(autocast):
    q, k, v = attention_inputs(T=32)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Float32Attention():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(y, expected.to(torch.bfloat16))


def test_gradients_of_short_attention_are_those_of_float32_rounded_once():
    inputs = attention_inputs(T=32)
    gradient = torch.randn_like(inputs[0])
    in_float32 = F.scaled_dot_product_attention(*(x.float() for x in inputs), is_causal=True)
    expected = torch.autograd.grad(in_float32, inputs, gradient.float())
    with Float32Attention():
        y = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert all(map(torch.equal, torch.autograd.grad(y, inputs, gradient), expected))


def test_the_mask_is_used_in_float32_attention():
    q, k, v = attention_inputs(T=32)
    mask = torch.rand(32, 32) > 0.5
    mask.fill_diagonal_(True)
    with Float32Attention():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q.float() @ k.float().mT / 8**0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(y.float(), scores.softmax(dim=-1) @ v.float(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mask_of_numbers_is_added_in_float32(dtype):
    q, k, v = attention_inputs(T=32)
    bias = torch.randn(32, 32).to(dtype)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias.float())
    with torch.autocast("cpu", torch.bfloat16), Float32Attention():
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=bias)
    assert torch.equal(y, expected.to(torch.bfloat16))


def test_long_attention_stays_in_bfloat16():
    q, k, v = attention_inputs(T=MAX_FLOAT32_QUERIES + 1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    in_float32 = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert not torch.equal(expected, in_float32.to(torch.bfloat16))
    with Float32Attention():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)


def test_recomputed_activations_use_float32_attention_too():
    def gradients(recompute):
        block = small_model("model").train().transformer.h[0]
        use_float32_attention(block)
        if recompute:
            checkpoint_activations(block)
        x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", torch.bfloat16):
            block(x).sum().backward()
        return [p.grad for p in block.parameters()]

    assert all(map(torch.equal, gradients(recompute=True), gradients(recompute=False)))


def test_a_block_with_float32_attention_compiles_to_one_graph():
    block = small_model("model").transformer.h[0]
    use_float32_attention(block)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, block(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("device", "dtype", "has_amx", "expected"),
    [
        ("cpu", torch.bfloat16, False, True),
        ("cpu", torch.bfloat16, True, False),
        ("cpu", torch.float32, False, False),
        ("cuda", torch.bfloat16, False, False),
    ],
)
def test_float32_attention_is_for_bfloat16_on_cpus_without_amx(
    monkeypatch, device, dtype, has_amx, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    assert wants_float32_attention(torch.device(device), dtype) is expected


def test_features_of_the_cpu_are_not_read_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: pytest.fail("was called"))
    assert not wants_float32_attention(torch.device("cuda"), torch.bfloat16)


def test_a_torch_that_reports_no_features_of_the_cpu_counts_as_one_without_amx(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert wants_float32_attention(CPU, torch.bfloat16)
    assert pick_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_training_is_nearer_to_float32_with_float32_attention(name):
    model = small_model(name).train()
    idx = torch.randint(101, (4, 64), generator=torch.Generator().manual_seed(1))

    def gradient(dtype):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx.roll(-1, dims=1))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradient(torch.float32)
    plain = gradient(torch.bfloat16)
    for block in model.transformer.h:
        use_float32_attention(block)
    ours = gradient(torch.bfloat16)
    assert not torch.equal(ours, plain)
    assert (ours - exact).norm() < 1.05 * (plain - exact).norm()


# A KV cache in float32 ------------------------------------------------------------------------


def last_logits(model, idx, chunk):
    """Return the logits of the last position, of a prefill in chunks of so many tokens."""
    cache = model.make_cache(idx.size(0))
    with torch.inference_mode():
        for tokens in idx.split(chunk, dim=1):
            logits = model(tokens, cache=cache)
    return logits


@pytest.mark.parametrize("chunk", [1, 40])
@pytest.mark.parametrize("name", MODELS)
def test_a_float32_cache_is_as_near_to_float32_as_a_bfloat16_one(name, chunk):
    idx = torch.randint(101, (64, 40), generator=torch.Generator().manual_seed(1))
    exact = last_logits(small_model(name, torch.bfloat16).float(), idx, chunk)
    model = small_model(name, torch.bfloat16)
    plain = last_logits(model, idx, chunk)
    use_float32_cache(model)
    ours = last_logits(model, idx, chunk)
    assert not torch.equal(ours, plain)
    assert (ours - exact).norm() < 1.1 * (plain - exact).norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_float32_cache_is_float32_and_reports_its_bytes(name):
    model = small_model(name, torch.bfloat16)
    plain = model.make_cache(3).nbytes
    use_float32_cache(model)
    cache = model.make_cache(3)
    assert cache.k.dtype == cache.v.dtype == torch.float32
    assert cache.nbytes == cache.k.nbytes + cache.v.nbytes == 2 * plain


@pytest.mark.parametrize(
    ("dtype", "has_amx", "n_kv_head", "expected"),
    [
        (torch.bfloat16, False, 4, torch.float32),
        (torch.bfloat16, False, 2, torch.bfloat16),
        (torch.bfloat16, True, 4, torch.bfloat16),
        (torch.float32, False, 4, torch.float32),
    ],
)
def test_a_bfloat16_model_with_all_kv_heads_samples_with_a_float32_cache_without_amx(
    monkeypatch, dtype, has_amx, n_kv_head, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    model = small_model("model_gqa", dtype, n_kv_head=n_kv_head)
    prepare_for_sampling(model)
    assert model.make_cache(1).k.dtype == expected


def test_attention_of_another_kind_keeps_its_cache():
    model = small_model("model", torch.bfloat16)
    for block in model.transformer.h:
        block.attn = torch.nn.Identity()
    use_float32_cache(model)
    assert model.make_cache(1).k.dtype == torch.bfloat16


def test_a_model_prepared_for_sampling_generates_many_samples_in_bfloat16():
    model = small_model("model_rope_gqa_swa", torch.bfloat16)
    prepare_for_sampling(model, rows=3)
    prompt = torch.tensor([[5, 7, 11]])
    tokens = torch.stack(list(sample.generate(model, prompt, 100, num_samples=3, temperature=0)))
    assert tokens.shape == (100, 3)
    assert torch.equal(tokens[:, 0], tokens[:, 1])


# Packed linear layers -------------------------------------------------------------------------


@needs_packing
@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("name", MODELS)
def test_packed_layers_give_the_logits_of_the_plain_ones(name, rows):
    model = small_model(name)
    idx = torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(idx)
        pack_linear_layers(model, rows)
        torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)


@needs_packing
@pytest.mark.parametrize("name", MODELS)
def test_packed_layers_with_a_cache_give_the_logits_of_the_full_pass(name):
    model = small_model(name)
    pack_linear_layers(model, rows=2)
    idx = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    cache = model.make_cache(2)
    with torch.inference_mode():
        full = model(idx)
        steps = [model(idx[:, i : i + 1], cache=cache) for i in range(40)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-4)


@needs_bfloat16
def test_packed_layers_in_bfloat16_are_as_near_to_float32_as_plain_ones():
    idx = torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        exact = small_model("model", torch.bfloat16).float()(idx)
        model = small_model("model", torch.bfloat16)
        plain_error = (model(idx) - exact).norm()
        pack_linear_layers(model)
        packed_error = (model(idx) - exact).norm()
    assert 0 < packed_error < 1.2 * plain_error


@needs_packing
def test_all_linear_layers_and_the_head_are_packed():
    model = small_model("model")
    pack_linear_layers(model)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(PackedLinear) == 2 * 4  # of two blocks
    assert torch.nn.Linear not in kinds
    assert isinstance(model.head.__self__, PackedLinear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_without_packed_products_leaves_the_model_as_it_is(dtype):
    model = small_model("model", dtype)
    names = [name for name, _ in model.named_parameters()]
    pack_linear_layers(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_without_onednn_the_model_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = small_model("model")
    pack_linear_layers(model)
    assert "transformer.h.0.mlp.c_fc.weight" in dict(model.named_parameters())


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", PRIVATE_OPS)
def test_without_one_of_torchs_private_functions_the_model_stays_as_it_is(
    monkeypatch, missing, dtype
):
    others = {name: getattr(torch.ops.mkldnn, name) for name in PRIVATE_OPS if name != missing}
    monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**others))
    model = small_model("model", dtype)
    prepare_for_sampling(model)
    assert "transformer.h.0.mlp.c_fc.weight" in dict(model.named_parameters())
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 101)


@needs_packing
def test_a_head_that_is_a_layer_of_the_model_is_packed_as_such():
    model = small_model("model")
    model.head = torch.nn.Linear(32, 7)
    idx = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        expected = model(idx)
        pack_linear_layers(model)
        torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5)


@needs_packing
def test_greedy_texts_of_packed_and_plain_models_are_equal():
    model = small_model("model_rope_gqa_swa")
    prompt = torch.tensor([[5, 7, 11]])
    plain = list(sample.generate(model, prompt, 100, num_samples=3, temperature=0))
    pack_linear_layers(model, rows=3)
    packed = list(sample.generate(model, prompt, 100, num_samples=3, temperature=0))
    assert torch.equal(torch.stack(plain), torch.stack(packed))
