"""train.py and sample.py on a CUDA GPU, for every model; skipped without one.

pytest -m gpu
"""

import pytest
import torch
from conftest import arguments, read_log
from test_variants import MODELS

import sample
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
each_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(autouse=True)
def restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def command(model, **options):
    """Return the command line of a tiny run of a model on the GPU."""
    given = {"device": "cuda", "n_embd": 64, "dropout": 0.0}
    fields = train.model_module(model).GPTConfig.__dataclass_fields__
    if "n_kv_head" in fields:
        given["n_kv_head"] = 1
    if "window" in fields:
        given["window"] = 5
    given.update(options)
    return arguments(model=model, **given)


def losses(run):
    return [record["train_loss"] for record in read_log(run)[1:]]


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
def test_the_compiled_model_follows_the_eager_one(workdir, model):
    train.main(command(model, out_dir="out/eager", compile=False))
    train.main(command(model, out_dir="out/compiled", compile=True))
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
