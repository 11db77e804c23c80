"""Checkpoints: save, find, verify, load. One process, DDP and FSDP write and read the same format.

    out/run/step_00000120/
        shard-*.safetensors    model and optimizer state; each rank writes files of its own,
                               by torch.distributed.checkpoint
        config.json            step, metrics, scaler, options, model_config, data, meta (which
                               names the tokenizer); files: the size and CRC-32 of each shard;
                               crc32: of the rest of config.json
    out/run/best.json          names the checkpoint with the lowest validation loss

A checkpoint appears under its final name only when it is complete and on disk. Before it is used,
its list of files, their sizes and their checksums are verified. Nothing in it is a pickle.
"""

import contextlib
import json
import math
import os
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from common.errors import UserError
from common.files import fsync_directory, write_json

CHECKPOINT_GLOB = "step_" + 8 * "[0-9]"  # of complete checkpoints
FILE_BYTES = 64e6  # size of a file, unless it holds a single, larger tensor
LAST_PICKLE_COMMIT = "5e9f7b2"  # the last commit that reads checkpoints with a .metadata pickle
# One flat name per tensor, such as state.transformer.wte.weight.exp_avg.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

# Options that may differ when a run is resumed: they say at which steps something is saved or
# printed, or how the same global batch is computed. The results stay equal up to rounding, with two
# exceptions: max_steps stretches the learning rate schedule, and with dropout > 0 the masks depend
# on the rank and on batch_size. dtype may not differ: if "auto" would now choose another one, pass
# the first one by --dtype.
RESUMABLE_CHANGES = {
    "out_dir",
    "overwrite",
    "eval_only",
    "batch_size",
    "max_steps",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
    "device",
    "compile",
    "activation_checkpointing",
    "deterministic",
    "fsdp",
    "shard_degree",
    "dist_timeout",
}


# Save -----------------------------------------------------------------------------------------


def save_checkpoint(out_dir, model, optimizer, config, keep, group):
    """Collective. Save the checkpoint of config["step"] unless it exists; prune older ones.

    Each rank writes its own shards; no rank gathers the full model. What several ranks hold, as
    under DDP, is written once.

    config   what config.json says about the run: a dict with "step", "metrics" and more
    keep     how many of the last checkpoints to keep, besides the best
    """
    final = Path(out_dir) / f"step_{config['step']:08d}"
    part = final.with_name(final.name + ".part")
    with group.exit_together():
        if group.rank == 0:
            _remove_unfinished(out_dir)
            if not final.exists():
                part.mkdir(parents=True)
    is_new = group.broadcast(part.exists())  # rank 0 has made `part` if the checkpoint is new
    if is_new:
        _write_shards(part, model, optimizer, group)
        files = _describe_files(part, group)
    with group.exit_together():
        if group.rank == 0:
            if is_new:
                _publish(part, final, config | {"files": files})
            _update_best(out_dir, final.name, config["metrics"])
            prune_checkpoints(out_dir, keep)


def _remove_unfinished(out_dir):
    for part in Path(out_dir).glob(CHECKPOINT_GLOB + ".part"):
        shutil.rmtree(part)


def _write_shards(part, model, optimizer, group):
    """Collective. Write each rank's tensors to files of its own; the writer fsyncs each file."""
    tensors, _, _ = _training_tensors(model, optimizer)
    writer = HuggingFaceStorageWriter(
        path=str(part), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True
    )
    with group.exit_together(), _without_process_group_warning():
        try:
            dcp.save(tensors, storage_writer=writer)
        except (CheckpointException, RuntimeError) as error:  # DCP wraps the OSError
            free = shutil.disk_usage(part).free / 1e9
            reason = str(error).splitlines()[-1]
            raise UserError(
                f"{part} could not be written, {free:.1f} GB are free on that disk: {reason}"
            ) from error


def _file_indices(tensors):
    """Return {tensor name: number of its file, from 1}.

    On each rank a file has at most FILE_BYTES, or one tensor that is larger: the writer holds two
    copies of a file in memory while it writes it.
    """
    indices, index, size = {}, 1, 0
    for name, tensor in tensors.items():
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if size > 0 and size + shard.nbytes > FILE_BYTES:
            index, size = index + 1, 0
        indices[name] = index
        size += shard.nbytes
    return indices


