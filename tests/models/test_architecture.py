"""What every model file must have besides attention: loss, dropout, parameters, a config.

    pytest -k model_mine   tests a model file of your own

As in test_variants.py, each model*.py of the repository's root is tested.
"""

import importlib
import itertools
import math

import pytest
import torch
from variants import MODELS, SMALL, close, fields, make, make_vivid, tokens

from train import TrainConfig
from training.parallel import check_model


@pytest.fixture(params=MODELS)
def module(request):
    return importlib.import_module(request.param)


# The loss -------------------------------------------------------------------------------------


def test_the_initial_loss_is_close_to_that_of_a_uniform_distribution(module):
    model = make(module, vocab_size=509)
    x, y = tokens(8, 16, vocab_size=509), tokens(8, 16, vocab_size=509, seed=2)
    loss = model(x, y)
    assert loss.item() == pytest.approx(math.log(509), abs=0.05)


def test_the_loss_is_the_mean_over_the_targets_that_are_not_minus_1(module):
    model = make_vivid(module)
    x, y = tokens(3, 7), tokens(3, 7, seed=2)
    y[0, 2:5] = -1
    y[2] = -1
    probabilities = model(x).detach().double().softmax(dim=2)
    losses = []
    for b, t in itertools.product(range(3), range(7)):
        if y[b, t] != -1:
            losses.append(-math.log(probabilities[b, t, y[b, t]]))
    assert model(x, y).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_loss_and_the_gradients_are_0_if_there_is_no_target(module):
    model = make(module)
    loss = model(tokens(2, 7), torch.full((2, 7), -1))
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)


def test_every_parameter_has_a_gradient(module):
    model = make_vivid(module)
    model(tokens(2, 16), tokens(2, 16, seed=2)).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:  # others keep their values
            rule = f"{name} needs a gradient in every forward pass, or requires_grad=False"
            assert p.grad is not None, rule
            assert p.grad.norm() > 0, rule


def test_a_model_has_what_training_needs_of_it(module):
    config = TrainConfig(model=module.__name__, optimizer="muon", fsdp=True)
    check_model(make(module), config)  # the error says which rule of YOUR_OWN_VARIANT.md is broken


def test_a_few_steps_of_training_overfit_a_batch(module):
    model = make(module, n_layer=1)
    x, y = tokens(2, 16), tokens(2, 16, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()
    assert model(x, y).item() < 0.5


# Dropout --------------------------------------------------------------------------------------


def test_dropout_is_off_in_evaluation(module):
    x = tokens(2, 7)
    without_dropout = make_vivid(module)
    with_dropout = make_vivid(module, dropout=0.5)
    assert torch.equal(with_dropout(x), without_dropout(x))


def test_dropout_is_on_in_training_and_follows_the_seed(module):
    model, x = make_vivid(module, dropout=0.5).train(), tokens(2, 7)

    def logits(seed):
        torch.manual_seed(seed)
        return model(x)

    first = logits(seed=3)
    assert torch.equal(logits(seed=3), first)
    assert not torch.allclose(logits(seed=4), first)


def test_dropout_applies_to_embeddings_attention_and_mlp_of_every_block(module):
    model = make_vivid(module, dropout=0.5).train()
    dropped = []
    first_block = model.transformer.h[0]
    first_block.register_forward_pre_hook(lambda block, inputs: dropped.append(inputs[0]))
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            part.register_forward_hook(lambda part, inputs, output: dropped.append(output))
    model(tokens(2, 16))
    assert len(dropped) == 1 + 2 * SMALL["n_layer"]
    for output in dropped:
        assert 0.4 < (output == 0).float().mean() < 0.6


# Parameters -----------------------------------------------------------------------------------


def test_parameters_have_gpt2_s_names(module):
    linear_and_norm = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    expected = {"wte.weight", "ln_f.weight", "ln_f.bias"}
    for layer, part in itertools.product(range(SMALL["n_layer"]), linear_and_norm):
        expected.add(f"h.{layer}.{part}.weight")
        expected.add(f"h.{layer}.{part}.bias")
    names = {name.removeprefix("transformer.") for name, _ in make(module).named_parameters()}
    assert expected <= names  # wpe is not among them: a model with rotary positions has none


def test_weights_are_out_by_in(module):
    C, head_dim = SMALL["n_embd"], SMALL["n_embd"] // SMALL["n_head"]
    kv_heads = SMALL["n_kv_head"] if "n_kv_head" in fields(module) else SMALL["n_head"]
    block = make(module).transformer.h[0]
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if p.dim() == 2}
    assert shapes == {
        "attn.c_attn.weight": (C + 2 * kv_heads * head_dim, C),
        "attn.c_proj.weight": (C, C),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_proj.weight": (C, 4 * C),
    }


def test_the_head_is_the_token_embedding(module):
    model = make_vivid(module)
    normed = []
    model.transformer.ln_f.register_forward_hook(lambda norm, inputs, output: normed.append(output))
    logits = model(tokens(2, 7))
    close(logits, normed[0] @ model.transformer.wte.weight.T)


def test_the_state_dict_has_the_parameters_alone(module):
    model = make(module)
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    assert not any("lm_head" in name for name in model.state_dict())


def test_a_model_has_no_buffers(module):
    assert list(make(module).buffers()) == []


def test_a_model_loads_the_weights_that_another_saved(module, tmp_path):
    model, x = make_vivid(module), tokens(2, 7)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = make(module)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.eval()(x), model(x))


def test_a_model_is_made_on_the_meta_device_without_memory(module):
    with torch.device("meta"):
        model = module.GPT(module.GPTConfig())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_model_made_on_the_meta_device_computes_after_loading_weights(module):
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
            assert p.mean().abs() < 0.1 * std, name
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_initial_weights_are_normal(module):
    model = make(module, n_embd=64)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            within_1_std = (p.abs() < p.std()).float().mean().item()
            within_2_std = (p.abs() < 2 * p.std()).float().mean().item()
            assert within_1_std == pytest.approx(0.683, abs=0.03), name
            assert within_2_std == pytest.approx(0.954, abs=0.03), name


def test_the_seed_decides_the_initial_weights(module):
    a, b = make(module).state_dict(), make(module).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


# Compilation ----------------------------------------------------------------------------------


def test_a_compiled_model_accepts_other_lengths_without_graph_breaks(module):
    model = make(module, n_layer=1, block_size=400)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for T in (16, 400, 9):
        x, y = tokens(2, T), tokens(2, T, seed=2)
        close(compiled(x, y), model(x, y))


def test_evaluation_compiles_without_graph_breaks(module):
    model, x = make_vivid(module, n_layer=1), tokens(2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(x), model(x))


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
def test_a_dropout_outside_0_to_below_1_is_refused(module, value):
    with pytest.raises(ValueError, match=f"dropout={value}"):
        module.GPTConfig(dropout=value)


def test_an_n_head_that_does_not_divide_n_embd_is_refused_with_both_numbers(module):
    with pytest.raises(ValueError, match=r"(?=.*n_embd=100)(?=.*n_head=3)"):
        make(module, n_embd=100, n_head=3, n_kv_head=3)


def test_an_n_kv_head_that_does_not_divide_n_head_is_refused_with_both_numbers(module):
    if "n_kv_head" not in fields(module):
        pytest.skip("has no n_kv_head")
    with pytest.raises(ValueError, match=r"(?=.*n_head=4)(?=.*n_kv_head=3)"):
        make(module, n_head=4, n_kv_head=3)
