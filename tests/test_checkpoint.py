"""common/checkpoint.py: complete or absent, verified, without pickle; the last and the best are kept."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from safetensors.torch import load_file

import train
from common import checkpoint
from common.errors import UserError
from common.optimizer import make_optimizer
from common.pretrained import load_model

ROOT = Path(train.__file__).parent


def damaged(run):
    """The message with which the last checkpoint of a run is refused."""
    with pytest.raises(UserError) as refusal:
        checkpoint.read_config(checkpoint.list_checkpoints(run)[-1])
    return str(refusal.value)


def test_the_last_two_and_the_best_are_kept(workdir, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5, 4.6])  # at steps 0, 3, 6, 9, 12
    monkeypatch.setattr(train, "evaluate", lambda run: next(losses))
    train.main(arguments(eval_interval=3, checkpoint_interval=2))
    run = workdir / "out/tiny"
    assert [path.name[-2:] for path in checkpoint.list_checkpoints(run)] == ["03", "10", "12"]
    assert json.loads((run / "best.json").read_text()) == {
        "checkpoint": "step_00000003",
        "val_loss": 3.0,
    }
    assert checkpoint.find_checkpoint(run).name == "step_00000003"


def test_without_an_evaluation_that_improves_the_last_is_found(workdir, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda run: None)
    train.main(arguments())
    assert checkpoint.find_checkpoint(workdir / "out/tiny").name == "step_00000012"


def test_a_step_directory_is_found_as_itself(tiny_run):
    step = checkpoint.list_checkpoints(tiny_run)[0]
    assert checkpoint.find_checkpoint(step) == step


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find_checkpoint(tmp_path)


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def test_a_checkpoint_is_safetensors_and_json(tiny_run):
    for path in checkpoint.list_checkpoints(tiny_run):
        assert sorted(file.name for file in path.iterdir()) == ["config.json", SHARD]
        tensors = load_file(path / SHARD)
        assert tensors["model.transformer.h.0.attn.c_attn.weight"].shape == (48, 16)
        assert tensors["optimizer.state.transformer.h.0.attn.c_attn.weight.exp_avg_sq"].shape == (
            48,
            16,
        )


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_missing_file_is_refused_by_its_name(tiny_run, name):
    (checkpoint.list_checkpoints(tiny_run)[-1] / name).unlink()
    assert name in damaged(tiny_run)


@pytest.mark.parametrize(
    "name", ["shard-00002-model-00001-of-00001.safetensors", "notes.txt", ".hidden.safetensors"]
)
def test_an_extra_file_is_refused_by_its_name(tiny_run, name):
    path = checkpoint.list_checkpoints(tiny_run)[-1]
    shutil.copyfile(path / SHARD, path / name)
    assert name in damaged(tiny_run)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_one_flipped_bit_is_refused(tiny_run, name, place):
    file = checkpoint.list_checkpoints(tiny_run)[-1] / name
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    assert name in damaged(tiny_run)


CHANGES = {
    "another step": lambda config: config | {"step": 11},
    "another shape": lambda config: (
        config | {"model_config": config["model_config"] | {"n_layer": 3}}
    ),
    "no files": lambda config: config | {"files": {}},
    "a list": lambda config: [config],
    "a number": lambda config: 7,
    "no checksum": lambda config: {key: value for key, value in config.items() if key != "crc32"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_json_that_was_edited_is_refused(tiny_run, change):
    file = checkpoint.list_checkpoints(tiny_run)[-1] / "config.json"
    file.write_text(json.dumps(CHANGES[change](json.loads(file.read_text()))))
    assert "config.json" in damaged(tiny_run)


def test_the_layout_of_config_json_does_not_matter(tiny_run):
    path = checkpoint.list_checkpoints(tiny_run)[-1]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config, indent=8, sort_keys=True))
    assert checkpoint.read_config(path) | {"crc32": config["crc32"]} == config


def test_a_checkpoint_with_a_pickle_is_refused_before_it_is_opened(tiny_run, workdir):
    path = tiny_run / "step_00000012"

    class Bomb:
        def __reduce__(self):
            return open, (str(workdir / "exploded"), "w")

    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    assert checkpoint.LAST_PICKLE_COMMIT in damaged(tiny_run)
    with pytest.raises(UserError):
        load_model(str(path))
    assert not (workdir / "exploded").exists()


def test_files_and_directory_are_on_disk_before_the_checkpoint_gets_its_name(workdir, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace

    def noting_fsync(descriptor):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noting_replace(path, target):
        if path.is_dir():
            events.append(f"rename to {target}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    train.main(arguments(max_steps=1, eval_interval=100))
    part = "out/tiny/step_00000001.part"
    before = events[: events.index("rename to out/tiny/step_00000001")]
    assert {f"{part}/{SHARD}", f"{part}/config.json.part", part} <= set(before)
    assert before[-1] == part  # after the files in it
    assert events[len(before) + 1] == "out/tiny"


PEAK = """
import re, sys
from pathlib import Path
import train
from common import checkpoint
from common.distributed import ProcessGroup
from common.optimizer import make_optimizer

