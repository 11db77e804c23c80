"""Checkpoints: complete or absent, verified, without pickle; the last two and the best are kept."""

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from bomb import Bomb
from conftest import arguments
from faults import Forked, needs_fork
from runs import losses
from safetensors.torch import load_file
from save_memory import save_memory

import train
from common import checkpoint, run_dir
from common.distributed import ProcessGroup
from common.errors import DamagedError, UserError
from common.pretrained import load_model
from training.optimizer import make_optimizer

ROOT = Path(train.__file__).parent


def refusal_of_last(run):
    """Return the error that refuses the last checkpoint of a run."""
    with pytest.raises(UserError) as refusal:
        checkpoint.verify_checkpoint(run_dir.list_checkpoints(run)[-1])
    return str(refusal.value)


def loaded_name(directory):
    """Return the name of the checkpoint that sampling from a directory would load."""
    return run_dir.load_best(directory, lambda path, record: path.name)


def test_the_last_two_and_the_best_are_kept(workdir, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 4.5, 4.6])  # at steps 0, 3, 6, 9, 12
    monkeypatch.setattr(train, "evaluate", lambda run: {"val_loss": next(losses)})
    train.main(arguments(eval_interval=3, checkpoint_interval=2))
    run = workdir / "out/tiny"
    assert [path.name[-2:] for path in run_dir.list_checkpoints(run)] == ["03", "10", "12"]
    assert run_dir.best_checkpoint(run) == (run / "step_00000003", 3.0)
    assert loaded_name(run) == "step_00000003"


def test_the_last_checkpoint_is_found_if_none_was_evaluated(workdir, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda run: None)
    train.main(arguments())
    assert loaded_name(workdir / "out/tiny") == "step_00000012"


def test_a_step_directory_is_found_as_itself(tiny_run):
    step = run_dir.list_checkpoints(tiny_run)[0]
    assert loaded_name(step) == step.name


def test_a_checkpoint_that_disappears_while_it_is_loaded_is_replaced_by_the_next(tiny_run):
    expected = [run_dir.best_checkpoint(tiny_run)[0]]

    def remove_and_load(path, record):
        if path in expected:  # as a training run does that has a better one
            shutil.rmtree(path)
            raise FileNotFoundError(path)
        return path

    loaded = run_dir.load_best(tiny_run, remove_and_load)
    assert loaded.exists() and loaded not in expected


def test_a_damaged_best_checkpoint_is_reported_and_the_next_one_is_loaded(tiny_run, capsys):
    best, _ = run_dir.best_checkpoint(tiny_run)
    os.truncate(best / SHARD, 100)
    assert loaded_name(tiny_run) != best.name
    assert best.name in capsys.readouterr().err


def test_a_directory_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        loaded_name(tmp_path)


SHARD = "shard-00001-model-00001-of-00001.safetensors"


def test_a_checkpoint_is_safetensors_and_json(tiny_run):
    for path in run_dir.list_checkpoints(tiny_run):
        assert sorted(file.name for file in path.iterdir()) == ["config.json", SHARD]
        tensors = load_file(path / SHARD)
        name = "transformer.h.0.attn.c_attn.weight"
        assert tensors[f"model.{name}"].shape == (48, 16)
        assert tensors[f"optimizer.state.{name}.exp_avg_sq"].shape == (48, 16)


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_missing_file_is_refused_by_its_name(tiny_run, name):
    (run_dir.list_checkpoints(tiny_run)[-1] / name).unlink()
    assert name in refusal_of_last(tiny_run)


@pytest.mark.parametrize(
    "name", ["shard-00002-model-00001-of-00001.safetensors", "notes.txt", ".hidden.safetensors"]
)
def test_an_extra_file_is_refused_by_its_name(tiny_run, name):
    path = run_dir.list_checkpoints(tiny_run)[-1]
    shutil.copyfile(path / SHARD, path / name)
    assert name in refusal_of_last(tiny_run)


@pytest.mark.parametrize("part", range(4))
def test_one_of_the_ranks_that_divide_the_files_finds_a_damaged_one(workdir, monkeypatch, part):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 4000)
    train.main(arguments(max_steps=1))
    path = workdir / "out/tiny/step_00000001"
    file = sorted(path.glob("*.safetensors"))[part]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refusals = []
    for rank in range(3):
        try:
            checkpoint.verify_checkpoint(path, rank, 3)
        except DamagedError as error:
            refusals.append(str(error))
    assert len(refusals) == 1 and file.name in refusals[0]


class TwoRanks(ProcessGroup):
    """The group of rank 0 of two, whose rank 1 finds the last `damaged` checkpoints damaged."""

    def __init__(self, damaged):
        self.rank, self.world_size, self.launched = 0, 2, False
        self.errors = [DamagedError("of rank 1")] * damaged + [None]

    def all_gather(self, value):
        return [value, self.errors.pop(0)]

    def exit_together(self):
        return contextlib.nullcontext()


def test_a_checkpoint_that_another_rank_finds_damaged_is_renamed_and_the_one_before_it_taken(
    tiny_run, capsys
):
    paths = run_dir.list_checkpoints(tiny_run)
    path, record = run_dir.checkpoint_to_resume(tiny_run, True, TwoRanks(damaged=1))
    assert (path, record["step"]) == (paths[-2], int(paths[-2].name[-8:]))
    assert f"of rank 1; {paths[-1].name} is renamed" in capsys.readouterr().err
    assert not paths[-1].exists()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_one_flipped_bit_is_refused(tiny_run, name, fraction):
    file = run_dir.list_checkpoints(tiny_run)[-1] / name
    content = bytearray(file.read_bytes())
    content[int(fraction * len(content))] ^= 1
    file.write_bytes(content)
    assert name in refusal_of_last(tiny_run)


