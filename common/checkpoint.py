"""Checkpoints: save, find, verify, load. One process, DDP and FSDP write and read the same format.

    out/run/step_00000120/
        shard-*.safetensors    model and optimizer state; each rank writes files of its own,
                               by torch.distributed.checkpoint
        config.json            the record of the checkpoint: step, metrics, scaler, options,
                               model_config, data, meta (which names the tokenizer); files: the
                               size and CRC-32 of each shard; crc32: of the rest of config.json

A checkpoint appears under its final name only when it is complete and on disk. Before it is used,
its list of files, their sizes and their checksums are verified. Nothing in it is a pickle. The best
checkpoint of a run is the one whose metrics have the lowest validation loss.

docs/RELIABILITY.md says what holds after a crash, and which test shows it.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import sys
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

from common.errors import DamagedError, UserError
from common.files import (
    fsync,
    lock,
    name_in_errors,
    parse_json,
    read_json,
    read_text,
    remove_directory,
    remove_tree,
    write_json,
)
from common.tokenizer import META_SHAPE

CHECKPOINT_GLOB = "step_" + 8 * "[0-9]"  # of complete checkpoints
DAMAGED_GLOB = CHECKPOINT_GLOB + ".damaged*"
FILE_BYTES = 64e6  # size of a file, unless it holds a single, larger tensor
LAST_PICKLE_COMMIT = "5e9f7b2"  # the last commit that reads checkpoints with a .metadata pickle
# What config.json must hold; see common.files.parse_json.
RECORD_SHAPE = {
    "crc32": str,
    "step": int,
    "metrics": {"seconds": float, "val_loss?": float},
    "scaler": dict,
    "options": {"model": str, "init_from": str},
    "model_config": dict,
    "data": {"tokens": [int]},
    "meta": META_SHAPE,
    "files": {"*": {"size": int, "crc32": str}},
}
# Each tensor of the optimizer gets one flat name, such as state.transformer.wte.weight.exp_avg.
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


def save_checkpoint(out_dir, model, optimizer, record, keep, group):
    """Collective. Save the checkpoint of record["step"]; prune older ones.

    If the step has a checkpoint already, it gets the validation loss if it has none: a run that
    stopped before an evaluation is evaluated when it resumes. Each rank writes its own shards; no
    rank gathers the full model. What several ranks hold, as under DDP, is written once.

    record   what config.json says about the run: a dict with "step", "metrics" and more
    keep     how many of the last checkpoints to keep, besides the best
    """
    final = Path(out_dir) / f"step_{record['step']:08d}"
    part = final.with_name(final.name + ".part")
    log = Path(out_dir) / "log.jsonl"
    with group.exit_together():
        if group.rank == 0 and log.exists():
            fsync(log)  # a checkpoint on disk has its log on disk
        if group.rank == 0 and not final.exists():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    is_new = group.broadcast(not final.exists())
    if is_new:
        _write_shards(part, model, optimizer, group)
        files = _describe_files(part, group)
    with group.exit_together():
        if group.rank == 0:
            if is_new:
                _publish(part, final, record | {"files": files})
            else:
                _add_val_loss(part, final, record["metrics"])
            prune_checkpoints(out_dir, keep)


def _write_shards(part, model, optimizer, group):
    """Collective. Write each rank's tensors to files of its own, by DCP's writer without pickle.

    save_distributed=True lets each rank write its shards; the writer fsyncs each file.
    """
    tensors, _, _ = _training_tensors(model, optimizer)
    writer = HuggingFaceStorageWriter(
        path=str(part), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True
    )
    with group.exit_together(), _without_process_group_warning():
        try:
            dcp.save(tensors, storage_writer=writer)
        except (CheckpointException, RuntimeError) as error:  # DCP wraps the OSError
            free = shutil.disk_usage(part).free / 1e9
            reason = _last_line(error)
            raise UserError(
                f"{part} could not be written, {free:.1f} GB are free on that disk: {reason}"
            ) from error


def _last_line(error):
    lines = str(error).splitlines()
    return lines[-1] if lines else type(error).__name__


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


def _publish(part, final, record):
    """Write config.json, flush the directory to disk, and give the checkpoint its final name."""
    _write_record(part, record)
    fsync(part)
    part.replace(final)
    fsync(final.parent)


def _write_record(path, record):
    write_json(path / "config.json", {"crc32": _record_crc32(record)} | record)


def _add_val_loss(part, final, metrics):
    """Replace the record of a checkpoint that a stop signal let save before its evaluation."""
    stored = read_record(final)
    if "val_loss" not in metrics or "val_loss" in stored["metrics"]:
        return
    record = stored | {"metrics": metrics}
    part.mkdir()  # not in the checkpoint, where a reader would take it for a foreign file
    _write_record(part, record)
    (part / "config.json").replace(final / "config.json")
    fsync(final)
    part.rmdir()


def prune_checkpoints(out_dir, keep):
    """Delete all checkpoints but the last `keep`, the best, and those with a damaged record."""
    best, _ = best_checkpoint(out_dir)
    for path in list_checkpoints(out_dir)[:-keep]:
        if path != best and _is_readable(path):
            remove_directory(path)


def remove_run(out_dir):
    """Delete the run in out_dir: its checkpoints and log.jsonl. Other files stay.

    The newest checkpoint goes last: if this is interrupted, what is left is an earlier state of the
    run, which can still be resumed or removed.
    """
    for path in list_checkpoints(out_dir):
        remove_directory(path)
    for path in list(Path(out_dir).glob(DAMAGED_GLOB)):
        remove_directory(path)
    Path(out_dir, "log.jsonl").unlink(missing_ok=True)


def remove_unfinished(out_dir):
    """Delete what an interrupted call has left in out_dir.

    save_checkpoint leaves NAME.part, remove_directory NAME.deleting, and truncate_log log.part.
    """
    for suffix in (".part", ".deleting", ".damaged*.deleting"):
        for path in list(Path(out_dir).glob(CHECKPOINT_GLOB + suffix)):
            remove_tree(path)
    Path(out_dir, "log.part").unlink(missing_ok=True)


# Find -----------------------------------------------------------------------------------------


def list_checkpoints(out_dir):
    """Return the paths of a run's complete checkpoints, oldest first."""
    return sorted(Path(out_dir).glob(CHECKPOINT_GLOB))


