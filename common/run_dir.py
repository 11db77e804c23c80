"""The directory of a run: its checkpoints, its log and its lock.

    out/run/
        step_00000110/    checkpoints: see common/checkpoint.py
        step_00000120/
        log.jsonl         one line per optimizer step
        .lock             while a process trains

The best checkpoint is the one whose metrics have the lowest validation loss. Losses of different
eval_tokens, if that has changed, are not compared: each has a best checkpoint, which is kept. A
checkpoint that is found damaged is renamed to NAME.damaged. While a directory is deleted it is
NAME.deleting, so that a kill in between leaves no half of a checkpoint under its name.

Functions that change the directory are for rank 0 alone, except those marked "Collective".
"""

import contextlib
import json
import math
import sys
from pathlib import Path

from common.checkpoint import read_record, save_checkpoint, verify_checkpoint
from common.errors import DamagedError, UserError
from common.files import (
    fsync,
    lock,
    name_in_errors,
    parse_json,
    read_text,
    remove_directory,
    remove_tree,
)

CHECKPOINT_GLOB = "step_" + 8 * "[0-9]"  # of complete checkpoints
DAMAGED_GLOB = CHECKPOINT_GLOB + ".damaged*"


# Start and save -------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_run(out_dir):
    """Lock a run's directory inside a `with` block, after making it if need be.

    Files that an interrupted process has left there are deleted. Raises UserError if another
    process is training in the directory.
    """

    def refuse():
        raise UserError(f"another process is training in {out_dir}: choose another --out_dir")

    with lock(Path(out_dir) / ".lock", on_busy=refuse):
        remove_unfinished(out_dir)
        yield


def remove_unfinished(out_dir):
    """Delete what an interrupted call has left in out_dir.

    save_checkpoint leaves NAME.part, remove_directory NAME.deleting, and truncate_log log.part.
    """
    for suffix in (".part", ".deleting", ".damaged*.deleting"):
        for path in list(Path(out_dir).glob(CHECKPOINT_GLOB + suffix)):
            remove_tree(path)
    Path(out_dir, "log.part").unlink(missing_ok=True)


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


def save_step(out_dir, model, optimizer, record, keep, group):
    """Collective. Save the checkpoint of record["step"] and prune older ones.

    record   see save_checkpoint
    keep     number of recent checkpoints to keep, besides the best
    """
    with group.exit_together():
        log = Path(out_dir) / "log.jsonl"
        if group.rank == 0 and log.exists():
            fsync(log)  # a checkpoint on disk has its log on disk
    path = Path(out_dir) / f"step_{record['step']:08d}"
    save_checkpoint(path, model, optimizer, record, group)
    with group.exit_together():
        if group.rank == 0:
            prune_checkpoints(out_dir, keep)


def prune_checkpoints(out_dir, keep):
    """Delete all checkpoints but the last `keep`, the best, and those with a damaged record."""
    best = [path for path, _ in best_checkpoints(out_dir).values()]
    for path in list_checkpoints(out_dir)[:-keep]:
        if path not in best and read_evaluation(path) is not None:
            remove_directory(path)


# Find -----------------------------------------------------------------------------------------


def list_checkpoints(out_dir):
    """Return the paths of a run's complete checkpoints, oldest first."""
    return sorted(Path(out_dir).glob(CHECKPOINT_GLOB))


def read_evaluation(path, on_damaged=None):
    """Return a checkpoint's eval_tokens and validation loss, infinity if it was not evaluated.

    on_damaged   called with the path and the error if config.json cannot be read, which gives None
    """
    try:
        record = read_record(path)
    except (DamagedError, FileNotFoundError) as error:
        if on_damaged is not None:
            on_damaged(path, error)
        return None
    return record["options"]["eval_tokens"], record["metrics"].get("val_loss", math.inf)


def best_checkpoints(out_dir, on_damaged=None):
    """Return {eval_tokens: (path, loss)}: the checkpoint with the lowest validation loss for each.

    on_damaged   see read_evaluation; the checkpoint is then passed over

    The loss is in nats per token. The eval_tokens of the newest evaluated checkpoint come last.
    Only config.json is verified here.
    """
    best = {}
    for path in list_checkpoints(out_dir):
        evaluation = read_evaluation(path, on_damaged)
        if evaluation is None or evaluation[1] == math.inf:
            continue
        eval_tokens, loss = evaluation
        current = (path, loss)
        earlier = best.pop(eval_tokens, current)  # popped, so that the entry below is the last
        best[eval_tokens] = min(earlier, current, key=lambda entry: entry[1])
    return best


