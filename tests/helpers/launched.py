"""Do several runs of train.py in one launch, since starting Python takes longer than a tiny run.

    torchrun --standalone --nproc_per_node=2 tests/helpers/launched.py RUNS.json  by torchrun
    python tests/helpers/launched.py 2:RUNS.json 3:OTHERS.json            by forking 2 ranks, then 3

A JSON file is a list of runs. A run has these keys, all but argv optional:

    argv           the command line, or a list with one for each rank
    folders        the working directory of each rank
    signal         SIGTERM or SIGKILL, sent by a rank to itself
    rank           the rank that sends it
    step           the step, from 0, in which it is sent
    saving         true: it is SIGKILL, sent while the rank saves a checkpoint
    restarts       it is sent after so many restarts of the workers, 0 by default
    measure_bytes  true: the bytes of tensors are recorded
    events         true: what the rank computes and sends is recorded
    spoil          {"what", "value", "step", "rank"}: arguments of spoiled() of spoiled.py
    unused         shape of a parameter `unused` that each block of model.py gets and does not use
    no_compiler    ranks on which torch.compile fails; on the others it runs the graphs as they are

FILE.RANK then holds the list of what the rank recorded, for each run:

    status         the exit status
    sequences      for each step the sequences that the rank read
    step_bytes     the bytes of all its tensors before each optimizer step
    saving_bytes   the same while it saved a checkpoint
    kept_bytes     the bytes of the gradients that it keeps from one step to the next, for each step
    events         what it computed and sent in its last step
    graphs         the number of graphs that it has compiled
    digests        of its weights and optimizer state, before and after the spoiled step
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from collectives import recorded_events
from spoiled import spoiled
from torch.optim.optimizer import register_optimizer_step_pre_hook

import model
import train
from common import checkpoint
from common.dataloader import Loader
from common.errors import run_program

torch.set_num_threads(1)


def tensor_bytes():
    """Return the bytes of all live CPU tensors: each storage once, of a DTensor the shard."""
    gc.collect()
    storages = {}
    for tensor in gc.get_objects():
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
            continue
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def gradient_bytes(gpt):
    """Return the bytes of a model's gradients: each storage once."""
    storages = {}
    for p in gpt.parameters():
        if p.grad is not None:
            gradient = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
            storage = gradient.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def compiler(fails, record):
    """Return a torch.compile that counts graphs and runs them as they are, or fails."""
    torch_compile = torch.compile

    def backend(graph, inputs):
        if fails:
            raise RuntimeError("no compiler")
        record["graphs"] += 1
        return graph.forward

    return lambda function, **options: torch_compile(function, backend=backend, **options)


def with_unused_parameter(init, shape):
    """Return a Block's __init__ that adds a parameter to what `init` does."""

    def init_and_add(block, *args):
        init(block, *args)
        block.unused = torch.nn.Parameter(torch.zeros(shape))

    return init_and_add


def do_run(run):
    """Train as a run describes; return what this rank recorded."""
    rank = int(os.environ["RANK"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    sends_signal = run.get("rank") == rank and restarts == run.get("restarts", 0)
    measures_bytes = run.get("measure_bytes", False)
    record = {"sequences": [], "step_bytes": [], "saving_bytes": [], "kept_bytes": [], "graphs": 0}
    train_batch = Loader.train_batch
    train_step = train.train_step
    dcp_save = checkpoint.dcp.save

    def recording_train_batch(loader, first, count):
        if record["sequences"]:  # before the first step DDP reads a batch, too
            record["sequences"][-1].extend(range(first, first + count))
        return train_batch(loader, first, count)

    def recording_train_step(state):
        record["sequences"].append([])
        record["kept_bytes"].append(gradient_bytes(state.model))
        if sends_signal and state.step == run.get("step"):
            signal.raise_signal(getattr(signal, run["signal"]))
        if not run.get("events"):
            return train_step(state)
        with recorded_events(state.model) as record["events"]:
            return train_step(state)

    def recording_save(*args, **kwargs):
        if measures_bytes:
            record["saving_bytes"].append(tensor_bytes())
        dcp_save(*args, **kwargs)
        if sends_signal and "saving" in run:
            os.kill(os.getpid(), signal.SIGKILL)

    def record_step_bytes(optimizer, args, kwargs):
        if measures_bytes:
            record["step_bytes"].append(tensor_bytes())

    argv = run["argv"]
    if isinstance(argv[0], list):
        argv = argv[rank]
    before = os.getcwd()
    if "folders" in run:
        os.chdir(run["folders"][rank])
    Loader.train_batch = recording_train_batch
    train.train_step = recording_train_step
    checkpoint.dcp.save = recording_save
    hook = register_optimizer_step_pre_hook(record_step_bytes)
    spoil = spoiled(**run["spoil"]) if "spoil" in run else contextlib.nullcontext()
    torch_compile = torch.compile
    if "no_compiler" in run:
        torch._dynamo.reset()
        torch.compile = compiler(rank in run["no_compiler"], record)
    init = model.Block.__init__
    if "unused" in run:
        model.Block.__init__ = with_unused_parameter(init, run["unused"])
    try:
        with spoil as record["digests"]:
            run_program(train.main, argv)
        record["status"] = 0
    except SystemExit as stopped:
        if "signal" in run:  # another rank was killed: torchrun must see that this one fails, too
            raise
        record["status"] = stopped.code
    hook.remove()
    model.Block.__init__ = init
    torch.compile = torch_compile
    checkpoint.dcp.save = dcp_save
    train.train_step = train_step
    Loader.train_batch = train_batch
    os.chdir(before)
    return record


def run_rank(path):
    """Do the runs of a file as the rank that the environment names."""
    gc.freeze()  # excludes the objects of the imported modules, so that collecting garbage is quick
    gc.freeze = gc.unfreeze = lambda: None  # tensor_bytes() finds no frozen objects
    if hasattr(os, "SCHED_BATCH"):  # ranks that outnumber the cores then interrupt each other less
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    records = [do_run(run) for run in json.loads(Path(path).read_text())]
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(records))


def fork_ranks(world_size, path):
    """Do the runs of a file in world_size forked processes; exit with status 1 if one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["WORLD_SIZE"] = str(world_size)
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.environ["RANK"] = str(rank)
            os.environ["LOCAL_RANK"] = str(rank)
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
