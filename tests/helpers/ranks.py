"""Launch train.py or tests/helpers/launched.py in several processes, and read what they recorded.

torchrun() starts torchrun; fork() forks the ranks of each world size from one process.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs as run_files
from background import kill_tree
from conftest import arguments

import train

ROOT = Path(train.__file__).parent
# 2 and 4 divide the sizes and 3 does not; the vocabulary has an odd size, 257; a step has two
# micro-steps for every world size.
SHAPE = {
    "n_head": 4,
    "n_embd": 40,
    "n_kv_head": 2,
    "window": 5,
    "total_batch_size": 384,
    "dropout": 0.0,
    "learning_rate": 3e-3,
    "max_steps": 50,
    "eval_interval": 25,
    "checkpoint_interval": 100,
    "eval_tokens": 400,
    "eval_train": True,
    "log_interval": 50,
}
SHORT = {"max_steps": 12, "eval_interval": 6, "dropout": 0.1}
LONGEST_LAUNCH = 1200  # seconds until a launch counts as hung, on a machine that is busy otherwise


def command(name, world_size=1, model="model", **options):
    """Return the command line of a run on world_size ranks, in out/NAME-MODEL."""
    fields = train.model_module(model).GPTConfig.__dataclass_fields__
    shape = dict(SHAPE)
    for option in ("n_kv_head", "window"):
        if option not in fields:
            del shape[option]
    shape["batch_size"] = 12 // world_size
    shape["out_dir"] = f"out/{name}-{model}"
    return arguments(model=model, **shape | options)


def start(line):
    """Start a command; return the process."""
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def torchrun(world_size, *argv, **options):
    """Start torchrun on one machine; return the process."""
    # Without the address torchrun looks up the name of the machine, which may not resolve.
    flags = ["--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={world_size}"]
    for name, value in options.items():
        flags.append(f"--{name.replace('_', '-')}={value}")
    return start([sys.executable, "-m", "torch.distributed.run", *flags, *map(str, argv)])


def finish(process, timeout=300):
    """Wait for a launch; return (status, stdout, stderr). Kill one that hangs, with its workers."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"hung: {out[-2000:]} {err[-2000:]}")
    return process.returncode, out, err


def read_records(world_size, path):
    """Return what each rank recorded, a list with one record for each run."""
    return [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(world_size)]


def launch(world_size, runs, **options):
    """Do runs in one launch of torchrun; return the list of records of each rank."""
    Path("runs.json").write_text(json.dumps(runs))
    process = torchrun(world_size, ROOT / "tests/helpers/launched.py", "runs.json", **options)
    status, out, err = finish(process, timeout=LONGEST_LAUNCH)
    assert status == 0, out[-2000:] + err[-4000:]
    return read_records(world_size, "runs.json")


def fork(runs):
    """Do the runs of several world sizes, {world size: runs}, in forked processes.

    Returns {world size: the list of records of each rank}, and the stderr of all.
    """
    files = []
    for world_size in runs:
        Path(f"runs{world_size}.json").write_text(json.dumps(runs[world_size]))
        files.append(f"{world_size}:runs{world_size}.json")
    line = [sys.executable, ROOT / "tests/helpers/launched.py", *files]
    status, out, err = finish(start(line), timeout=LONGEST_LAUNCH)
    assert status == 0, out[-2000:] + err[-4000:]
    records = {}
    for world_size in runs:
        records[world_size] = read_records(world_size, f"runs{world_size}.json")
    return records, err


def losses(name):
    """Return the losses of the run out/NAME-model."""
    return run_files.losses(Path(f"out/{name}-model"))


def same_weights(name, other_name):
    """Return whether two runs in out/NAME-model have the same weights, bit for bit."""
    return run_files.same_weights(Path(f"out/{name}-model"), Path(f"out/{other_name}-model"))