def with_another_shape(config):
    model_config = config["model_config"] | {"n_layer": 3}
    return config | {"model_config": model_config}


def without_checksum(config):
    return {key: value for key, value in config.items() if key != "crc32"}


CHANGES = {
    "another step": lambda config: config | {"step": 11},
    "another shape": with_another_shape,
    "no files": lambda config: config | {"files": {}},
    "a list": lambda config: [config],
    "a number": lambda config: 7,
    "no checksum": without_checksum,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_json_that_was_edited_is_refused(tiny_run, change):
    file = run_dir.list_checkpoints(tiny_run)[-1] / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(CHANGES[change](config)))
    assert "config.json" in refusal_of_last(tiny_run)


def test_whitespace_and_key_order_of_config_json_do_not_matter(tiny_run):
    path = run_dir.list_checkpoints(tiny_run)[-1]
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config, indent=8, sort_keys=True))
    assert checkpoint.verify_checkpoint(path) | {"crc32": config["crc32"]} == config


def test_a_checkpoint_with_a_pickle_is_refused_before_it_is_opened(tiny_run, workdir):
    path = tiny_run / "step_00000012"
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(str(workdir / "exploded"))))
    assert ".metadata" in refusal_of_last(tiny_run)
    with pytest.raises(UserError):
        load_model(str(path))
    assert not (workdir / "exploded").exists()


def test_files_and_directory_are_flushed_before_the_checkpoint_is_renamed(workdir, monkeypatch):
    fsync = os.fsync
    replace = Path.replace
    events = []  # the paths that are flushed, and the renames of directories

    def recording_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(os.path.relpath(path))
        fsync(descriptor)

    def recording_replace(path, target):
        if path.is_dir():
            events.append(f"rename to {target}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "replace", recording_replace)
    train.main(arguments(max_steps=1, eval_interval=100))
    part = "out/tiny/step_00000001.part"
    before = events[: events.index("rename to out/tiny/step_00000001")]
    assert {f"{part}/{SHARD}", f"{part}/config.json.part", part} <= set(before)
    assert before[-1] == part  # flushed after the files in it
    assert events[len(before) + 1] == "out/tiny"  # flushed after the rename


@needs_fork
def test_a_save_needs_the_extra_memory_of_two_files_not_of_the_state(tmp_path):
    state, extra = save_memory(tmp_path, n_layer=4, n_embd=384, file_bytes=8e6)
    largest = 50257 * 384 * 4  # the embedding, which is a file of its own
    assert state > 3.9 * largest
    assert extra < 2.3 * largest


def test_a_run_resumes_from_the_previous_checkpoint_after_the_last_is_removed(tiny_run, workdir):
    uninterrupted = losses(tiny_run)
    shutil.rmtree(tiny_run / "step_00000012")
    train.main(arguments())
    assert losses(tiny_run) == uninterrupted


def test_an_unfinished_save_is_no_checkpoint(tiny_run):
    part = tiny_run / "step_00000014.part"
    part.mkdir()
    (part / SHARD).write_bytes(b"half")
    assert run_dir.list_checkpoints(tiny_run)[-1].name == "step_00000012"


def test_an_unfinished_save_is_removed_and_replaced(tiny_run):
    part = tiny_run / "step_00000014.part"
    part.mkdir()
    (part / SHARD).write_bytes(b"half")
    train.main(arguments(max_steps=14))
    assert not part.exists()
    assert run_dir.list_checkpoints(tiny_run)[-1].name == "step_00000014"


def test_compilation_does_not_change_the_names_of_tensors(tiny_run, workdir, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, backend="eager"))
    train.main(arguments(out_dir="out/compiled", compile=True, max_steps=1))

    def names(run):
        return set(load_file(run_dir.list_checkpoints(run)[-1] / SHARD))

    assert names(workdir / "out/compiled") == names(tiny_run)
    assert "model.transformer.h.0.attn.c_attn.weight" in names(tiny_run)


def make_model(config):
    """Return a model.py model of the shape that a checkpoint's config.json records."""
    module = train.model_module("model")
    return module.GPT(module.GPTConfig(**config["model_config"]))


def test_a_loaded_optimizer_has_the_saved_state(tiny_run):
    path = tiny_run / "step_00000012"
    model = make_model(checkpoint.verify_checkpoint(path))
    optimizer = make_optimizer(model, train.TrainConfig())
    checkpoint.load_checkpoint(path, model, optimizer)
    states = list(optimizer.state.values())
    assert len(states) == len(list(model.parameters()))
    for state in states:
        assert state["step"] == 12
        assert state["exp_avg_sq"].max() > 0


class AnotherRankFails:
    """A group in which each block of exit_together ends all ranks."""

    @contextlib.contextmanager
    def exit_together(self):
        yield
        raise UserError("of another rank")


def test_no_rank_loads_a_checkpoint_of_which_another_cannot_read_the_headers(tiny_run, monkeypatch):
    path = tiny_run / "step_00000012"
    model = make_model(checkpoint.verify_checkpoint(path))
    optimizer = make_optimizer(model, train.TrainConfig())
    monkeypatch.setattr(checkpoint.dcp, "load", lambda *args, **kwargs: pytest.fail("it waits"))
    with pytest.raises(UserError, match="of another rank"):
        checkpoint.load_checkpoint(path, model, optimizer, AnotherRankFails())


@needs_fork
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_earlier_checkpoints(tiny_run, workdir):
    def train_with_small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 1024, 30 * 1024))
        train.main(arguments(max_steps=13))

    outcome = Forked(train_with_small_files, workdir).finish()
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "step_00000013.part" in outcome.err
    assert "GB" in outcome.err  # the free space
    assert load_model(str(tiny_run))
