"""training/optimizer.py: Muon, beside AdamW in one optimizer. test_train.py has AdamW itself.

test_distributed.py compares Muon under DDP, FSDP and HSDP with one process.
"""

import pytest
import torch
from conftest import arguments, read_log, refused
from runs import losses, same_weights, stop_in_step
from spoiled import spoiled
from variants import MODELS, make

import train
from common import checkpoint, run_dir
from common.pretrained import load_model
from training import optimizer
from training.optimizer import (
    Muon,
    hidden_matrices,
    make_adamw,
    make_optimizer,
    newton_schulz,
    orthogonalize_,
)

WIDE_SHAPES = [(3, 20, 50), (2, 16, 16), (1, 1, 8)]


def make_model(name="model"):
    return make(train.model_module(name), n_layer=2, n_embd=16)


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def make_muon(*matrices, row_counts=None, **options):
    """Return Muon for some matrices, and AdamW for one unrelated vector."""
    config = train.TrainConfig()
    adamw = make_adamw([torch.nn.Parameter(torch.ones(3))], config)
    hidden = {p: row_counts or [p.size(0)] for p in matrices}
    settings = {"lr": 0.1, "weight_decay": 0.0, "dtype": torch.float32}
    return Muon(hidden, adamw, **settings | options)


def reference_update(momentum):
    """Return what Muon subtracts at a rate of 1, in float64, without batches or transposes."""
    x = momentum.double() / momentum.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    rows, columns = momentum.shape
    return x * max(1, rows / columns) ** 0.5


# Newton-Schulz --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
def test_newton_schulz_keeps_singular_vectors_and_makes_the_values_about_one(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    in_that_basis = u.mT @ newton_schulz(x).double() @ vh.mT
    values = in_that_basis.diagonal(dim1=1, dim2=2)
    large = values[s > 0.1 * s.amax(dim=1, keepdim=True)]
    assert large.min() > 0.65 and large.max() < 1.22
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert (in_that_basis - torch.diag_embed(values)).abs().max() < tolerance


def test_the_size_of_a_matrix_does_not_change_its_orthogonalization():
    x = torch.randn(1, 8, 12)
    torch.testing.assert_close(newton_schulz(1e-12 * x), newton_schulz(x))


def test_newton_schulz_maps_zero_to_zero():
    """A new optimizer gets its state for a checkpoint by a step with zero gradients."""
    assert newton_schulz(torch.zeros(1, 2, 3)).equal(torch.zeros(1, 2, 3))


def test_matrices_of_one_batch_are_orthogonalized_as_each_by_itself():
    matrices = [torch.randn(shape) for shape in [(8, 8), (32, 8), (8, 32), (8, 8), (4, 8)]]
    expected = [reference_update(m) / max(1, m.size(0) / m.size(1)) ** 0.5 for m in matrices]
    orthogonalize_(matrices)
    for matrix, other in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.double(), other, rtol=1e-4, atol=1e-5)


# One step -------------------------------------------------------------------------------------


def test_three_steps_are_nesterov_momentum_and_decay_as_written_out():
    p = torch.nn.Parameter(torch.randn(12, 5))
    expected, momentum = p.detach().double(), torch.zeros(12, 5).double()
    muon = make_muon(p, weight_decay=0.3)
    for step in range(3):
        set_gradients([p], seed=step)
        momentum = 0.95 * momentum + p.grad.double()
        update = reference_update(p.grad.double() + 0.95 * momentum)
        expected = (1 - 0.1 * 0.3) * expected - 0.1 * update
        muon.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kv_rows"), [("model", 16), ("model_gqa", 8)])
def test_q_k_and_v_are_orthogonalized_separately(name, kv_rows):
    model = make_model(name)
    muon = make_optimizer(model, train.TrainConfig(optimizer="muon", weight_decay=0.0))
    p = model.transformer.h[1].attn.c_attn.weight
    before = p.detach().clone()
    set_gradients(model.parameters(), seed=0)
    muon.step()
    q, k, v = p.grad.split([16, kv_rows, kv_rows])
    updates = torch.cat([reference_update(part) for part in (q, k, v)])
    moved = before.double() - p.detach().double()
    torch.testing.assert_close(moved, 0.02 * updates, rtol=1e-3, atol=1e-5)


