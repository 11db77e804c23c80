"""checkpoint.py: complete or not there, verified, the last and the best kept."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import arguments, read_log
from torch.distributed.checkpoint import FileSystemReader

import checkpoint
import train
from configurator import UserError
from optimizer import make_optimizer
from pretrained import load_model

ROOT = Path(train.__file__).parent


def damaged(run):
    """The message with which the last checkpoint of a run is refused."""
    with pytest.raises(UserError) as refusal:
        checkpoint.read_config(checkpoint.all_steps(run)[-1])
    return str(refusal.value)


def test_the_last_two_and_the_best_are_kept(workdir, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5, 4.6])  # at steps 0, 3, 6, 9, 12
    monkeypatch.setattr(train, "evaluate", lambda run: next(losses))
    train.main(arguments(eval_interval=3, checkpoint_interval=2))
    run = workdir / "out/tiny"
    assert [path.name[-2:] for path in checkpoint.all_steps(run)] == ["03", "10", "12"]
    assert json.loads((run / "best.json").read_text()) == {"checkpoint": "step_00000003", "val_loss": 3.0}
    assert checkpoint.find(run).name == "step_00000003"


def test_without_an_evaluation_that_improves_the_last_is_found(workdir, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda run: None)
    train.main(arguments())
    assert checkpoint.find(workdir / "out/tiny").name == "step_00000012"


def test_a_step_directory_is_found_as_itself(tiny_run):
    step = checkpoint.all_steps(tiny_run)[0]
    assert checkpoint.find(step) == step


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("name", ["config.json", ".metadata", "__0_0.distcp"])
def test_a_missing_file_is_refused_by_its_name(tiny_run, name):
    (checkpoint.all_steps(tiny_run)[-1] / name).unlink()
    assert name in damaged(tiny_run)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_one_flipped_bit_is_refused(tiny_run, name):
    file = checkpoint.all_steps(tiny_run)[-1] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert f"{name} is not what was saved" in damaged(tiny_run)


def test_after_removing_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(tiny_run, workdir):
    reference = [(r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_log(tiny_run)]
    shutil.rmtree(tiny_run / "step_00000012")
    train.main(arguments())
    assert [(r["step"], r.get("train_loss"), r.get("val_loss")) for r in read_log(tiny_run)] == reference


def test_what_an_interrupted_save_left_is_no_checkpoint_and_is_cleared_away(tiny_run):
    left = tiny_run / "step_00000014.part"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.all_steps(tiny_run)[-1].name == "step_00000012"
    train.main(arguments(max_steps=14))
    assert not left.exists() and checkpoint.all_steps(tiny_run)[-1].name == "step_00000014"


def test_names_are_plain_also_after_compilation(tiny_run, workdir, monkeypatch):
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_for_real(model, backend="eager"))
    train.main(arguments(out_dir="out/compiled", compile=True, max_steps=1))

    def names(run):
        return set(FileSystemReader(checkpoint.all_steps(run)[-1]).read_metadata().state_dict_metadata)

    assert names(workdir / "out/compiled") == names(tiny_run)
    assert "model.transformer.h.0.attn.c_attn.weight" in names(tiny_run)


def test_a_loaded_optimizer_is_the_saved_one(tiny_run):
    about = checkpoint.read_config(tiny_run / "step_00000012")
    module = train.model_module("model")
    model = module.GPT(module.GPTConfig(**about["model_config"]))
    optimizer = make_optimizer(model, train.TrainConfig())
    checkpoint.load(tiny_run / "step_00000012", model, optimizer)
    states = list(optimizer.state.values())
    assert len(states) == len(list(model.parameters()))
    assert all(state["step"] == 12 and state["exp_avg_sq"].max() > 0 for state in states)


def test_a_save_killed_at_any_point_leaves_the_previous_checkpoint_loadable(workdir):
    root = ROOT
    options = arguments(max_steps=100000, checkpoint_interval=1, eval_interval=10**6, n_embd=64)
    for delay in (0.0, 0.05, 0.1):
        process = subprocess.Popen([sys.executable, root / "train.py", *options], stdout=subprocess.DEVNULL)
        try:
            run, limit = workdir / "out/tiny", time.monotonic() + 60
            before = len(read_log(run)) if (run / "log.jsonl").exists() else 0
            while time.monotonic() < limit:
                time.sleep(0.02)
                if (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) > before + 3:
                    break
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
        last = checkpoint.all_steps(run)[-1]
        about = checkpoint.read_config(last)
        module = train.model_module("model")
        model = module.GPT(module.GPTConfig(**about["model_config"]))
        checkpoint.load(last, model)
        assert f"step_{about['record']['step']:08d}" == last.name
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_disk_without_room_is_one_line_and_the_checkpoints_before_remain(tiny_run):
    script = "ulimit -f 30; exec " + " ".join(map(str, [sys.executable, ROOT / "train.py", *arguments(max_steps=13)]))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "step_00000013.part could not be written, " in done.stderr and "GB are free there" in done.stderr
    assert load_model(str(tiny_run))
