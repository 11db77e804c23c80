"""Checkpoints: save, find, verify, load; the same directory for every mode.

    out/run/step_00000120/    .metadata, *.distcp   model and optimizer, by torch.distributed.checkpoint
                              config.json           options, model, tokenizer, log record; size and CRC-32 of each file
    out/run/best.json         names the checkpoint with the lowest validation loss

A checkpoint exists under its name only when it is complete. Its .metadata is a pickle: trust it like code, and share
models by exporting them (pretrained.py).
"""

import contextlib
import json
import math
import os
import shutil
import warnings
import zlib
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from configurator import UserError
from tokenizer import write_json

STEP = "step_" + 8 * "[0-9]"  # names of complete checkpoints, as a pattern
# Options that may change when a run goes on: they alter rounding at most, batch_size also the dropout masks, and
# max_steps the schedule from then on.
FREE = {"out_dir", "overwrite", "eval_only", "batch_size", "max_steps", "eval_interval", "log_interval"}
FREE |= {"checkpoint_interval", "keep_checkpoints", "device", "compile", "activation_checkpointing", "deterministic"}
FREE |= {"fsdp", "shard_size", "timeout"}


def save(out_dir, model, optimizer, about, keep, ranks):
    """Write the checkpoint of a step, if it is not there, and drop all but the last `keep` and the best.

    Every rank writes its own share, and needs no memory for more.

    about   for its config.json: a dict with "record", the log record of the step, and what else belongs to the run
    """
    out_dir, record = Path(out_dir), about["record"]
    final = out_dir / f"step_{record['step']:08d}"
    part = final.with_name(final.name + ".part")
    with ranks.together():
        if ranks.rank == 0:
            for old in out_dir.glob(STEP + ".part"):  # what interrupted saves left
                shutil.rmtree(old)
            if not final.exists():
                part.mkdir(parents=True)
    if ranks.share(part.exists()):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        with ranks.together(), _one_process_is_fine():
            try:
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=part)
            except (CheckpointException, RuntimeError) as error:  # which hides the OSError behind it
                free = f"{shutil.disk_usage(part).free / 1e9:.1f} GB are free there"
                raise UserError(f"{part} could not be written, {free}: {str(error).splitlines()[-1]}") from error
        with ranks.together():
            names = sorted(path.name for path in part.iterdir())
        if any(other != names for other in ranks.gather(names)):
            ranks.fail(f"{part} does not hold the same files for all ranks: their machines must share out_dir")
        with ranks.together():
            own = [part / name for name in names[ranks.rank :: ranks.size]]  # each rank reads some of the files again
            files = {path.name: {"size": path.stat().st_size, "crc32": _crc32(path)} for path in own}
        files = {name: file for some in ranks.gather(files) for name, file in some.items()}
    with ranks.together():
        if ranks.rank == 0:
            if part.exists():
                write_json(part / "config.json", about | {"files": files})
                part.replace(final)
            _keep(out_dir, final.name, record, keep)


def _keep(out_dir, name, record, keep):
    """Note the checkpoint `name` if it is the best, and drop all but the last `keep` and the best."""
    if record.get("val_loss", math.inf) < best_loss(out_dir):
        write_json(out_dir / "best.json", {"checkpoint": name, "val_loss": record["val_loss"]})
    for path in all_steps(out_dir)[:-keep]:
        if path.name != _read_best(out_dir).get("checkpoint"):
            shutil.rmtree(path)


def remove(out_dir):
    """Delete the run in out_dir: its checkpoints, best.json and log.jsonl, and no other file."""
    for path in all_steps(out_dir):
        shutil.rmtree(path)
    for name in ("best.json", "log.jsonl"):
        Path(out_dir, name).unlink(missing_ok=True)


def all_steps(out_dir):
    """The complete checkpoints of a run, in order."""
    return sorted(Path(out_dir).glob(STEP))


def best_loss(out_dir):
    """The lowest validation loss that a checkpoint of the run was saved with, in nats per token."""
    return _read_best(out_dir).get("val_loss", math.inf)


def _read_best(out_dir):
    """What best.json says, where the checkpoint that it names is still there; else {}."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        best = json.loads((Path(out_dir) / "best.json").read_text(encoding="utf-8"))
        if (Path(out_dir) / best["checkpoint"]).exists():
            return best
    return {}


def find(directory):
    """The checkpoint to sample from or begin with: the directory itself, or the best, or the last of a run."""
    directory = Path(directory)
    if (directory / ".metadata").exists():
        return directory
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"{directory} holds no checkpoint")
    return directory / _read_best(directory).get("checkpoint", steps[-1].name)


def read_config(path):
    """The config.json of a checkpoint, after checking every file against it; UserError where one is damaged."""
    try:
        about = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        files, *_ = (about[key] for key in ("files", "options", "model_config", "record", "scaler", "meta", "data"))
        files = {name: (file["size"], file["crc32"]) for name, file in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}/config.json is missing or damaged ({type(error).__name__}): {_advice(path)}"
        ) from error
    for name, (expected_size, crc32) in files.items():
        file = Path(path) / name
        size = file.stat().st_size if file.exists() else 0
        if size != expected_size:
            raise UserError(f"{file} has {size} bytes of {expected_size}: {_advice(path)}")
        if _crc32(file) != crc32:
            raise UserError(f"{file} is not what was saved (its CRC-32 differs): {_advice(path)}")
    return about


def keep_log(out_dir, step):
    """Drop the lines of log.jsonl from `step` on: the run writes them again."""
    path = Path(out_dir) / "log.jsonl"
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a crash may have cut off the last line
            kept += [line] if json.loads(line)["step"] < step else []
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    part.replace(path)


def check_same(about, stored, out_dir):
    """UserError where the run in out_dir has other options, another model, or other data than now."""
    before, now = (run["options"] | run["model_config"] for run in (stored, about))
    changed = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if k not in FREE and before.get(k) != now[k]]
    if stored["data"] != about.get("data", stored["data"]):
        changed.append(f"the data had {stored['data']['tokens']} tokens, has {about['data']['tokens']}, other bins")
    if changed:
        raise UserError(
            f"{out_dir} holds another run ({'; '.join(changed)}): give this one its own --out_dir, or start over with "
            "--overwrite=True"
        )


@contextlib.contextmanager
def alone_in(out_dir):
    """Hold a lock on a run's directory; UserError where another process trains there."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        yield
        return
    directory = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process trains in {out_dir}: give this one its own --out_dir") from None
    try:
        yield
    finally:
        os.close(directory)


def load(path, model, optimizer=None):
    """Load a checkpoint that read_config has verified into a model, and into its optimizer, in place."""
    with _one_process_is_fine():
        if optimizer is None:
            dcp.load({"model": model.state_dict()}, checkpoint_id=path)
        else:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _advice(path):
    return f"remove {path}, and the same command goes on from the checkpoint before it"


def _crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


@contextlib.contextmanager
def _one_process_is_fine():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield
