"""train.py and sample.py on a CUDA GPU, for every model; skipped without one.

pytest -m gpu
"""

import importlib
import os
import warnings
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log, write_tiny
from ranks import launch
from runs import stop_in_step
from variants import MODELS, PROMPTS, close, feed, last_logits, make_vivid, tokens
from windows import attention, by_brute_force

import sample
import train
from common.dataloader import Loader
from tools.bench.attention import flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
each_model = pytest.mark.parametrize("model", MODELS)
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def restore_settings():
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.compiler.reset()  # torch limits how often one function is compiled in a process
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)


def command(model, **options):
    """Return the command line of a tiny run of a model on the GPU."""
    given = {"device": "cuda", "n_embd": 64, "dropout": 0.0}
    given |= {"learning_rate": 1e-3, "min_lr": 1e-4}  # larger ones amplify rounding errors
    fields = train.model_module(model).GPTConfig.__dataclass_fields__
    if "n_kv_head" in fields:
        given["n_kv_head"] = 1
    if "window" in fields:
        given["window"] = 5
    given.update(options)
    return arguments(model=model, **given)


def losses(run):
    return [record["train_loss"] for record in read_log(run)[1:]]


# A run ----------------------------------------------------------------------------------------


@each_model
def test_float32_on_the_gpu_follows_the_cpu(workdir, model):
    # deterministic: float32 products then do not use TF32
    train.main(command(model, out_dir="out/gpu", compile=False, deterministic=True))
    train.main(command(model, device="cpu", out_dir="out/cpu"))
    assert losses(workdir / "out/gpu") == pytest.approx(losses(workdir / "out/cpu"), rel=1e-4)


@each_model
def test_tf32_follows_float32(workdir, model):
    train.main(command(model, out_dir="out/tf32", compile=False))
    assert torch.get_float32_matmul_precision() == "high"
    train.main(command(model, out_dir="out/float32", compile=False, deterministic=True))
    assert torch.get_float32_matmul_precision() == "highest"
    assert losses(workdir / "out/tf32") == pytest.approx(losses(workdir / "out/float32"), rel=0.01)


@each_model
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(workdir, model, dtype):
    train.main(command(model, out_dir="out/float32", compile=False, deterministic=True))
    train.main(command(model, out_dir="out/half", compile=False, dtype=dtype))
    assert losses(workdir / "out/half") == pytest.approx(losses(workdir / "out/float32"), rel=0.01)


@each_model
def test_the_compiled_model_follows_the_eager_one(workdir, capsys, model):
    train.main(command(model, out_dir="out/eager", compile=False))
    train.main(command(model, out_dir="out/compiled", compile=True))
    assert "uncompiled" not in capsys.readouterr().err
    eager = losses(workdir / "out/eager")
    assert losses(workdir / "out/compiled") == pytest.approx(eager, rel=1e-3)


@each_model
@pytest.mark.parametrize("compile_option", [False, "auto"])
def test_deterministic_runs_have_the_same_bits(workdir, model, compile_option):
    options = {"dtype": "bfloat16", "deterministic": True, "compile": compile_option}
    train.main(command(model, out_dir="out/first", **options))
    train.main(command(model, out_dir="out/second", **options))
    assert losses(workdir / "out/first") == losses(workdir / "out/second")


@each_model
def test_a_deterministic_run_that_is_stopped_and_resumed_has_the_same_bits(workdir, model):
    options = {"dtype": "bfloat16", "deterministic": True, "compile": False}
    train.main(command(model, out_dir="out/uninterrupted", **options))
    stop_in_step(7, command(model, out_dir="out/stopped", **options))
    assert len(losses(workdir / "out/stopped")) == 7
    train.main(command(model, out_dir="out/stopped", **options))
    assert losses(workdir / "out/stopped") == losses(workdir / "out/uninterrupted")


