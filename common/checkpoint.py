"""One checkpoint: save, verify, load. One process, DDP and FSDP write and read the same format.

    out/run/step_00000120/
        shard-*.safetensors    weights and optimizer state; each rank writes files of its own
        config.json            the record, a dict:
            step, metrics, scaler, options, model_config
            data, meta         what identifies the dataset; its meta.json, with the tokenizer
            files              size and CRC-32 of each shard
            crc32              of the rest of config.json

torch.distributed.checkpoint (DCP) writes and reads the shards. On saving, each rank writes the
parts of the tensors that it holds, and what several ranks hold is written once. On loading, each
rank reads the parts that it needs, whatever number of ranks has written them.

A checkpoint gets its final name only when all of its files are complete and flushed to disk. It is
verified before it is loaded. Nothing in it is a pickle. common/run_dir.py finds the checkpoints of
a run; docs/RELIABILITY.md says what holds after a crash, and which test shows it.
"""

import contextlib
import json
import logging
import os
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from common.errors import DamagedError, UserError, explain_malformed
from common.files import fsync, read_json, write_json

FILE_BYTES = 64e6  # size of a file, unless it holds a single, larger tensor
# Each tensor of the optimizer gets one flat name, such as state.transformer.wte.weight.exp_avg.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


# Save -----------------------------------------------------------------------------------------


def save_checkpoint(path, model, optimizer, record, group):
    """Collective. Save a checkpoint, a directory that all ranks share.

    path     its final name; until it is complete, it is PATH.part
    record   what config.json says about the run: a dict with "step", "metrics" and more

    A checkpoint that exists is not written again, but it gets the validation loss if it has none: a
    run that was stopped before an evaluation is evaluated when it resumes. So is one whose
    eval_tokens have changed.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    is_new = None  # rank 0 decides
    with group.exit_together():
        if group.rank == 0:
            is_new = not path.exists()
        if is_new:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    is_new = group.broadcast(is_new)
    if is_new:
        _write_shards(part, model, optimizer, group)
        files = _describe_files(part, group)
    with group.exit_together():
        if group.rank == 0 and is_new:
            _publish(part, path, record | {"files": files})
        elif group.rank == 0:
            _add_val_loss(part, path, record)


def _write_shards(part, model, optimizer, group):
    """Collective. Write each rank's tensors to files of its own."""
    tensors, _, _ = _training_tensors(model, optimizer)
    # save_distributed: each rank writes the shards that it holds. The writer fsyncs each file.
    writer = HuggingFaceStorageWriter(
        path=str(part), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True
    )
    with group.exit_together(), _without_process_group_warning():
        try:
            dcp.save(tensors, storage_writer=writer)
        except (CheckpointException, RuntimeError) as error:  # DCP wraps the OSError
            free = shutil.disk_usage(part).free / 1e9
            raise UserError(
                f"{part} could not be written, {free:.1f} GB are free on that disk: "
                f"{_last_line(error)}"
            ) from error


def _last_line(error):
    lines = str(error).splitlines()
    return lines[-1] if lines else type(error).__name__


