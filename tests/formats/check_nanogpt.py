"""Compare a checkpoint of nanoGPT's own train.py with the model that is read from it here.

    python tests/formats/check_nanogpt.py NANOGPT

NANOGPT is a directory with nanoGPT's train.py and model.py; it stays as it is. The script lets
nanoGPT train a tiny model, reads its ckpt.pt, prints the largest difference of the logits, and ends
with status 1 if there is one. pytest does not collect this file.

nanoGPT computes GELU exactly and model.py in its tanh approximation. The logits are compared as
they are, and with the exact function here, too.
"""

import contextlib
import importlib.util
import io
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # for conftest
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from conftest import write_tiny

from common.pretrained import load_model

TOLERANCE = 1e-5  # of logits with the same GELU
OPTIONS = (
    "--dataset=tiny --device=cpu --dtype=float32 --compile=False --n_layer=2 --n_head=4 "
    "--n_embd=32 --block_size=64 --batch_size=8 --gradient_accumulation_steps=1 --max_iters=200 "
    "--learning_rate=1e-3 --warmup_iters=0 --eval_interval=200 --eval_iters=5 "
    "--always_save_checkpoint=True"
)

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
def agree(ours, theirs):
    """Print the largest differences of logits; return whether they agree with the same GELU."""
    idx = torch.randint(257, (8, ours.config.block_size))
    expected, _ = theirs(idx, targets=idx)  # without targets it returns the last position only
    difference = (ours(idx) - expected).abs().max().item()
    with mock.patch.object(F, "gelu", exact_gelu):
        exact = (ours(idx) - expected).abs().max().item()
    print(
        f"largest logit {expected.abs().max():.1f}, largest difference {difference:.1e}, "
        f"with exact GELU {exact:.1e}"
    )
    return exact < TOLERANCE


def train_there(folder):
    """Let nanoGPT train in its folder; print the last line of its output."""
    command = [sys.executable, "train.py", *OPTIONS.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: nanoGPT's train.py ended with status {done.returncode}\n{done.stderr}")
    print("train.py of nanoGPT:", done.stdout.splitlines()[-1])


def main(argv):
    if len(argv) != 1 or not Path(argv[0], "model.py").is_file():
        sys.exit("error: name a directory with nanoGPT's model.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "nanogpt")
        shutil.copytree(argv[0], folder, ignore=shutil.ignore_patterns(".git", "data", "out*"))
        write_tiny(folder)
        chars = [chr(token_id) for token_id in range(257)]
        meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars))}
        (folder / "data/tiny/meta.pkl").write_bytes(pickle.dumps(meta))
        train_there(folder)
        shutil.copy(folder / "data/tiny/meta.pkl", folder / "out")
        ours, _ = load_model(str(folder / "out"))
        is_equal = agree(ours, their_model(folder, folder / "out/ckpt.pt"))
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
