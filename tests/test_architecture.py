"""What every model file promises beside its attention: the loss, dropout, parameters, compilation, FLOPs, refusals.

    pytest -k model_mine

As in test_variants.py, each model*.py of the repository's root is tested, one of one's own included.
"""

import importlib
import math

import pytest
import torch
from test_variants import MODELS, SMALL, WINDOW, close, fields, make, make_vivid, tokens
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(params=MODELS)
def module(request):
    return importlib.import_module(request.param)


# The loss -------------------------------------------------------------------------------------


def test_the_untrained_loss_is_close_to_that_of_guessing(module):
    loss = make(module, vocab_size=509)(
        tokens(8, 16, vocab_size=509), tokens(8, 16, vocab_size=509, seed=2)
    )
    assert loss.item() == pytest.approx(math.log(509), abs=0.05)


def test_the_loss_is_the_mean_over_the_targets_that_are_not_minus_1(module):
    model, x, y = make_vivid(module), tokens(3, 7), tokens(3, 7, seed=2)
    y[0, 2:5] = y[2] = -1
    p = model(x).detach().double().softmax(dim=2)
    by_hand = [-math.log(p[b, t, y[b, t]]) for b in range(3) for t in range(7) if y[b, t] >= 0]
    assert model(x, y).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_the_loss_and_the_gradients_are_0_where_there_is_no_target(module):
    model = make(module)
    loss = model(tokens(2, 7), torch.full((2, 7), -1))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_every_parameter_has_a_gradient(module):
    model = make_vivid(module)
    model(tokens(2, 16), tokens(2, 16, seed=2)).backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() == 0
    ] == []


def test_a_few_steps_of_training_learn_a_batch_by_heart(module):
    model, x, y = make(module, n_layer=1), tokens(2, 16), tokens(2, 16, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    assert model(x, y).item() < 0.5


# Dropout --------------------------------------------------------------------------------------


def test_dropout_is_off_in_evaluation(module):
    plain, dropping = make_vivid(module), make_vivid(module, dropout=0.5)
    x = tokens(2, 7)
    assert torch.equal(dropping(x), plain(x))


def test_dropout_is_on_in_training_and_follows_the_seed(module):
    model, x = make_vivid(module, dropout=0.5).train(), tokens(2, 7)
    a, b, other = (torch.manual_seed(seed) and model(x) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.allclose(a, other)


def test_dropout_reaches_embedding_attention_and_mlp_of_every_block(module):
    model, dropped = make_vivid(module, dropout=0.5).train(), []
    model.transformer.h[0].register_forward_pre_hook(
        lambda block, inputs: dropped.append(inputs[0])
    )
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            part.register_forward_hook(lambda part, inputs, output: dropped.append(output))
    model(tokens(2, 16))
    assert len(dropped) == 1 + 2 * SMALL["n_layer"]
    assert all(0.4 < (output == 0).float().mean() < 0.6 for output in dropped)


# Parameters -----------------------------------------------------------------------------------


def test_parameters_have_gpt2_s_names(module):
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["wte.weight", "wpe.weight"]
    names += [
        f"h.{i}.{part}.{what}" for i in range(3) for part in parts for what in ("weight", "bias")
    ]
    names += ["ln_f.weight", "ln_f.bias"]
    learned = {name.removeprefix("transformer.") for name, _ in make(module).named_parameters()}
    assert learned | {"wpe.weight"} >= set(
        names
    )  # a model with rotary positions has no wpe, others may add to them


def test_weights_are_out_by_in(module):
    C, head_dim = SMALL["n_embd"], SMALL["n_embd"] // SMALL["n_head"]
    heads = SMALL["n_kv_head"] if "n_kv_head" in fields(module) else SMALL["n_head"]
    shapes = {
        name: tuple(p.shape)
        for name, p in make(module).transformer.h[0].named_parameters()
        if p.dim() == 2
    }
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


def test_the_state_dict_is_the_parameters_and_nothing_else_and_there_are_no_buffers(module):
    model = make(module)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert not any("lm_head" in name for name in model.state_dict()) and list(model.buffers()) == []


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
            assert p.mean().abs() < 0.1 * std and p.std().item() == pytest.approx(std, rel=0.05), (
                name
            )


def test_initial_weights_are_normal(module):
    model = make(module, n_embd=64)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            within = [(p.abs() < n * p.std()).float().mean().item() for n in (1, 2)]
            assert within == pytest.approx([0.683, 0.954], abs=0.03), name


def test_the_seed_decides_the_initial_weights(module):
    a, b = make(module).state_dict(), make(module).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# Compilation and arithmetic -------------------------------------------------------------------


def test_training_compiles_without_graph_breaks(module):
    model, x, y = make(module, n_layer=1), tokens(2, 16), tokens(2, 16, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x, y), model(x, y))


def test_a_compiled_model_takes_other_lengths_without_graph_breaks(module):
    model = make(module, n_layer=1, block_size=400)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for T in (16, 400, 9):
        close(
            compiled(tokens(2, T), tokens(2, T, seed=2)), model(tokens(2, T), tokens(2, T, seed=2))
        )


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


# Configs --------------------------------------------------------------------------------------


def test_the_defaults_are_gpt2_small(module):
    c = module.GPTConfig()
    shape = (c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.dropout, c.bias)
    assert shape == (1024, 50257, 12, 12, 768, 0.0, True)


@pytest.mark.parametrize(
    "name", ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "window"]
)
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
    with pytest.raises(ValueError, match=r"(?=.*n_embd=100)(?=.*n_head=3)"):
        make(module, n_embd=100, n_head=3, n_kv_head=3)


def test_query_heads_that_the_kv_heads_do_not_divide_are_refused_with_both_numbers(module):
    if "n_kv_head" not in fields(module):
        pytest.skip("has no n_kv_head")
    with pytest.raises(ValueError, match=r"(?=.*n_head=4)(?=.*n_kv_head=3)"):
        make(module, n_head=4, n_kv_head=3)
