"""nanoGPT as a peer: its own programs, run in a copy of a directory that the user names.

Nothing is written into that directory, and nothing of it is part of this project. The programs run
with nanoGPT's own settings; what differs from its defaults is on their command lines here.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from common.errors import UserError

NEEDED = (
    "train.py",
    "model.py",
    "configurator.py",
    "config/train_shakespeare_char.py",
    "data/shakespeare_char/prepare.py",
)
TIME = re.compile(r"^iter (\d+): .*time ([\d.]+)ms", re.MULTILINE)
VAL_LOSS = re.compile(r"^step (\d+): .*val loss ([\d.]+)", re.MULTILINE)
# nanoGPT's sample.py needs a checkpoint; this calls the generate() behind it on random weights, in
# the dtypes of that program: one sample after another, drawn at random, without a KV cache.
GENERATE = """
import contextlib, json, sys, time
import torch
from model import GPT, GPTConfig
options, device, prompt_tokens, new_tokens = json.loads(sys.argv[1])
context = contextlib.nullcontext()
if device.startswith("cuda"):
    torch.backends.cuda.matmul.allow_tf32 = True
    context = torch.autocast("cuda", torch.bfloat16)
model = GPT(GPTConfig(**options)).to(device).eval()
prompt = torch.zeros(1, prompt_tokens, dtype=torch.long, device=device)
with torch.no_grad(), context:
    model.generate(prompt, 2).tolist()
    start = time.perf_counter()
    model.generate(prompt, new_tokens).tolist()  # waits for a GPU
print("seconds", time.perf_counter() - start)
"""


def check_nanogpt(path):
    """Raise UserError if a directory does not hold nanoGPT's programs."""
    missing = [name for name in NEEDED if not (Path(path) / name).is_file()]
    if missing:
        raise UserError(
            f"nanogpt={path} has no {missing[0]}: give the directory of a clone of nanoGPT"
        )


def copy_given_nanogpt(bench, folder):
    """Copy the programs, configs and data preparation of the user's nanoGPT; return the path.

    Return None, and add a note, if no nanoGPT is given.
    """
    if bench.nanogpt is None:
        bench.note("nanoGPT is skipped: --nanogpt=PATH names a directory with its programs")
        return None
    path, copy = Path(bench.nanogpt), Path(folder) / "nanogpt"
    files = [*path.glob("*.py"), *path.glob("config/*.py"), *path.glob("data/*/*.py")]
    for file in files:
        target = copy / file.relative_to(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return copy


def run_nanogpt(copy, *arguments):
    """Run Python with these arguments in a copy of nanoGPT; return what it printed.

    It inherits GOMP_SPINCOUNT, the short spin of OpenMP threads that our programs have.
    """
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"nanoGPT's {arguments[0]} failed: {reason[:300]}")
    return result.stdout


def device_options(device):
    """Return the options for a device: on CUDA nanoGPT's defaults, else what its README says."""
    if device.type == "cuda":
        return [f"--device={device}", "--compile=True"]
    return [f"--device={device.type}", "--compile=False"]


def iteration_seconds(output):
    """Return the median time of an iteration from the output of nanoGPT's train.py.

    Without the first one, which includes an evaluation, and without all of the first half, in which
    a GPU compiles and warms up.
    """
    times = [float(ms) / 1000 for _, ms in TIME.findall(output)]
    if len(times) < 2:
        raise UserError("nanoGPT's train.py printed no times of iterations")
    return statistics.median(times[max(1, len(times) // 2) :])


def last_val_loss(output):
    """Return (iteration, validation loss) of the last evaluation in nanoGPT's output."""
    evaluations = VAL_LOSS.findall(output)
    if not evaluations:
        raise UserError("nanoGPT's train.py printed no validation loss")
    iteration, loss = evaluations[-1]
    return int(iteration), float(loss)


def generating_seconds(copy, model_options, device, prompt_tokens, new_tokens):
    """Return the seconds of one sample by nanoGPT's generate()."""
    options = {"bias": True, "vocab_size": 50257} | model_options
    call = json.dumps([options, str(device), prompt_tokens, new_tokens])
    output = run_nanogpt(copy, "-c", GENERATE, call)
    return float(output.split()[-1])
