"""torchrun: workers that are killed and restarted, signals, agents on several machines."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_resume
from conftest import read_log, write_tiny
from test_distributed import ROOT, SHORT, command, finish, launch, same_weights, torchrun

import train
from common import checkpoint


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with data/tiny."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("launches"))
    write_tiny(Path())
    yield
    os.chdir(before)


def losses(name):
    return test_resume.losses(Path(f"out/{name}-model"))


@pytest.fixture(scope="module")
def killed(folder):
    """What the ranks noted of two runs of one launch: rank 1 is killed in a step of the first, and while it saves the
    first checkpoint of the second; torchrun restarts the workers after each."""
    argv = {
        name: command(name, 2, **SHORT, overwrite=True, checkpoint_interval=4)
        for name in ("step", "save")
    }
    runs = [{"argv": argv["step"], "signal": "SIGKILL", "rank": 1, "step": 5, "restarts": 0}]
    runs += [{"argv": argv["save"], "signal": "SIGKILL", "rank": 1, "saving": True, "restarts": 1}]
    runs += [{"argv": command("whole", 2, **SHORT, checkpoint_interval=4)}]
    return launch(2, runs, max_restarts=2)


@pytest.mark.parametrize(("name", "steps"), [("step", 0), ("save", 12)])
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_bits(killed, name, steps):
    """After the last restart the first run is finished already, and the second begins anew: it had no checkpoint."""
    assert [len(rank[["step", "save"].index(name)]["sequences"]) for rank in killed] == [
        steps,
        steps,
    ]
    assert losses(name) == losses("whole") and same_weights(name, "whole")


def test_torchrun_passes_a_sigterm_on_and_the_run_can_be_resumed():
    options = dict(fsdp=True, log_interval=1)
    process = torchrun(2, ROOT / "train.py", *command("terminated", 2, max_steps=3000, **options))
    log = Path("out/terminated-model/log.jsonl")
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out = finish(process)[1]
    last = checkpoint.list_checkpoints("out/terminated-model")[-1]
    step = int(last.name.removeprefix("step_"))
    assert f"stopped after step {step}" in out
    assert read_log(log.parent)[-1]["step"] == step
    train.main(command("terminated", max_steps=step + 2))
    assert read_log(log.parent)[-1]["step"] == step + 2


def test_two_agents_meet_over_the_network_and_again_after_a_worker_is_killed(monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{port}",
    ]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *flags,
        "--max-restarts=2",
        ROOT / "tests/launched.py",
    ]
    argv = command("nodes", 2, fsdp=True, max_steps=12, checkpoint_interval=4)
    run = {"argv": argv, "signal": "SIGKILL", "rank": 1, "step": 8}
    Path("runs.json").write_text(json.dumps([run]))
    line.append("runs.json")
    agents = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [finish(agent)[0] for agent in agents] == [0, 0]
    train.main(command("node", max_steps=12))
    assert losses("nodes")[-1] == pytest.approx(losses("node")[-1], rel=1e-4)