module = train.model_module("model")
n_layer, n_embd, checkpoint.FILE_BYTES = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
model = module.GPT(module.GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd))
optimizer = make_optimizer(model, train.TrainConfig())
checkpoint.get_state_dict(model, optimizer)  # makes the optimizer's state


def memory(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])


before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
checkpoint.save_checkpoint("saved", model, optimizer, {"step": 1, "metrics": {}}, 1, ProcessGroup(60))
print(sum(3 * p.nbytes for p in model.parameters()), memory("VmHWM") - before)
"""


def save_memory(n_layer, n_embd, file_bytes):
    """Bytes of a GPT-2's state, and those by which the memory of a process grows while it saves it."""
    command = [sys.executable, "-c", PEAK, str(n_layer), str(n_embd), str(file_bytes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return [
        int(number)
        for number in subprocess.check_output(command, env=environment, text=True).split()
    ]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc"
)
def test_saving_takes_the_memory_of_two_files_not_of_the_state(workdir):
    state, extra = save_memory(n_layer=4, n_embd=384, file_bytes=8e6)
    largest = 50257 * 384 * 4  # the embedding, which is a file of its own
    assert state > 3.9 * largest
    assert extra < 2.3 * largest


def test_after_removing_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(tiny_run, workdir):
    reference = [(r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_log(tiny_run)]
    shutil.rmtree(tiny_run / "step_00000012")
    train.main(arguments())
    assert [
        (r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_log(tiny_run)
    ] == reference


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_cleared_away(tiny_run):
    left = tiny_run / "step_00000014.part"
    left.mkdir()
    (left / SHARD).write_bytes(b"half")
    assert checkpoint.list_checkpoints(tiny_run)[-1].name == "step_00000012"
    train.main(arguments(max_steps=14))
    assert not left.exists() and checkpoint.list_checkpoints(tiny_run)[-1].name == "step_00000014"


def test_names_are_plain_also_after_compilation(tiny_run, workdir, monkeypatch):
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_for_real(model, backend="eager"))
    train.main(arguments(out_dir="out/compiled", compile=True, max_steps=1))

    def names(run):
        return set(load_file(checkpoint.list_checkpoints(run)[-1] / SHARD))

    assert names(workdir / "out/compiled") == names(tiny_run)
    assert "model.transformer.h.0.attn.c_attn.weight" in names(tiny_run)


def test_a_loaded_optimizer_is_the_saved_one(tiny_run):
    about = checkpoint.read_config(tiny_run / "step_00000012")
    module = train.model_module("model")
    model = module.GPT(module.GPTConfig(**about["model_config"]))
    optimizer = make_optimizer(model, train.TrainConfig())
    checkpoint.load_checkpoint(tiny_run / "step_00000012", model, optimizer)
    states = list(optimizer.state.values())
    assert len(states) == len(list(model.parameters()))
    assert all(state["step"] == 12 and state["exp_avg_sq"].max() > 0 for state in states)


def test_a_save_killed_at_any_point_leaves_the_previous_checkpoint_loadable(workdir):
    root = ROOT
    options = arguments(max_steps=100000, checkpoint_interval=1, eval_interval=10**6, n_embd=64)
    for delay in (0.0, 0.05, 0.1):
        process = subprocess.Popen(
            [sys.executable, root / "train.py", *options], stdout=subprocess.DEVNULL
        )
        try:
            run, limit = workdir / "out/tiny", time.monotonic() + 60
            before = len(read_log(run)) if (run / "log.jsonl").exists() else 0
            while time.monotonic() < limit:
                time.sleep(0.02)
                if (run / "log.jsonl").exists() and len(
                    (run / "log.jsonl").read_text().splitlines()
                ) > before + 3:
                    break
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        last = checkpoint.list_checkpoints(run)[-1]
        about = checkpoint.read_config(last)
        module = train.model_module("model")
        model = module.GPT(module.GPTConfig(**about["model_config"]))
        checkpoint.load_checkpoint(last, model)
        assert f"step_{about['step']:08d}" == last.name
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_disk_without_room_is_one_line_and_the_checkpoints_before_remain(tiny_run):
    script = "ulimit -f 30; exec " + " ".join(
        map(str, [sys.executable, ROOT / "train.py", *arguments(max_steps=13)])
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "step_00000013.part" in done.stderr and "GB" in done.stderr
    assert load_model(str(tiny_run))