def best_checkpoint(out_dir, on_damaged=None):
    """Return the path and the loss of the best checkpoint by the run's last eval_tokens.

    Without an evaluated checkpoint: (None, infinity). on_damaged: see read_evaluation.
    """
    best = best_checkpoints(out_dir, on_damaged)
    return list(best.values())[-1] if best else (None, math.inf)


def checkpoint_to_resume(out_dir, rename_damaged, group):
    """Collective. Return path and record of a run's last checkpoint, (None, None) if it has none.

    A damaged checkpoint is reported on stderr, renamed if `rename_damaged`, and the one before it
    is taken. Exits if all are damaged: a new run would overwrite what might be recovered.
    """
    with group.exit_together():
        paths = list_checkpoints(out_dir)
    for path in reversed(group.broadcast(paths)):
        error = record = None
        with group.exit_together():  # the ranks divide the reading, as when they save
            try:
                record = verify_checkpoint(path, group.rank, group.world_size)
            except FileNotFoundError as missing:
                # A run that trains holds the lock, so nobody deletes: this machine sees another
                # out_dir. With eval_only another process may have pruned the checkpoint.
                if rename_damaged:
                    message = f"{out_dir} must be a directory that all machines share"
                    raise UserError(message) from missing
                error = missing
            except DamagedError as damaged:
                error = damaged
        errors = [error for error in group.all_gather(error) if error is not None]
        if not errors:
            return path, record
        with group.exit_together():
            if group.rank == 0 and isinstance(errors[0], DamagedError):
                action = "not used"
                if rename_damaged:
                    action = f"renamed to {rename_to_damaged(path).name}"
                print(f"warning: {errors[0]}; {path.name} is {action}", file=sys.stderr)
    with group.exit_together():
        if list_checkpoints(out_dir) or list(Path(out_dir).glob(DAMAGED_GLOB)):
            raise UserError(
                f"{out_dir} has damaged checkpoints only: --overwrite=True deletes them and starts "
                "over"
            )
    return None, None


def rename_to_damaged(path):
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
    none was evaluated. A damaged one is reported on stderr, and the next one is taken. A run may be
    training and delete its checkpoints: after each failure the directory is read again.
    """
    directory = Path(directory)
    if (directory / "config.json").exists() or (directory / ".metadata").exists():
        return load(directory, verify_checkpoint(directory))
    failed = []

    def report(path, error):
        if path in failed:
            return
        failed.append(path)
        if path.exists():
            print(f"warning: {error}; {path.name} is not used", file=sys.stderr)

    while True:
        best, _ = best_checkpoint(directory, on_damaged=report)
        candidates = [best, *reversed(list_checkpoints(directory))]
        candidates = [path for path in candidates if path is not None and path not in failed]
        if not candidates:
            break
        path = candidates[0]
        try:
            return load(path, verify_checkpoint(path))
        except (DamagedError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) and path.exists():
                raise  # another file is missing, none of the checkpoint's
            report(path, error)
    if failed:
        raise UserError(f"{directory} has no undamaged checkpoint")
    raise UserError(f"{directory} has no checkpoint, and no config.json of a transformers model")


# Log ------------------------------------------------------------------------------------------


def append_log(out_dir, step, metrics):
    """Append the line of a step to log.jsonl; return an error message, or None."""
    path = Path(out_dir) / "log.jsonl"
    try:
        with name_in_errors(path), open(path, "a", encoding="utf-8") as log:
            print(json.dumps({"step": step} | metrics), file=log)
    except OSError as error:
        return str(error)
    return None


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
            if parse_json(line, path)["step"] < step:
                kept.append(line + "\n")
        except (DamagedError, KeyError, TypeError):
            damaged.append(str(number))
    if damaged:
        print(f"warning: {path}: removed damaged line {', '.join(damaged)}", file=sys.stderr)
    part = path.with_suffix(".part")
    with name_in_errors(part):
        part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)
