"""train.py and sample.py on a CUDA GPU, for every model; skipped without one.

pytest -m gpu
pytest -m gpu -n 8     with pytest-xdist
"""

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXT, arguments, read_log, write_dataset
from ranks import LONGEST_LAUNCH, ROOT, finish, launch, start, torchrun
from runs import stop_in_step
from torch.profiler import ProfilerActivity, profile
from variants import MODELS, PROMPTS, close, feed, last_logits, make_vivid, tokens
from windows import attention, by_brute_force

import sample
import train
from common.dataloader import Loader
from common.device import use_cudnn_attention
from tools.bench.attention import flash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
each_model = pytest.mark.parametrize("model", MODELS)
DEVICE = torch.device("cuda")


@contextlib.contextmanager
def settings_restored():
    """Restore after the block what train.py and sample.py set in torch."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    tag = torch.compiler.config.cache_key_tag
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.compiler.reset()  # torch limits how often one function is compiled in a process
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.compiler.config.cache_key_tag = tag


@pytest.fixture(autouse=True)
def restore_settings():
    with settings_restored():
        yield


def command(model, **options):
    """Return the command line of a tiny run of a model on the GPU."""
    given = {"device": "cuda", "n_embd": 64, "dropout": 0.0}
    given |= {"learning_rate": 1e-3, "min_lr": 1e-4}  # larger ones amplify rounding errors
    fields = train.model_module(model).GPTConfig.__dataclass_fields__
    if "n_kv_head" in fields:
        given["n_kv_head"] = 1
    if "window" in fields:
        given["window"] = options.get("block_size", 16) // 4
    given.update(options)
    return arguments(model=model, **given)


def losses(run):
    return [record["train_loss"] for record in read_log(run)[1:]]


# Compiling takes long. Only long_runs, below, compile every model; the other tests the simplest, or
# the one with every idea.
COMPILED = [("model", True), ("model_rope_gqa_swa", True)]


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


@pytest.mark.parametrize(("model", "compiles"), [(model, False) for model in MODELS] + COMPILED)
def test_deterministic_runs_have_the_same_bits(workdir, model, compiles):
    options = {"dtype": "bfloat16", "deterministic": True, "compile": compiles}
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
LAUNCHED = [(model, False) for model in MODELS] + COMPILED[1:]


def launched_command(mode, model, compiles):
    options = {"compile": compiles, "deterministic": not compiles} | MODES.get(mode, {})
    return command(model, out_dir=f"out/{mode}", **options)


@pytest.mark.parametrize(("model", "compiles"), LAUNCHED)
def test_one_rank_with_nccl_follows_a_run_without_torchrun(workdir, model, compiles):
    train.main(launched_command("one", model, compiles))
    [records] = launch(1, [{"argv": launched_command(mode, model, compiles)} for mode in MODES])
    assert [record["status"] for record in records] == [0, 0]
    rel = 0.01 if compiles else 1e-4  # with TF32, or deterministic
    one = losses(workdir / "out/one")
    for mode in MODES:
        assert losses(workdir / "out" / mode) == pytest.approx(one, rel=rel), mode


# Waiting for the GPU --------------------------------------------------------------------------


def count_waits(monkeypatch, name):
    """Let train.py count how often the CPU waits for the GPU in a function of it.

    Returns the list of the counts, to which each call adds one. Operations of torch.distributed are
    not counted (torch.cuda.set_sync_debug_mode).
    """
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


UNCOMPILED = [(*case, False) for case in itertools.product(MODELS, ["float32", "float16"])]


@pytest.mark.parametrize(
    ("model", "dtype", "compiles"), [*UNCOMPILED, ("model_rope_gqa_swa", "bfloat16", True)]
)
def test_a_step_waits_for_the_gpu_once(workdir, monkeypatch, model, dtype, compiles):
    waits = count_waits(monkeypatch, "train_step")
    options = {"dtype": dtype, "compile": compiles, "dropout": 0.1, "block_size": 400}
    train.main(command(model, **options, total_batch_size=3200, max_steps=4))
    assert waits[1:] == [1, 1, 1]  # the first step allocates and compiles


@each_model
def test_an_evaluation_waits_for_the_gpu_once(workdir, monkeypatch, model):
    waits = count_waits(monkeypatch, "evaluate")
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


# A run as GPT-2 is trained --------------------------------------------------------------------
#
# In bfloat16, compiled, with heads of 64 channels and 1024 tokens. The kernels of attention, which
# torch selects by dtype, shape and GPU, are those of a run of GPT-2 124M.

LONG = {"dataset": "long", "block_size": 1024, "n_embd": 128, "n_head": 2}  # head_dim 64
LONG |= {"batch_size": 2, "total_batch_size": 4096, "max_steps": 6, "eval_interval": 6}
LONG_RUNS = {
    "float32": {"dtype": "float32", "compile": False, "deterministic": True},
    "uncompiled": {"dtype": "bfloat16", "compile": False},
    "compiled": {"dtype": "bfloat16", "compile": True},
}


def prefers_cudnn():
    """Return whether torch prefers cuDNN's kernel of attention to its own FlashAttention here.

    It does on Hopper, B200 and B300 with a cuDNN that is free of a bug (sdp_utils.cpp of torch).
    """
    if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return False
    has_it = torch.cuda.get_device_capability() in [(9, 0), (10, 0), (10, 3)]
    return has_it and torch.backends.cudnn.version() > 91500


@contextlib.contextmanager
def record_kernels(names):
    """Add to a set which kernels of attention the block calls: cudnn, flash or efficient.

    An operator has the same name in compiled code.
    """
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        yield
    for event in recorded.key_averages():
        found = re.fullmatch(r"aten::_scaled_dot_product_(\w+)_attention", event.key)
        if found:
            names.add(found[1])


def long_run(model, name):
    """Do one of LONG_RUNS; return its losses, its waits, and what its steps compute.

    gradients   of the first step, by name, before clipping
    kernels     that the steps call
    """
    out_dir = f"out/{name}-{model}"
    kernels, first_gradients, errors = set(), {}, io.StringIO()
    with settings_restored(), pytest.MonkeyPatch.context() as patch:
        waits = count_waits(patch, "train_step")
        train_step = train.train_step

        def recording_step(run):
            with record_kernels(kernels) if run.step == 1 else contextlib.nullcontext():
                return train_step(run)

        def recording_check(run, loss, grad_norm):  # a loss of NaN fails the test of the losses
            if run.step == 0:
                first_gradients.update(gradients_by_name(run.model))

        patch.setattr(train, "train_step", recording_step)
        patch.setattr(train, "check_finite", recording_check)
        with contextlib.redirect_stderr(errors):
            train.main(command(model, out_dir=out_dir, **LONG, **LONG_RUNS[name]))
    assert "uncompiled" not in errors.getvalue()
    return SimpleNamespace(
        losses=losses(Path(out_dir)), waits=waits, gradients=first_gradients, kernels=kernels
    )


@pytest.fixture(scope="module", params=MODELS)
def long_runs(request, tmp_path_factory):
    """Return the model's name and {name: what long_run() returns} of LONG_RUNS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("long"))
        ids = list(TEXT.encode())
        write_dataset(Path("data/long"), ids[:-2000], ids[-2000:], {"tokenizer": "byte"})
        return request.param, {name: long_run(request.param, name) for name in LONG_RUNS}


