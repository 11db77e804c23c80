"""What only a CUDA GPU can show; skipped elsewhere. Alone: pytest -m gpu"""

import pytest
import torch
from conftest import arguments, read_log

import sample
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
CUDA = dict(device="cuda", n_embd=64, dropout=0.0)


def losses(run):
    return [r["train_loss"] for r in read_log(run)[1:]]


def test_float32_on_the_gpu_follows_the_cpu(workdir):
    train.main(arguments(**CUDA, out_dir="out/gpu", compile=False))
    train.main(arguments(**CUDA | {"device": "cpu"}, out_dir="out/cpu"))
    assert losses(workdir / "out/gpu") == pytest.approx(losses(workdir / "out/cpu"), rel=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(workdir, dtype):
    train.main(arguments(**CUDA, out_dir="out/float32", compile=False))
    train.main(arguments(**CUDA, out_dir="out/half", compile=False, dtype=dtype))
    assert losses(workdir / "out/half") == pytest.approx(losses(workdir / "out/float32"), rel=0.01)


def test_the_compiled_model_follows_the_eager_one(workdir):
    train.main(arguments(**CUDA, out_dir="out/eager", compile=False))
    train.main(arguments(**CUDA, out_dir="out/compiled", compile=True))
    assert losses(workdir / "out/compiled") == pytest.approx(losses(workdir / "out/eager"), rel=1e-3)


def test_deterministic_runs_have_the_same_bits(workdir):
    for name in ("a", "b"):
        train.main(arguments(**CUDA, out_dir=f"out/{name}", dtype="bfloat16", deterministic=True, compile=False))
    torch.use_deterministic_algorithms(False)
    assert losses(workdir / "out/a") == losses(workdir / "out/b")


def test_a_run_of_the_gpu_is_sampled_on_the_gpu_as_on_the_cpu(workdir, capsys):
    train.main(arguments(**CUDA))
    texts = []
    for device in ("cuda", "cpu"):
        capsys.readouterr()
        sample.main(
            ["--init_from=out/tiny", "--prompt=def ", "--temperature=0", "--dtype=float32", f"--device={device}"]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_the_log_tells_the_memory_of_the_gpu(workdir):
    train.main(arguments(**CUDA))
    assert 0 < read_log(workdir / "out/tiny")[-1]["memory_gb"] < 2
