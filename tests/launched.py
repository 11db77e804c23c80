"""Runs of train.py one after the other in one launch, as Python and torch take longer to start than a tiny run takes:

    torchrun --standalone --nproc_per_node=2 tests/launched.py RUNS.json

RUNS.json lists runs: {"argv": command line, or one for each rank, "signal": "SIGTERM" or "SIGKILL", sent to "rank"
itself in "step" or, with "saving", while it saves, "folders": one for each rank to run in}. RUNS.json.RANK then has for
each run the exit status, the sequences that the rank took in each step, and, with "weigh", the bytes of all tensors
that it held before each step of the optimizer and while it saved.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import checkpoint
import train
from loader import Loader

torch.set_num_threads(1)
RANK = int(os.environ["RANK"])


def tensor_bytes():
    """Of all tensors that are alive, each storage once; of a sharded one this rank's share."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def watched(run):
    """Train as a run asks; returns what happened on this rank."""
    seen = {"sequences": [], "bytes": [], "saving": []}
    train_batch, train_step, dcp_save = Loader.train_batch, train.train_step, checkpoint.dcp.save
    due = run.get("rank") == RANK and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def noting_batch(loader, first, count):
        seen["sequences"][-1].extend(range(first, first + count))
        return train_batch(loader, first, count)

    def noting_step(state, step):
        seen["sequences"].append([])
        if due and step == run["step"]:
            signal.raise_signal(getattr(signal, run["signal"]))
        return train_step(state, step)

    def weighed_or_dying_save(*args, **kwargs):
        if "weigh" in run:
            seen["saving"].append(tensor_bytes())
        dcp_save(*args, **kwargs)
        if due and "saving" in run:
            os.kill(os.getpid(), signal.SIGKILL)

    def weigh(optimizer, args, kwargs):
        seen["bytes"].append(tensor_bytes())

    Loader.train_batch, train.train_step, checkpoint.dcp.save = noting_batch, noting_step, weighed_or_dying_save
    hook = register_optimizer_step_pre_hook(weigh) if "weigh" in run else None
    stdout, folder = sys.stdout, os.getcwd()
    os.chdir(run["folders"][RANK] if "folders" in run else folder)
    try:
        train.main(run["argv"][RANK] if isinstance(run["argv"][0], list) else run["argv"])
        seen["status"] = 0
    except SystemExit as stopped:
        seen["status"] = stopped.code
    sys.stdout = stdout
    os.chdir(folder)
    Loader.train_batch, train.train_step, checkpoint.dcp.save = train_batch, train_step, dcp_save
    if hook:
        hook.remove()
    return seen


done = [watched(run) for run in json.loads(Path(sys.argv[1]).read_text())]
Path(f"{sys.argv[1]}.{RANK}").write_text(json.dumps(done))