@pytest.mark.parametrize("name", ["uncompiled", "compiled"])
def test_a_long_run_calls_the_fastest_kernel_of_attention_that_is_right(long_runs, name):
    model, runs = long_runs
    expected = {"cudnn" if prefers_cudnn() else "flash"}
    if "swa" in model:  # not cuDNN's: with a mask, which a window needs, its gradients can be NaN
        expected = {"efficient", "flash"}  # a block of queries with a mask; the first, without one
    assert runs[name].kernels == expected


@pytest.mark.parametrize("name", LONG_RUNS)
def test_a_step_of_a_long_run_waits_for_the_gpu_once(long_runs, name):
    _, runs = long_runs
    assert runs[name].waits[1:] == [1, 1, 1, 1, 1]  # the first step allocates


@pytest.mark.parametrize(
    ("name", "reference"),
    [("uncompiled", "float32"), ("compiled", "uncompiled")],
)
def test_losses_and_gradients_of_long_runs_agree(long_runs, name, reference):
    _, runs = long_runs
    assert runs[name].losses == pytest.approx(runs[reference].losses, rel=0.01)
    assert_near(runs[name].gradients, runs[reference].gradients, tolerance=0.05)


def test_a_compiled_graph_calls_the_kernel_of_attention_that_is_enabled(tmp_path, monkeypatch):
    """The key of torch's cache of graphs has no such switch: use_cudnn_attention must tag it."""
    if not prefers_cudnn():
        pytest.skip("torch does not prefer cuDNN's attention on this GPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    q = torch.zeros(1, 2, 1024, 64, device=DEVICE, dtype=torch.bfloat16)
    called = []
    for enabled in (False, True):
        use_cudnn_attention(DEVICE, enabled)
        torch.compiler.reset()  # as in a new process: only the cache on disk is left
        attend = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))
        attend(q)
        called.append(set())
        with record_kernels(called[-1]):
            attend(q)
    assert called == [{"flash"}, {"cudnn"}]


