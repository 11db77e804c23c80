"""torchrun: resume, resharding, restarts, signals and refusals of several processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_resume
import torch
from conftest import TEXT, read_log, write_dataset, write_tiny
from test_parallel import ROOT, command, finish, launch, torchrun
from transformers import AutoModelForCausalLM

import checkpoint
import train
from pretrained import export, load_model

SHORT = dict(max_steps=12, eval_interval=6, dropout=0.1)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A working directory with data/tiny."""
    folder, before = tmp_path_factory.mktemp("launches"), os.getcwd()
    write_tiny(folder)
    os.chdir(folder)
    yield folder
    os.chdir(before)


def losses(name):
    return test_resume.losses(Path(f"out/{name}-model"))


def same_weights(a, b):
    a, b = (load_model(f"out/{name}-model")[0].state_dict() for name in (a, b))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def signalled(folder):
    """What the ranks noted of runs of DDP and FSDP: stopped in step 8 by a signal to rank 1, the same again, and one
    that nothing stopped."""
    runs = []
    for mode in ("ddp", "fsdp"):
        stopped, whole = (command(f"{name}-{mode}", 2, fsdp=mode == "fsdp", **SHORT) for name in ("stopped", "whole"))
        runs += [{"argv": stopped, "signal": "SIGTERM", "rank": 1, "step": 7}, {"argv": stopped}, {"argv": whole}]
    return launch(2, runs)[0]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(signalled):
    for rank in signalled:  # each began the eighth step, and finished seven
        assert [len(run["sequences"]) for run in rank] == 2 * [8, 5, 12]
        assert [run["status"] for run in rank] == 6 * [0]


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_going_on_after_a_signal_gives_the_same_bits(signalled, mode):
    assert [step for step, *_ in losses(f"stopped-{mode}")] == list(range(13))
    assert losses(f"stopped-{mode}") == losses(f"whole-{mode}") and same_weights(f"stopped-{mode}", f"whole-{mode}")


def test_a_sharded_checkpoint_is_sampled_and_exported_in_one_process(signalled):
    export("out/whole-fsdp-model", "exported")
    assert AutoModelForCausalLM.from_pretrained("exported").config.n_embd == 40
    line = [
        sys.executable,
        ROOT / "sample.py",
        "--init_from=out/whole-fsdp-model",
        "--max_new_tokens=5",
        "--prompt=def ",
    ]
    assert subprocess.run(line, capture_output=True, text=True).stdout.startswith("def ")


