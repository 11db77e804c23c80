"""torchrun: workers that are killed and restarted, a signal, two agents as on two machines.

The launches are jobs of tests/helpers/background.py.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import read_log
from ranks import (
    ROOT,
    SHORT,
    command,
    finish,
    launch,
    losses,
    same_weights,
    start,
    torchrun,
)

import train
from common import run_dir


def kill_workers(tests):
    """Do three runs in one launch; return the list of records of each rank.

    Rank 1 is killed in a step of the run "step", and while it saves the first checkpoint of the run
    "save". torchrun restarts the workers after each. The run "uninterrupted" is for comparison.
    """
    options = SHORT | {"checkpoint_interval": 4}
    step = command("step", 2, **options, overwrite=True)
    save = command("save", 2, **options, overwrite=True)
    runs = [
        {"argv": step, "signal": "SIGKILL", "rank": 1, "step": 5, "restarts": 0},
        {"argv": save, "signal": "SIGKILL", "rank": 1, "saving": True, "restarts": 1},
        {"argv": command("uninterrupted", 2, **options)},
    ]
    return launch(2, runs, max_restarts=2)


def send_sigterm(tests):
    """Send a SIGTERM to torchrun while it trains; return its last line."""
    log = Path("out/terminated-model/log.jsonl")
    argv = command("terminated", 2, max_steps=3000, fsdp=True, log_interval=1)
    process = torchrun(2, ROOT / "train.py", *argv)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, out, _ = finish(process)
    return out.splitlines()[-1]


def start_two_agents(tests):
    """Train with two agents of one process each, and kill one of these; return their statuses."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    argv = command("two-agents", 2, fsdp=True, max_steps=12, checkpoint_interval=4)
    run = {"argv": argv, "signal": "SIGKILL", "rank": 1, "step": 8}
    Path("runs.json").write_text(json.dumps([run]))
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
        "--max-restarts=2",
        ROOT / "tests/helpers/launched.py",
        "runs.json",
    ]
    agents = [start(line), start(line)]
    statuses = [finish(agent)[0] for agent in agents]
    del os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
    return statuses


BACKGROUND = {"killed": kill_workers, "terminated": send_sigterm, "two_agents": start_two_agents}


@pytest.fixture
def killed(background):
    with background.result("killed") as records:
        yield records


@pytest.fixture
def terminated(background):
    with background.result("terminated") as last_line:
        yield last_line


@pytest.fixture
def two_agents(background):
    with background.result("two_agents") as statuses:
        yield statuses


@pytest.mark.parametrize("name", ["step", "save"])
def test_a_run_with_a_killed_worker_ends_with_the_same_bits(killed, name):
    assert losses(name) == losses("uninterrupted")
    assert same_weights(name, "uninterrupted")


@pytest.mark.parametrize(("run", "steps"), [(0, 0), (1, 12)], ids=["step", "save"])
def test_a_restarted_worker_does_the_steps_after_the_last_checkpoint(killed, run, steps):
    """After the last restart the run "step" is finished; "save" has no checkpoint to resume."""
    for records in killed:
        assert len(records[run]["sequences"]) == steps


def test_torchrun_passes_a_sigterm_to_the_ranks_and_the_run_can_be_resumed(terminated):
    run = Path("out/terminated-model")
    last = run_dir.list_checkpoints(run)[-1]
    step = int(last.name.removeprefix("step_"))
    assert f"step {step}" in terminated
    assert read_log(run)[-1]["step"] == step
    train.main(command("terminated", max_steps=step + 2))
    assert read_log(run)[-1]["step"] == step + 2


def test_two_agents_train_together_also_after_a_worker_is_killed(two_agents):
    assert two_agents == [0, 0]
    train.main(command("one-process", max_steps=12))
    assert losses("two-agents")[-1] == pytest.approx(losses("one-process")[-1], rel=1e-4)
