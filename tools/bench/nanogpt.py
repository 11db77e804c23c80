"""nanoGPT as a peer: its own programs, run in a copy of a directory that the user names.

Nothing is written into that directory, and nothing of it is part of this project. The programs run
with nanoGPT's own settings; what differs from its defaults is on their command lines here.
"""

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


def check_nanogpt(path):
    """Raise UserError if a directory does not hold nanoGPT's programs."""
    missing = [name for name in NEEDED if not (Path(path) / name).is_file()]
    if missing:
        raise UserError(
            f"nanogpt={path} has no {missing[0]}: give the directory of a clone of nanoGPT"
        )


def copy_nanogpt(path, folder):
    """Copy nanoGPT's programs, configs and the preparation of its data; return the copy's path."""
    path, copy = Path(path), Path(folder) / "nanogpt"
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