def best_checkpoint(out_dir, on_damaged=None):
    """Return the path and the loss of the checkpoint with the lowest validation loss.

    on_damaged   called with the path and the error of each checkpoint whose loss cannot be read

    The loss is in nats per token. Without an evaluated checkpoint: (None, infinity). Only
    config.json is verified here; where it is damaged, the checkpoint is passed over.
    """
    best, best_loss = None, math.inf
    for path in list_checkpoints(out_dir):
        try:
            loss = read_record(path)["metrics"].get("val_loss", math.inf)
        except (DamagedError, FileNotFoundError) as error:
            if on_damaged is not None:
                on_damaged(path, error)
            continue
        if loss < best_loss:
            best, best_loss = path, loss
    return best, best_loss


def _is_readable(path):
    """Return whether the config.json of a checkpoint is there and undamaged."""
    with contextlib.suppress(DamagedError, FileNotFoundError):
        read_record(path)
        return True
    return False


def checkpoint_to_resume(out_dir, rename_damaged):
    """Return the path and the record of a run's last checkpoint, (None, None) if it has none.

    A damaged checkpoint is reported on stderr, renamed if `rename_damaged`, and the one before it
    is taken. Raises UserError if all are damaged: a new run would overwrite what can be saved.
    """
    for path in reversed(list_checkpoints(out_dir)):
        try:
            return path, verify_checkpoint(path)
        except FileNotFoundError:  # with eval_only: deleted by a process that trains
            continue
        except DamagedError as error:
            action = "not used"
            if rename_damaged:
                action = f"renamed to {_rename_damaged(path).name}"
            print(f"warning: {error}; {path.name} is {action}", file=sys.stderr)
    if list(Path(out_dir).glob(CHECKPOINT_GLOB)) + list(Path(out_dir).glob(DAMAGED_GLOB)):
        raise UserError(
            f"{out_dir} has damaged checkpoints only: --overwrite=True deletes them and starts over"
        )
    return None, None