@each_model
def test_a_run_of_the_gpu_writes_the_same_greedy_text_on_gpu_and_cpu(workdir, capsys, model):
    train.main(command(model, compile=False, deterministic=True))
    argv = ["--init_from=out/tiny", "--prompt=def ", "--temperature=0", "--dtype=float32"]
    texts = []
    for device in ("cuda", "cpu"):
        capsys.readouterr()
        sample.main([*argv, f"--device={device}"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@each_model
def test_the_log_has_the_memory_of_the_gpu(workdir, model):
    train.main(command(model, compile=False))
    assert 0 < read_log(workdir / "out/tiny")[-1]["memory_gb"] < 2


# Several processes, here one ------------------------------------------------------------------

MODES = {"ddp": {}, "fsdp": {"fsdp": True}}
# Compiling takes long: of all models, the one with every idea is compiled.
LAUNCHED = [(model, False) for model in MODELS] + [("model_rope_gqa_swa", True)]


def launched_command(mode, model, compiles):
    out_dir = f"out/{mode}-{model}-{compiles}"
    options = {"compile": compiles, "deterministic": not compiles} | MODES.get(mode, {})
    return command(model, out_dir=out_dir, **options)


@pytest.fixture(scope="module")
def launched_runs(tmp_path_factory):
    """Train by torchrun with one process and nccl, all runs in one launch."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("launched"))
    write_tiny(Path())
    runs = []
    for model, compiles in LAUNCHED:
        runs += [{"argv": launched_command(mode, model, compiles)} for mode in MODES]
    [records] = launch(1, runs)
    assert [record["status"] for record in records] == [0] * len(runs)
    yield
    os.chdir(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("model", "compiles"), LAUNCHED)
def test_one_rank_with_nccl_follows_a_run_without_torchrun(launched_runs, mode, model, compiles):
    one = Path(f"out/one-{model}-{compiles}")
    if not one.exists():
        train.main(launched_command("one", model, compiles))
    rel = 0.01 if compiles else 1e-4  # with TF32, or deterministic
    actual = losses(Path(f"out/{mode}-{model}-{compiles}"))
    assert actual == pytest.approx(losses(one), rel=rel)


# Waiting for the GPU --------------------------------------------------------------------------


@pytest.fixture
def count_waits(monkeypatch):
    """Return a function that lets train.py count how often the CPU waits in a function of it.

    Operations of torch.distributed are not counted (torch.cuda.set_sync_debug_mode).
    """

    def count(name):
        original, counts = getattr(train, name), []

        def counting(run):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    result = original(run)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            waits = [w for w in caught if "called a synchronizing CUDA" in str(w.message)]
            counts.append(len(waits))
            return result

        monkeypatch.setattr(train, name, counting)
        return counts

    return count


@each_model
@pytest.mark.parametrize(
    ("dtype", "compiles"), [("float32", False), ("float16", False), ("bfloat16", True)]
)
def test_a_step_waits_for_the_gpu_once(workdir, count_waits, model, dtype, compiles):
    waits = count_waits("train_step")
    options = {"dtype": dtype, "compile": compiles, "dropout": 0.1, "block_size": 400}
    train.main(command(model, **options, total_batch_size=3200, max_steps=4))
    assert waits[1:] == [1, 1, 1]  # the first step allocates and compiles


@each_model
def test_an_evaluation_waits_for_the_gpu_once(workdir, count_waits, model):
    waits = count_waits("evaluate")
    train.main(command(model, compile=False, eval_interval=1, max_steps=3))
    assert waits[1:] == [1, 1, 1]


def test_a_run_on_the_gpu_prefetches_every_batch_after_the_first(workdir, monkeypatch):
    read_batch, train_batch = Loader._read_batch, Loader.train_batch
    is_pinned, reads = [], []

    def recording_read_batch(loader, first, count):
        reads.append(first)
        return read_batch(loader, first, count)

    def recording_train_batch(loader, first, count):
        x, y = train_batch(loader, first, count)
        is_pinned.append(x.is_pinned() and y.is_pinned())
        return x, y

    monkeypatch.setattr(Loader, "_read_batch", recording_read_batch)
    monkeypatch.setattr(Loader, "train_batch", recording_train_batch)
    train.main(command("model", compile=False, max_steps=3))
    assert is_pinned == [False] + 5 * [True]
    assert reads == list(range(0, 28, 4))


# A model --------------------------------------------------------------------------------------


def vivid_on_the_gpu(model, **changes):
    return make_vivid(importlib.import_module(model), **changes).to(DEVICE)


def gradients(model, x, y, dtype):
    """Return the loss and the gradients of a model by name, under autocast if dtype is bf16."""
    model.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(x, y)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}


@each_model
@pytest.mark.parametrize("T", [16, 400])  # SWA computes T = 400 in blocks
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bf16"]
)
def test_loss_and_gradients_are_those_of_float32_on_the_cpu(model, T, dtype, tolerance):
    torch.set_float32_matmul_precision("highest")
    gpt = make_vivid(importlib.import_module(model), block_size=T)
    x, y = tokens(2, T), tokens(2, T, seed=2)
    expected_loss, expected = gradients(gpt, x, y, torch.float32)
    loss, actual = gradients(gpt.to(DEVICE), x.to(DEVICE), y.to(DEVICE), dtype)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    for name, gradient in actual.items():
        if not name.endswith("c_attn.bias"):  # the gradient of a key bias is rounding error
            assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name


@each_model
@pytest.mark.parametrize("length", PROMPTS)
def test_cached_logits_on_the_gpu_are_those_of_a_full_forward(model, length):
    torch.set_float32_matmul_precision("highest")
    gpt, idx = vivid_on_the_gpu(model), tokens(2, 16).to(DEVICE)
    chunks = [idx[:, :length], *idx[:, length:].split(1, dim=1)]
    expected = last_logits(gpt, idx)[:, length - 1 :]
    close(feed(gpt, gpt.make_cache(2), *chunks), expected)


@each_model
def test_cached_logits_in_bf16_on_the_gpu_are_near_those_of_a_full_forward(model):
    gpt, idx = vivid_on_the_gpu(model).bfloat16(), tokens(2, 16).to(DEVICE)
    expected = last_logits(gpt, idx)[:, 5:]
    logits = feed(gpt, gpt.make_cache(2), idx[:, :6], *idx[:, 6:].split(1, dim=1))
    assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("T", [13, 321, 512, 1000])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 256, 257, 2000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=["float32", "bf16"]
)
def test_windows_on_the_gpu_equal_brute_force(window, T, dtype, tolerance):
    torch.set_float32_matmul_precision("highest")
    assert_equals_brute_force(attention(window).attend, window, T, dtype, tolerance)


@pytest.mark.parametrize("T", [13, 1000])
@pytest.mark.parametrize("window", [1, 5, 256, 2000])
def test_windows_of_the_flash_kernel_equal_brute_force(window, T):
    assert_equals_brute_force(flash(window), window, T, torch.bfloat16, 0.02)


def assert_equals_brute_force(attend, window, T, dtype, tolerance):
    """Compare the output of an attention function and its gradients with float32 on the CPU."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, upstream = [torch.randn(2, 2, T, 32, generator=generator).to(dtype) for _ in range(4)]
    inputs = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    expected = by_brute_force(*inputs, window)
    expected_gradients = torch.autograd.grad(expected, inputs, upstream.float())
    on_gpu = [tensor.to(DEVICE).requires_grad_() for tensor in (q, k, v)]
    y = attend(*on_gpu)
    actual = [y, *torch.autograd.grad(y, on_gpu, upstream.to(DEVICE))]
    for ours, exact in zip(actual, [expected, *expected_gradients], strict=True):
        # With a window of 1 the gradients of q and k are 0 but for rounding.
        difference = (ours.detach().cpu().float() - exact.detach()).norm()
        assert difference < tolerance * exact.norm() + tolerance
