"""Exchange a model with nanoGPT's own programs: logits in both directions, training, sampling.

    python tests/formats/check_nanogpt.py NANOGPT

NANOGPT is a directory with nanoGPT's train.py, sample.py and model.py; it stays as it is. The
script trains a tiny run, exports it, lets nanoGPT sample from it and train it further, and reads
the result back. It prints a line for each step, and ends with status 1 if logits differ. pytest
does not collect this file.

nanoGPT computes GELU exactly and model.py in its tanh approximation. The logits are compared as
they are, and with the exact function here, too.
"""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from conftest import arguments, write_tiny

import train
from common.pretrained import load_model
from tools.export import export

TOLERANCE = 1e-5  # of logits with the same GELU
STEPS = 20  # of nanoGPT's training


gelu = F.gelu


def exact_gelu(x, approximate):
    """Compute GELU as nanoGPT does, in the place of F.gelu."""
    return gelu(x)


def their_model(folder, path):
    """Return nanoGPT's model with the weights of a ckpt.pt."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # its dataclass looks it up
    spec.loader.exec_module(module)
    stored = torch.load(path, map_location="cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**stored["model_args"]))
    model.load_state_dict(stored["model"])
    return model.eval()


@torch.no_grad()
def compare(name, ours, theirs):
    """Print the largest differences of logits; return whether they agree with the same GELU."""
    idx = torch.randint(257, (8, ours.config.block_size))
    expected, _ = theirs(idx, targets=idx)  # without targets it returns the last position only
    difference = (ours(idx) - expected).abs().max().item()
    with mock.patch.object(F, "gelu", exact_gelu):
        exact = (ours(idx) - expected).abs().max().item()
    print(
        f"{name}: largest logit {expected.abs().max():.1f}, largest difference {difference:.1e}, "
        f"with exact GELU {exact:.1e}",
        flush=True,
    )
    return exact < TOLERANCE


def run_program(folder, name, *options):
    """Run one of nanoGPT's programs; return its output."""
    command = [sys.executable, name, "--device=cpu", "--dtype=float32", "--compile=False", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {name} of nanoGPT ended with status {done.returncode}\n{done.stderr}")
    return done.stdout


def main(argv):
    if len(argv) != 1 or not Path(argv[0], "model.py").is_file():
        sys.exit("error: name a directory with nanoGPT's model.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "nanogpt")
        shutil.copytree(argv[0], folder, ignore=shutil.ignore_patterns(".git", "data", "out*"))
        os.chdir(scratch)
        write_tiny(Path())
        sizes = {"n_head": 4, "n_embd": 32, "block_size": 64, "total_batch_size": 512}
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(arguments(**sizes, max_steps=200, eval_interval=100, grad_clip=1.0))
        export("out/tiny", "exported/tiny", "nanogpt")
        ours, _ = load_model("out/tiny")
        agrees = [compare("exported", ours, their_model(folder, "exported/tiny/ckpt.pt"))]

        shutil.copytree("data/tiny", folder / "data" / "tiny")
        shutil.copy("exported/tiny/meta.pkl", folder / "data" / "tiny")
        shutil.copytree("exported/tiny", folder / "out")
        text = run_program(folder, "sample.py", "--num_samples=1", "--max_new_tokens=40")
        print("sample.py of nanoGPT:", repr(text.splitlines()[-2][:60]))
        options = ["--init_from=resume", "--dataset=tiny", "--block_size=64", "--batch_size=8"]
        steps = [f"--max_iters={STEPS}", "--eval_interval=10", "--eval_iters=5", "--warmup_iters=0"]
        output = run_program(
            folder,
            "train.py",
            *options,
            *steps,
            "--gradient_accumulation_steps=1",
            "--always_save_checkpoint=True",
            "--learning_rate=1e-3",
        )
        print("train.py of nanoGPT:", output.splitlines()[-1])
        back, _ = load_model(str(folder / "out"))
        agrees.append(
            compare("trained there, read back", back, their_model(folder, "nanogpt/out/ckpt.pt"))
        )
        os.chdir("/")  # Windows does not remove a working directory
    sys.exit(0 if all(agrees) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