def _describe_files(part, group):
    """Collective. Return {file name: {"size", "crc32"}} of all shards, read back from the disk."""
    with group.exit_together():
        names = sorted(path.name for path in part.iterdir())
    names_of_ranks = group.all_gather(names)
    if any(others != names_of_ranks[0] for others in names_of_ranks):
        group.exit(f"{part} has different files on different ranks: out_dir must be shared by all")
    with group.exit_together():
        files = {}
        for name in names[group.rank :: group.world_size]:  # the ranks divide the reading
            path = part / name
            files[name] = {"size": path.stat().st_size, "crc32": _file_crc32(path)}
    all_files = {}
    for files_of_rank in group.all_gather(files):
        all_files |= files_of_rank
    return all_files


def _publish(part, final, config):
    """Write config.json, flush the directory to disk, and give the checkpoint its final name."""
    write_json(part / "config.json", {"crc32": _config_crc32(config)} | config)
    fsync_directory(part)
    part.replace(final)
    fsync_directory(final.parent)


def _update_best(out_dir, name, metrics):
    val_loss = metrics.get("val_loss", math.inf)
    if val_loss < best_loss(out_dir):
        write_json(Path(out_dir) / "best.json", {"checkpoint": name, "val_loss": val_loss})


def prune_checkpoints(out_dir, keep):
    """Delete all checkpoints but the last `keep` and the best."""
    best = _read_best(out_dir).get("checkpoint")
    for path in list_checkpoints(out_dir)[:-keep]:
        if path.name != best:
            shutil.rmtree(path)


def remove_run(out_dir):
    """Delete the run in out_dir: its checkpoints, best.json and log.jsonl. Other files stay."""
    for path in list_checkpoints(out_dir):
        shutil.rmtree(path)
    for name in ("best.json", "log.jsonl"):
        Path(out_dir, name).unlink(missing_ok=True)


# Find -----------------------------------------------------------------------------------------


def list_checkpoints(out_dir):
    """Return the paths of a run's complete checkpoints, oldest first."""
    return sorted(Path(out_dir).glob(CHECKPOINT_GLOB))


def best_loss(out_dir):
    """Return the lowest validation loss of a saved checkpoint in nats per token, or infinity."""
    return _read_best(out_dir).get("val_loss", math.inf)


def _read_best(out_dir):
    """Return the content of best.json, or {} if it or the checkpoint that it names is missing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        best = json.loads((Path(out_dir) / "best.json").read_text(encoding="utf-8"))
        if (Path(out_dir) / best["checkpoint"]).exists():
            return best
    return {}


def find_checkpoint(directory):
    """Return the checkpoint to start from: the directory itself, or a run's best, or its last."""
    directory = Path(directory)
    if (directory / "config.json").exists() or (directory / ".metadata").exists():
        return directory
    checkpoints = list_checkpoints(directory)
    if not checkpoints:
        raise UserError(f"{directory} has no checkpoint")
    return directory / _read_best(directory).get("checkpoint", checkpoints[-1].name)


# Verify ---------------------------------------------------------------------------------------