def _file_indices(tensors):
    """Return {tensor name: number of its file, from 1}, for the files of this rank.

    A file has at most FILE_BYTES, or one tensor that is larger: the writer holds two copies of a
    file in memory while it writes it. Ranks may number differently: each writes its own files.
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
    """Collective. Return {file name: {"size", "crc32"}} of all shards.

    They are read back, as a rule from the system's page cache, not from the disk.
    """
    with group.exit_together():
        names = sorted(path.name for path in part.iterdir())
    # All ranks see all files only if they share the directory, on a network disk for example.
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


def _publish(part, path, record):
    """Write config.json, flush the directory to disk, and give the checkpoint its final name."""
    _write_record(part, record)
    fsync(part)
    part.replace(path)
    fsync(path.parent)


def _write_record(path, record):
    write_json(path / "config.json", {"crc32": _record_crc32(record)} | record)


def _add_val_loss(part, path, record):
    """Add the validation loss to a checkpoint that has none, or has that of other eval_tokens."""
    stored = read_record(path)
    eval_tokens = record["options"]["eval_tokens"]
    same_tokens = stored["options"]["eval_tokens"] == eval_tokens
    if "val_loss" not in record["metrics"] or ("val_loss" in stored["metrics"] and same_tokens):
        return
    options = stored["options"] | {"eval_tokens": eval_tokens}
    # The new config.json is written beside the checkpoint and moved into it. A kill while writing
    # inside it would leave a stray file, which verify_checkpoint refuses.
    part.mkdir(exist_ok=True)
    _write_record(part, stored | {"metrics": record["metrics"], "options": options})
    (part / "config.json").replace(path / "config.json")
    fsync(path)
    part.rmdir()


# Verify ---------------------------------------------------------------------------------------


def verify_checkpoint(path, rank=0, world_size=1):
    """Return the record of a checkpoint, after verifying it and the files that it lists.

    Several ranks divide the files: a damaged one is found by one of them. Raises DamagedError, or
    UserError if the checkpoint has a stray file.
    """
    path = Path(path)
    if (path / ".metadata").exists():
        raise UserError(
            f"{path} has the pickled format of the first versions of this project (.metadata), "
            "which this version does not read"
        )
    record = read_record(path)
    _verify_files(path, record["files"], rank, world_size)
    return record


def read_record(path):
    """Return the content of a checkpoint's config.json, after verifying its own checksum.

    Raises DamagedError or FileNotFoundError.
    """
    file = Path(path) / "config.json"
    if Path(path).is_dir() and not file.exists():
        raise DamagedError(f"{file} is missing")
    record = read_json(file)
    with explain_malformed(file):  # another program's JSON may have no crc32
        expected = record.pop("crc32")
    actual = _record_crc32(record)
    if actual != expected:
        raise DamagedError(f"{file} is damaged (CRC-32 {actual}, expected {expected})")
    return record


def _verify_files(path, files, rank, world_size):
    """Raise DamagedError unless the rank's part of these files is unchanged; UserError for others.

    A stray file matters too: DCP's reader takes every *.safetensors in the directory.
    """
    for name in sorted(os.listdir(path)):
        if name not in files and name != "config.json":
            raise UserError(f"{path}/{name} does not belong to the checkpoint: remove that file")
    for name, expected in list(files.items())[rank::world_size]:
        file = path / name
        if name != file.name or not file.is_file():  # rejects paths such as ../x
            raise DamagedError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise DamagedError(f"{file} has {size} bytes, expected {expected['size']}")
        if _file_crc32(file) != expected["crc32"]:
            raise DamagedError(f"{file} is damaged (CRC-32 mismatch)")


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


def load_checkpoint(path, model, optimizer=None, group=None):
    """Load a checkpoint into a model, and its optimizer, in place.

    Collective with an optimizer and, if there are several ranks, their group; without them a rank
    may load a model by itself. The caller has called verify_checkpoint. Raises DamagedError if the
    files do not hold the tensors that the model needs.
    """
    together = group.exit_together if group else contextlib.nullcontext
    reader = HuggingFaceStorageReader(str(path))
    with together():  # a block of its own: if one rank fails, no rank enters DCP's collectives
        _check_headers(reader, path)
    with together(), _without_process_group_warning(), _explain_load_failure(path):
        if optimizer is None:
            tensors = _with_prefix("model", model.state_dict())  # the model's own tensors
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        else:
            tensors, model_state, optimizer_state = _training_tensors(model, optimizer)
            dcp.load(tensors, storage_reader=reader)
            # The two state dicts of get_state_dict are filled now. It does not promise that they
            # hold the model's and the optimizer's own tensors, so copy them there.
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
    rest of the optimizer state (param_groups) follows from the options.

    An optimizer that has not taken a step has no state yet. get_state_dict creates it, by a step
    with zero gradients and a learning rate of 0, which changes no weight.
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

    dcp.load reads them again, but would log this error with a traceback.
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
    """Raise DamagedError for what DCP raises, and keep DCP from logging its traceback."""

    def drop(log_record):  # DCP logs with the root logger itself, which nothing else does meanwhile
        return False

    logging.getLogger().addFilter(drop)
    try:
        yield
    except (CheckpointException, FileNotFoundError) as error:
        raise DamagedError(f"{path} failed to load: {_last_line(error)}") from error
    finally:
        logging.getLogger().removeFilter(drop)


@contextlib.contextmanager
def _without_process_group_warning():
    """Silence DCP's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        message = ".*torch.distributed is (disabled|unavailable).*"
        warnings.filterwarnings("ignore", message=message)
        yield
