"""What tests of several files do with runs of train.py in this process, and read from them."""

import json
import signal
from pathlib import Path

import torch
from conftest import arguments, read_log
from safetensors.torch import load_file

import train
from common import run_dir
from common.pretrained import load_model

TIMES = {"seconds", "tokens_per_second", "mfu", "memory_gb"}  # differ between equal runs
RUN = Path("out/tiny")


def train_call(**options):
    return lambda: train.main(arguments(**options))


def result_of(run):
    """Return all that a run left, without times: names, log, checkpoints and the best of them."""
    records, tensors = {}, {}
    for path in run.glob("step_*"):
        record = json.loads((path / "config.json").read_text())
        del record["crc32"], record["files"]  # of the times
        record["metrics"] = without_times(record["metrics"])
        records[path.name] = record
        for file in path.glob("*.safetensors"):
            for name, tensor in load_file(file).items():
                tensors[f"{path.name}/{file.name}/{name}"] = tensor.numpy().tobytes()
    log = (run / "log.jsonl").read_text().splitlines()
    return {
        "names": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "log": [without_times(json.loads(line)) for line in log],
        "records": records,
        "tensors": tensors,
        "best": run_dir.best_checkpoint(run)[0].name,
    }


def without_times(metrics):
    return {key: value for key, value in metrics.items() if key not in TIMES}


def losses(run):
    """Return (step, train_loss, grad_norm, val_loss) for each line of a run's log."""
    return [
        (r["step"], r.get("train_loss"), r.get("grad_norm"), r.get("val_loss"))
        for r in read_log(run)
    ]


def stop_in_step(step, argv):
    """Train in this process until a SIGTERM in a step, counted from 0."""
    original = train.train_step

    def signal_and_train_step(run):
        if run.step == step:
            signal.raise_signal(signal.SIGTERM)
        return original(run)

    train.train_step = signal_and_train_step
    try:
        train.main(argv)
    finally:
        train.train_step = original


def weights(run):
    """Return the weights of the last checkpoint of a run."""
    return load_model(str(run_dir.list_checkpoints(run)[-1]))[0].state_dict()


def same_weights(run, other):
    """Return whether the last checkpoints of two runs have the same weights, bit for bit."""
    expected = weights(other)
    return all(torch.equal(weight, expected[name]) for name, weight in weights(run).items())