def test_muon_is_that_of_torch_up_to_bfloat16():
    p = torch.nn.Parameter(torch.randn(24, 16))
    other = torch.nn.Parameter(p.detach().clone())
    muon = make_muon(p, weight_decay=0.1, dtype=torch.bfloat16)
    torch_muon = torch.optim.Muon([other], lr=0.1, weight_decay=0.1, momentum=0.95)
    start = p.detach().clone()
    for step in range(5):
        set_gradients([p], seed=step)
        other.grad = p.grad.clone()
        muon.step()
        torch_muon.step()
    assert (p - other).norm() < 0.01 * (p - start).norm()


def test_matrices_in_several_batches_get_the_same_updates(monkeypatch):
    models = [make_model("model_gqa"), make_model("model_gqa")]
    for model, max_numel in zip(models, [optimizer.MAX_NUMEL, 600], strict=True):
        monkeypatch.setattr(optimizer, "MAX_NUMEL", max_numel)
        muon = make_optimizer(model, train.TrainConfig(optimizer="muon"))
        set_gradients(model.parameters(), seed=0)
        muon.step()
    for p, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, other)


def test_the_other_parameters_get_the_step_of_adamw():
    model, other = make_model(), make_model()
    set_gradients(model.parameters(), seed=0)
    set_gradients(other.parameters(), seed=0)
    make_optimizer(model, train.TrainConfig(optimizer="muon")).step()
    make_optimizer(other, train.TrainConfig()).step()
    hidden = hidden_matrices(model)
    for p, by_adamw in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, by_adamw) == (p not in hidden)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_newton_schulz_runs_in_float32_only_if_the_run_does(monkeypatch, dtype):
    dtypes = set()
    original = optimizer.newton_schulz
    monkeypatch.setattr(optimizer, "newton_schulz", lambda x: dtypes.add(x.dtype) or original(x))
    p = torch.nn.Parameter(torch.randn(4, 4))
    set_gradients([p], seed=0)
    make_muon(p, dtype=getattr(torch, dtype)).step()
    assert dtypes == {torch.float32 if dtype == "float32" else torch.bfloat16}
    assert p.dtype == torch.float32


# Which parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_muon_has_the_matrices_in_blocks_and_adamw_all_other_parameters(name):
    model = make_model(name)
    muon = make_optimizer(model, train.TrainConfig(optimizer="muon"))
    names = {p: name for name, p in model.named_parameters()}
    groups = [{names[p] for p in group["params"]} for group in muon.param_groups]
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    hidden = {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in layers}
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight"} & set(names.values())
    assert groups == [hidden, embeddings, set(names.values()) - hidden - embeddings]
    assert [group["weight_decay"] for group in muon.param_groups] == [0.1, 0.1, 0.0]


def test_a_model_file_of_ones_own_may_name_and_shape_its_matrices_as_it_likes():
    block = torch.nn.ModuleDict()
    block.experts = torch.nn.Linear(8, 24, bias=False)  # of c_attn's shape
    block.c_attn = torch.nn.Linear(8, 4, bias=False)  # too few rows for q, k and v
    block.filter = torch.nn.Conv1d(8, 8, 3)  # three dimensions
    model = torch.nn.Module()
    model.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([block])})
    matrices = {tuple(p.shape): rows for p, rows in hidden_matrices(model).items()}
    assert matrices == {(24, 8): [24], (4, 8): [4]}


# The two rates --------------------------------------------------------------------------------


@pytest.mark.parametrize("lr_schedule", ["cosine", "wsd"])
def test_muons_rate_is_the_same_fraction_of_its_peak_as_adamws(lr_schedule):
    config = train.TrainConfig(
        learning_rate=1e-3, min_lr=1e-4, muon_learning_rate=0.05, lr_schedule=lr_schedule
    )
    for step in (0, 350, 700, 10_000, 18_000, 19_073):
        ratio = train.muon_learning_rate(config, step) / train.learning_rate(config, step)
        assert ratio == pytest.approx(50)