def read_config(path):
    """Return the config.json of a checkpoint, after verifying it and the files that it lists.

    Raises UserError if the checkpoint is damaged or was written in the old, pickled format.
    """
    path = Path(path)
    if (path / ".metadata").exists():
        raise UserError(
            f"{path} has a .metadata pickle, which this version does not read: the last commit "
            f"that does is {LAST_PICKLE_COMMIT} (git checkout {LAST_PICKLE_COMMIT})"
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        expected = config.pop("crc32")
        actual = _config_crc32(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = type(error).__name__
        raise UserError(
            f"{path}/config.json is missing or damaged ({reason}): {_advice(path)}"
        ) from error
    if actual != expected:
        raise UserError(
            f"{path}/config.json is damaged (CRC-32 {actual}, expected {expected}): {_advice(path)}"
        )
    _verify_files(path, config["files"])
    return config


def _verify_files(path, files):
    """Raise UserError unless the checkpoint has exactly these files, unchanged.

    An extra file matters too: DCP's reader takes every *.safetensors in the directory.
    """
    for name in sorted(os.listdir(path)):
        if name not in files and name != "config.json":
            raise UserError(f"{path}/{name} does not belong to the checkpoint: remove that file")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file} is missing: {_advice(path)}")
        size = file.stat().st_size
        if size != expected["size"]:
            raise UserError(
                f"{file} has {size} bytes, expected {expected['size']}: {_advice(path)}"
            )
        if _file_crc32(file) != expected["crc32"]:
            raise UserError(f"{file} is damaged (CRC-32 mismatch): {_advice(path)}")


def _advice(path):
    return f"remove {path} to use the checkpoint before it, if there is one"


def check_same_options(config, stored, out_dir):
    """Raise UserError if the run in out_dir was started with other options or another model.

    config, stored   dicts with "options" and "model_config": of this command, of the checkpoint
    """
    before = stored["options"] | stored["model_config"]
    now = config["options"] | config["model_config"]
    changes = [
        f"{name} was {before.get(name)}, is {now[name]}"
        for name in now
        if name not in RESUMABLE_CHANGES and before.get(name) != now[name]
    ]
    if changes:
        _refuse_other_run(out_dir, "; ".join(changes))


def check_same_data(data, stored, out_dir):
    """Raise UserError if the dataset of the run in out_dir has changed."""
    if data != stored["data"]:
        before = stored["data"]["tokens"]
        now = data["tokens"]
        if now == before:
            _refuse_other_run(out_dir, "the data have the same size but another SHA-256")
        _refuse_other_run(out_dir, f"[training, validation] tokens were {before}, are {now}")


def _refuse_other_run(out_dir, difference):
    raise UserError(
        f"{out_dir} holds another run ({difference}): choose another --out_dir, or start over "
        "with --overwrite=True"
    )


def _config_crc32(config):
    """Return the CRC-32 of a config as canonical JSON, independent of its layout in the file."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=True)
    return f"{zlib.crc32(text.encode()):08x}"


def _file_crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


# Load -----------------------------------------------------------------------------------------


def load_checkpoint(path, model, optimizer=None):
    """Load a checkpoint into a model, and its optimizer, in place.

    read_config must have verified it. Any mode and world size can load what another one saved.
    Collective with an optimizer; without one, a rank may load a model by itself.
    """
    reader = HuggingFaceStorageReader(str(path))
    with _without_process_group_warning():
        if optimizer is None:
            tensors = _with_prefix("model", model.state_dict())
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        else:
            tensors, model_state, optimizer_state = _training_tensors(model, optimizer)
            dcp.load(tensors, storage_reader=reader)
            # dcp.load has filled the tensors of both state dicts in place. Those of the model are
            # its parameters; set_state_dict is needed for the optimizer.
            set_state_dict(
                model,
                optimizer,
                model_state_dict=model_state,
                optim_state_dict=optimizer_state,
                options=FLAT,
            )


def _training_tensors(model, optimizer):
    """Collective. Return (tensors to save or load by name, model state, optimizer state).

    The tensors are those of the state dicts, not copies; under FSDP they are sharded DTensors. The
    rest of the optimizer state (param_groups) follows from the options. A new optimizer gets its
    state here: get_state_dict takes a step with zero gradients and lr = 0, which changes no weight.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FLAT)
    optimizer_tensors = {
        name: value for name, value in optimizer_state.items() if isinstance(value, torch.Tensor)
    }
    tensors = _with_prefix("model", model_state) | _with_prefix("optimizer", optimizer_tensors)
    return tensors, model_state, optimizer_state


def _with_prefix(prefix, state):
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


@contextlib.contextmanager
def _without_process_group_warning():
    """Silence DCP's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        message = ".*torch.distributed is (disabled|unavailable).*"
        warnings.filterwarnings("ignore", message=message)
        yield


# The run's directory --------------------------------------------------------------------------


def truncate_log(out_dir, step):
    """Remove the lines of log.jsonl from `step` on, which the resumed run writes again.

    A line that a crash cut short is removed too.
    """
    path = Path(out_dir) / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)


@contextlib.contextmanager
def lock_run(out_dir):
    """Lock a run's directory. Raises UserError if another process is training in it."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    directory = os.open(out_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {out_dir}: choose another --out_dir"
            ) from None
        yield
    finally:
        os.close(directory)