# Memory ---------------------------------------------------------------------------------------


def test_one_rank_needs_no_more_memory_than_a_run_without_torchrun(workdir):
    """The logits take most of the memory, (8, 512, 50304), then the weights.

    They would show a loss that is not compiled, and gradients beside DDP's buckets.
    """
    options = {"dtype": "bfloat16", "compile": True, "n_layer": 4, "n_embd": 256, "n_head": 4}
    options |= {"vocab_size": 50304, "block_size": 512, "batch_size": 8, "total_batch_size": 8192}
    options |= {"max_steps": 3, "eval_interval": 3, "log_interval": 1}
    program = str(ROOT / "train.py")
    # Each in a process of its own, whose peak is that of the run
    processes = [start([sys.executable, program, *command("model", out_dir="out/one", **options)])]
    for mode, of_mode in MODES.items():
        argv = command("model", out_dir=f"out/{mode}", **options, **of_mode)
        processes.append(torchrun(1, program, *argv))
    for status, out, err in [finish(process, LONGEST_LAUNCH) for process in processes]:
        assert status == 0, out[-2000:] + err[-4000:]
    peaks = {mode: read_log(workdir / "out" / mode)[-1]["memory_gb"] for mode in ("one", *MODES)}
    assert peaks["ddp"] <= 1.05 * peaks["one"]
    assert peaks["fsdp"] <= 1.1 * peaks["one"]


# A model --------------------------------------------------------------------------------------


def vivid_for_sampling(model):
    """Return a small model on the GPU, where attention calls the kernels that sample.py uses."""
    use_cudnn_attention(DEVICE, enabled=False)
    return make_vivid(importlib.import_module(model)).to(DEVICE)


def gradients(model, x, y, dtype):
    """Return the loss and the gradients of a model by name, under autocast if dtype is bf16."""
    model.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        loss = model(x, y)
    loss.backward()
    return loss.item(), gradients_by_name(model)


def gradients_by_name(model):
    return {name: p.grad.cpu() for name, p in model.named_parameters()}


def assert_near(actual, expected, tolerance):
    """Compare gradients by name."""
    for name, gradient in actual.items():
        if not name.endswith("c_attn.bias"):  # the gradient of a key bias is rounding error
            assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name


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
    use_cudnn_attention(DEVICE, enabled=not hasattr(gpt.config, "window"))  # as in training
    loss, actual = gradients(gpt.to(DEVICE), x.to(DEVICE), y.to(DEVICE), dtype)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert_near(actual, expected, tolerance)


@each_model
@pytest.mark.parametrize("length", PROMPTS)
def test_cached_logits_on_the_gpu_are_those_of_a_full_forward(model, length):
    torch.set_float32_matmul_precision("highest")
    gpt, idx = vivid_for_sampling(model), tokens(2, 16).to(DEVICE)
    chunks = [idx[:, :length], *idx[:, length:].split(1, dim=1)]
    expected = last_logits(gpt, idx)[:, length - 1 :]
    close(feed(gpt, gpt.make_cache(2), *chunks), expected)


@each_model
def test_cached_logits_in_bf16_on_the_gpu_are_near_those_of_a_full_forward(model):
    gpt, idx = vivid_for_sampling(model).bfloat16(), tokens(2, 16).to(DEVICE)
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
    use_cudnn_attention(DEVICE, enabled=False)  # as in training with windows
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