def test_muons_rate_has_its_schedule_if_adamws_is_zero():
    config = train.TrainConfig(
        learning_rate=0.0, min_lr=0.0, muon_learning_rate=0.5, warmup_steps=10, max_steps=110
    )
    rates = [train.muon_learning_rate(config, step) for step in (0, 10, 60, 110)]
    assert rates == pytest.approx([0.05, 0.5, 0.25, 0.0])


# Whole runs -----------------------------------------------------------------------------------


@pytest.fixture
def muon_run(workdir):
    train.main(arguments(optimizer="muon", out_dir="out/muon"))
    return workdir / "out/muon"


def test_a_run_steps_with_the_rates_of_its_schedule(workdir, monkeypatch):
    rates = []
    original = Muon.step

    def recording_step(muon):
        rates.append([group["lr"] for group in muon.param_groups])
        original(muon)

    monkeypatch.setattr(Muon, "step", recording_step)
    train.main(arguments(optimizer="muon", muon_learning_rate=0.2, max_steps=5))
    expected = [record["lr"] for record in read_log(workdir / "out/tiny")[1:]]
    assert len(rates) == 5
    for muon_rate, *adamw_rates in rates:
        assert adamw_rates == 2 * [expected.pop(0)]
        assert muon_rate == pytest.approx(20 * adamw_rates[0])


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(muon_run, workdir):
    argv = arguments(optimizer="muon", out_dir="out/stopped")
    stop_in_step(7, argv)
    train.main(argv)
    assert losses(workdir / "out/stopped") == losses(muon_run)
    assert same_weights(workdir / "out/stopped", muon_run)


def test_a_loaded_muon_has_the_saved_momentum(muon_run):
    path = run_dir.list_checkpoints(muon_run)[-1]
    model, _ = load_model(str(path))
    muon = make_optimizer(model, train.TrainConfig(optimizer="muon"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoint.load_checkpoint(path, model, muon)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    for p in hidden_matrices(model):
        assert list(muon.state[p]) == ["momentum"]
        assert muon.state[p]["momentum"].norm() > 0
    assert muon.state[model.transformer.wte.weight]["exp_avg_sq"].norm() > 0


def test_a_float16_overflow_skips_the_step_of_muon_and_of_adamw(workdir):
    argv = arguments(optimizer="muon", dtype="float16", max_steps=5)
    with spoiled("gradient", "inf", step=3) as digests:
        train.main(argv)
    assert digests[0] == digests[1]
    assert read_log(workdir / "out/tiny")[4]["grad_norm"] is None
    assert all(w.isfinite().all() for w in weights_of_step(workdir / "out/tiny", 5))


def test_a_float16_step_unscales_the_gradients_of_muon_and_of_adamw(workdir, muon_run):
    train.main(arguments(optimizer="muon", dtype="float16", out_dir="out/float16"))
    for record, float32 in zip(
        read_log(workdir / "out/float16")[1:], read_log(muon_run)[1:], strict=True
    ):
        assert record["train_loss"] == pytest.approx(float32["train_loss"], rel=0.01)


def weights_of_step(run, step):
    model, _ = load_model(str(run / f"step_{step:08d}"))
    return list(model.parameters())


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"optimizer": "adamw"}, ["optimizer was muon", "adamw"]),
        ({"muon_learning_rate": 0.03}, ["muon_learning_rate was 0.02", "0.03"]),
    ],
)
def test_a_run_is_not_resumed_with_another_optimizer_or_rate(muon_run, capsys, changed, names):
    line = refused(capsys, arguments(**{"optimizer": "muon", "out_dir": "out/muon"} | changed))
    assert [name for name in names if name not in line] == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"optimizer": "sgd"}, ["optimizer=sgd", "adamw", "muon"]),
        ({"muon_learning_rate": -1.0}, ["muon_learning_rate=-1.0"]),
    ],
)
def test_a_bad_optimizer_or_rate_is_refused(workdir, capsys, options, names):
    line = refused(capsys, arguments(**options))
    assert [name for name in names if name not in line] == []