def _rename_damaged(path):
    """Rename a checkpoint to NAME.damaged, or NAME.damaged2 and so on; return the new path."""
    number, target = 1, path.with_name(path.name + ".damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    path.replace(target)
    return target


def load_best(directory, load):
    """Call load(path, record) for a checkpoint and return its result.

    The checkpoint is `directory` itself or, if that is a run, its best one, or its newest one if
    none was evaluated. A run may be training: if a checkpoint disappears, the search starts again.
    A damaged one is reported on stderr, and the next one is taken.
    """
    directory = Path(directory)
    if (directory / "config.json").exists() or (directory / ".metadata").exists():
        return load(directory, verify_checkpoint(directory))
    failed = set()

    def report(path, error):
        if path.exists() and path not in failed:
            print(f"warning: {error}; {path.name} is not used", file=sys.stderr)
        failed.add(path)

    while True:
        best, _ = best_checkpoint(directory, on_damaged=report)
        newest_first = list(reversed(list_checkpoints(directory)))
        paths = [path for path in (best, *newest_first) if path is not None and path not in failed]
        if not paths:
            break
        try:
            return load(paths[0], verify_checkpoint(paths[0]))
        except (DamagedError, FileNotFoundError) as error:
            report(paths[0], error)
    if failed:
        raise UserError(f"{directory} has no undamaged checkpoint")
    raise UserError(f"{directory} has no checkpoint, and no config.json of a transformers model")


# Verify ---------------------------------------------------------------------------------------


def verify_checkpoint(path):
    """Return the record of a checkpoint, after verifying it and the files that it lists.

    Raises DamagedError, or UserError if the checkpoint has the old, pickled format or a file that
    does not belong to it.
    """
    path = Path(path)
    if (path / ".metadata").exists():
        raise UserError(
            f"{path} has a .metadata pickle, which this version does not read: the last commit "
            f"that does is {LAST_PICKLE_COMMIT} (git checkout {LAST_PICKLE_COMMIT})"
        )
    record = read_record(path)
    _verify_files(path, record["files"])
    return record


def read_record(path):
    """Return the content of a checkpoint's config.json, after verifying its own checksum.

    Raises DamagedError or FileNotFoundError.
    """
    file = Path(path) / "config.json"
    if Path(path).is_dir() and not file.exists():
        raise DamagedError(f"{file} is missing")
    record = read_json(file, RECORD_SHAPE)
    expected = record.pop("crc32")
    actual = _record_crc32(record)
    if actual != expected:
        raise DamagedError(f"{file} is damaged (CRC-32 {actual}, expected {expected})")
    return record


def _verify_files(path, files):
    """Raise DamagedError unless the checkpoint has these files, unchanged; UserError for others.

    An extra file matters too: DCP's reader takes every *.safetensors in the directory.
    """
    for name in sorted(os.listdir(path)):
        if name not in files and name != "config.json":
            raise UserError(f"{path}/{name} does not belong to the checkpoint: remove that file")
    for name, expected in files.items():
        file = path / name
        if name != file.name or not file.is_file():  # a name such as ../x is none of its files
            raise DamagedError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{file} has {size} bytes, expected {expected['size']}")
        if _file_crc32(file) != expected["crc32"]:
            raise DamagedError(f"{file} is damaged (CRC-32 mismatch)")


def check_same_options(now, stored, out_dir):
    """Raise UserError if the run in out_dir was started with other options or another model.

    now, stored   dicts with "options" and "model_config": of this command, of the checkpoint
    """
    options_before = stored["options"] | stored["model_config"]
    options_now = now["options"] | now["model_config"]
    changes = [
        f"{name} was {options_before.get(name)}, is {value}"
        for name, value in options_now.items()
        if name not in RESUMABLE_CHANGES and options_before.get(name) != value
    ]
    if changes:
        _refuse_other_run(out_dir, "; ".join(changes))


def check_same_data(data, stored, out_dir, folder):
    """Raise UserError if the dataset of the run in out_dir, in `folder`, has changed."""
    if data != stored["data"]:
        before = stored["data"]["tokens"]
        now = data["tokens"]
        if now == before:
            _refuse_other_run(out_dir, f"the SHA-256 in {folder}/meta.json has changed")
        _refuse_other_run(out_dir, f"{folder} had {before} tokens [train.bin, val.bin], has {now}")


def _refuse_other_run(out_dir, difference):
    raise UserError(
        f"{out_dir} holds another run ({difference}): choose another --out_dir, or start over "
        "with --overwrite=True"
    )


def _record_crc32(record):
    """Return the CRC-32 of a record as canonical JSON, independent of its layout in the file."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
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

    Call verify_checkpoint first. Any mode and world size can load what another one saved.
    Collective with an optimizer; without one, a rank may load a model by itself. Raises
    DamagedError if the files do not hold the tensors that the model needs.
    """
    reader = HuggingFaceStorageReader(str(path))
    _check_headers(reader, path)
    with _without_process_group_warning(), _explain_load_failure(path):
        if optimizer is None:
            tensors = _with_prefix("model", model.state_dict())
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        else:
            tensors, model_state, optimizer_state = _training_tensors(model, optimizer)
            dcp.load(tensors, storage_reader=reader)
            # dcp.load has filled the tensors of both state dicts in place. They may be those of the
            # model and the optimizer, but DCP does not promise it: set_state_dict copies them.
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


def _check_headers(reader, path):
    """Raise DamagedError if the headers of the shards are not what DCP writes.

    DCP reads them again, and would log this error with a traceback.
    """
    try:
        reader.read_metadata()
    except Exception as error:  # of safetensors, or of DCP's code that meets other fields
        reason = " ".join(str(error).split())
        raise DamagedError(
            f"{path} failed to load: {type(error).__name__} in a shard: {reason}"
        ) from error


@contextlib.contextmanager
def _explain_load_failure(path):
    """Raise DamagedError for what DCP raises; DCP's own report, a traceback, is not logged."""

    def is_not_of_dcp(record):
        return record.module != "state_dict_loader"

    logging.getLogger().addFilter(is_not_of_dcp)  # DCP logs to the root logger
    try:
        yield
    except (CheckpointException, FileNotFoundError) as error:
        reason = _last_line(error)
        raise DamagedError(f"{path} failed to load: {reason}") from error
    finally:
        logging.getLogger().removeFilter(is_not_of_dcp)


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

    Damaged lines, such as one that a crash cut short, are removed too, and reported on stderr.
    """
    path = Path(out_dir) / "log.jsonl"
    if not path.exists():
        return
    kept, damaged = [], []
    for number, line in enumerate(read_text(path, errors="replace").split("\n"), 1):
        if not line:
            continue
        try:
            if parse_json(line, {"step": int}, path)["step"] < step:
                kept.append(line + "\n")
        except DamagedError:
            damaged.append(str(number))
    if damaged:
        print(f"warning: {path}: removed damaged line {', '.join(damaged)}", file=sys.stderr)
    part = path.with_suffix(".part")
    with name_in_errors(part):
        part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)


def lock_run(out_dir):
    """Return a context manager that locks a run's directory, and makes it if need be.

    It raises UserError if another process is training in it.
    """

    def refuse():
        raise UserError(f"another process is training in {out_dir}: choose another --out_dir")

    return lock(Path(out_dir) / ".lock", on_busy=refuse)