def test_every_mode_goes_on_from_the_checkpoint_of_any_other(monkeypatch):
    modes = [(1, {}), (2, {"fsdp": True}), (3, {"fsdp": True}), (2, {}), (4, {"fsdp": True}), (1, {})]
    original = train.train_step

    def stop_in_step_2(run, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(run, step)

    monkeypatch.setattr(train, "train_step", stop_in_step_2)
    for i, (ranks, mode) in enumerate(modes):
        argv = command("chain", ranks, **mode, max_steps=12)
        if ranks == 1:
            train.main(argv)  # the last goes to the end
        else:
            launch(ranks, [{"argv": argv, "signal": "SIGTERM", "rank": 0, "step": 2 * i + 2}])
        assert i == len(modes) - 1 or losses("chain")[-1][0] == 2 * i + 2
    monkeypatch.setattr(train, "train_step", original)
    train.main(command("unbroken", max_steps=12))
    for a, b in zip(losses("chain"), losses("unbroken"), strict=True):
        assert all(x is None or abs(x - y) <= 1e-4 * abs(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("how", "again"),
    [({"step": 5}, 8), ({"step": 99, "saving": True}, 12)],  # from the checkpoint of step 4; before there is one
    ids=["in a step", "while saving"],
)
def test_a_killed_worker_is_restarted_and_the_run_ends_with_the_same_bits(how, again):
    name = f"killed-{len(how)}"
    argv = command(name, 2, **SHORT, overwrite=True, checkpoint_interval=4)
    run = {"argv": argv, "signal": "SIGKILL", "rank": 1} | how
    noted, _ = launch(2, [run, {"argv": command(f"{name}-whole", 2, **SHORT, checkpoint_interval=4)}], max_restarts=1)
    assert [len(rank[0]["sequences"]) for rank in noted] == [again, again]
    assert losses(name) == losses(f"{name}-whole") and same_weights(name, f"{name}-whole")


def test_torchrun_passes_a_sigterm_on_and_the_same_command_finishes():
    argv = [ROOT / "train.py", *command("terminated", 2, fsdp=True, max_steps=3000, log_interval=1)]
    process = torchrun(2, *argv)
    log = Path("out/terminated-model/log.jsonl")
    deadline = time.time() + 60
    while not (log.exists() and log.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out = finish(process)[1]
    assert "stopped after step" in out
    last = checkpoint.all_steps("out/terminated-model")[-1]
    assert read_log(log.parent)[-1]["step"] == int(last.name.removeprefix("step_"))
    argv[-1:] = [argv[-1], f"--max_steps={int(last.name.removeprefix('step_')) + 2}"]
    status, out, _ = finish(torchrun(2, *argv))
    assert status == 0 and "python sample.py --init_from=out/terminated-model" in out


def test_two_agents_of_two_ranks_each_meet_over_the_network_and_again_after_one_is_killed(monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    line = [sys.executable, "-m", "torch.distributed.run", *flags, "--max-restarts=2", ROOT / "tests/launched.py"]
    argv = command("nodes", 4, fsdp=True, shard_size=2, max_steps=12)
    Path("runs.json").write_text(json.dumps([{"argv": argv, "signal": "SIGKILL", "rank": 3, "step": 8}]))
    line.append("runs.json")
    agents = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [finish(agent)[0] for agent in agents] == [0, 0]
    train.main(command("node", max_steps=12))
    assert losses("nodes")[-1] == pytest.approx(losses("node")[-1], rel=1e-4)


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "shard_size that the ranks do not fill": (
        dict(fsdp=True, shard_size=3),
        "2 processes are not a multiple of shard_size=3",
    ),
    "shards without fsdp": (dict(shard_size=2), "shard_size=2 is for --fsdp=True"),
    "float16 with fsdp": (dict(fsdp=True, dtype="float16"), "dtype=float16 is for one process and DDP"),
    "a batch that the ranks cannot share": (
        dict(total_batch_size=288, batch_size=6),
        "batch_size x block_size x processes = 6 x 16 x 2 = 192: the nearest are 192 and 384",
    ),
    "a dataset that is missing": (dict(dataset="shakespeare"), "python prepare_data.py shakespeare"),
    "more ranks than GPUs": (dict(device="cuda"), "device=cuda:0 is not there|GPUs are here, not one for each process"),
    "an unknown option": (dict(lr=1), "unknown option lr"),
}


@pytest.fixture(scope="module")
def refusals(folder):
    """One launch of all that is refused: statuses of the ranks, and the lines of stderr."""
    runs = [{"argv": command("refused", 2, **options)} for options, _ in REFUSED.values()]
    runs += [{"argv": [command("refused", 2, seed=seed) for seed in (1, 2)]}]
    ids = list(TEXT.encode())
    write_dataset(folder / "other/data/tiny", ids[:-700], ids[-600:], {"tokenizer": "byte"})
    runs += [{"argv": command("refused", 2), "folders": [".", "other"]}]
    os.makedirs(folder / "apart")
    os.symlink(folder / "data", folder / "apart/data")
    runs += [{"argv": command("apart", 2), "folders": [".", "apart"]}]
    noted, err = launch(2, runs)
    return [[runs[i]["status"] for runs in noted] for i in range(len(runs))], err


def test_every_refusal_ends_both_ranks_with_status_2_and_one_line_in_all(refusals):
    statuses, err = refusals
    assert statuses == (len(REFUSED) + 3) * [[2, 2]]
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == len(statuses)
    assert not Path("out/refused-model").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_is_wrong(refusals, name):
    assert re.search(REFUSED[name][1], refusals[1])


def test_ranks_with_different_options_are_told_which(refusals):
    assert "rank 1 has seed=2, rank 0 has seed=1: all must have the same" in refusals[1]


def test_machines_that_do_not_share_out_dir_are_told_so(refusals):
    assert "out/apart-model is not there on all machines: they must share it" in refusals[1]


def test_ranks_with_different_data_are_told_so(refusals):
    assert re.search(r"rank 1 has data=.*8980.*, rank 0 has data=.*9080.*: all must have the same", refusals[1])


def test_fsdp_without_torchrun_names_the_command(capsys):
    with pytest.raises(SystemExit):
        train.main(command("alone", fsdp=True))
    assert "torchrun --standalone --nproc_per_node=2 train.py" in capsys.readouterr().err
