"""Runs of train.py one after the other in one launch, as Python and torch take longer to start than a tiny run takes.

    torchrun --standalone --nproc_per_node=2 tests/launched.py RUNS.json       by torchrun
    python tests/launched.py 2:RUNS.json 3:OTHERS.json                         by forking: 2 ranks, then 3

A file lists runs: {"argv": command line, or one for each rank, "signal": "SIGTERM" or "SIGKILL", sent to "rank" itself
in "step" or, with "saving", while it saves, after so many "restarts" of the workers (0 by default), "folders": one for
each rank to run in}. FILE.RANK then has for each run the exit status, the sequences that the rank took in each step,
and, with "weigh", the bytes of all tensors that it held before each step of the optimizer and while it saved.
"""

import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from common import checkpoint
from common.dataloader import Loader

torch.set_num_threads(1)


def tensor_bytes():
    """Of all tensors that are alive, each storage once; of a sharded one this rank's shard."""
    gc.collect()
    tensors = [
        t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type == "cpu"
    ]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def watched(run):
    """Train as a run asks; returns what happened on this rank."""
    rank, restarts = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    due = run.get("rank") == rank and restarts == run.get("restarts", 0)
    seen = {"sequences": [], "bytes": [], "saving": []}
    train_batch, train_step, dcp_save = Loader.train_batch, train.train_step, checkpoint.dcp.save

    def noting_batch(loader, first, count):
        seen["sequences"][-1].extend(range(first, first + count))
        return train_batch(loader, first, count)

    def noting_step(state):
        seen["sequences"].append([])
        if due and state.step == run.get("step"):
            signal.raise_signal(getattr(signal, run["signal"]))
        return train_step(state)

    def weighed_or_dying_save(*args, **kwargs):
        if "weigh" in run:
            seen["saving"].append(tensor_bytes())
        dcp_save(*args, **kwargs)
        if due and "saving" in run:
            os.kill(os.getpid(), signal.SIGKILL)

    def weigh(optimizer, args, kwargs):
        seen["bytes"].append(tensor_bytes())

    Loader.train_batch, train.train_step, checkpoint.dcp.save = (
        noting_batch,
        noting_step,
        weighed_or_dying_save,
    )
    hook = register_optimizer_step_pre_hook(weigh) if "weigh" in run else None
    folder = os.getcwd()
    os.chdir(run["folders"][rank] if "folders" in run else folder)
    try:
        train.main(run["argv"][rank] if isinstance(run["argv"][0], list) else run["argv"])
        seen["status"] = 0
    except SystemExit as stopped:
        seen["status"] = stopped.code
    os.chdir(folder)
    Loader.train_batch, train.train_step, checkpoint.dcp.save = train_batch, train_step, dcp_save
    if hook:
        hook.remove()
    return seen


def run_rank(path):
    """Do the runs of a file as the rank that the environment names."""
    gc.freeze()  # the objects of the imported modules, so that collecting garbage is quick
    if hasattr(os, "SCHED_BATCH"):  # ranks that outnumber the cores then interrupt each other less
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    done = [watched(run) for run in json.loads(Path(path).read_text())]
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(done))


def fork_ranks(world_size, path):
    """Do the runs of a file in so many forked processes; exits with status 1 where one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            environment = {
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
                "RANK": rank,
                "LOCAL_RANK": rank,
            }
            environment |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            os.environ.update({name: str(value) for name, value in environment.items()})
            run_rank(path)
            sys.exit()
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if any(statuses):
        sys.exit(f"ranks of {path} ended with {statuses}")


if "RANK" in os.environ:
    run_rank(sys.argv[1])
else:
    for argument in sys.argv[1:]:
        world_size, _, path = argument.partition(":")
        fork_ranks(int(world_size), path)
