"""Atomic files that survive a crash, locks, and text and JSON."""

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path

from common.errors import DamagedError, UserError, one_line
from common.file_kinds import identify

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that have no locks

# Write ----------------------------------------------------------------------------------------


def write_text(path, text):
    """Replace a UTF-8 file in one step: a reader sees the old or the new file, never a part."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    check_regular(part)
    try:
        with name_in_errors(part), open(part, "w", encoding="utf-8") as file:
            file.write(text)
        fsync(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(path, value):
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fsync(path):
    """Flush a file, or the entries of a directory, to disk: they survive a power failure.

    On macOS the disk may still hold them in its cache: that would take F_FULLFSYNC, which
    torch.distributed.checkpoint does not use for the shards either.
    """
    if os.name == "nt":  # Windows cannot open a directory, nor flush a file that it only reads
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def name_in_errors(path):
    """Add the path to an OSError in the block that names no file, such as one of write()."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def remove_directory(path):
    """Delete a directory. A kill in between leaves NAME.deleting, never a part under its name."""
    path = Path(path)
    deleting = path.with_name(path.name + ".deleting")
    if deleting.exists():
        remove_tree(deleting)
    path.replace(deleting)
    remove_tree(deleting)


def remove_tree(path):
    """Delete a directory; an OSError names it, not a file relative to it as shutil's does."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        error.filename = str(path)
        raise


# Lock -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(path, on_busy):
    """Hold the lock file `path` inside a `with` block, whose value says whether it had to wait.

    Its folder is made if need be; the lock file is removed at the end.

    on_busy   called before waiting for another process that holds the lock; may raise instead

    The system releases the lock when the process ends, however it ends. Without locks (Windows,
    some network file systems) nothing is locked.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        check_regular(path)
        file = open(path, "w")
        waited |= _wait_for_lock(file, on_busy)
        if _is_same_file(file, path):
            break
        file.close()  # the process that held the lock has removed it: lock the new file
    try:
        yield waited
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked
        file.close()


def _wait_for_lock(file, on_busy):
    """Lock an open file; return whether another process had it locked."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_busy()
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {file.name} cannot be locked: {error.strerror}", file=sys.stderr)
    return False


def _is_same_file(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


# Read -----------------------------------------------------------------------------------------


def check_regular(path):
    """Raise UserError if the path is a folder or a pipe: opening a pipe would block."""
    try:
        mode = os.stat(path).st_mode  # one call: another process may remove the file between two
    except OSError:
        return  # opening it will say why it cannot be opened
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is not a regular file")


def read_text(path, errors="strict"):
    """Return the text of a UTF-8 file; `errors` as in bytes.decode.

    Raises FileNotFoundError, UserError for a folder or a pipe, and DamagedError for bytes that are
    not UTF-8.
    """
    check_regular(path)
    try:
        return Path(path).read_text(encoding="utf-8", errors=errors)
    except UnicodeDecodeError as error:
        message = f"{path} is damaged: byte {error.start} is not UTF-8"
        raise damaged(path, message, own_kind="text") from error


def read_json(path):
    """Return the value in a JSON file; see read_text and parse_json for errors."""
    text = read_text(path)
    try:
        return parse_json(text, path)
    except DamagedError as error:
        raise damaged(path, str(error), own_kind="text") from error


def parse_json(text, where):
    """Return the value of a JSON text. Raises DamagedError, which names `where`, for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON: {one_line(error)}") from error


def damaged(path, message, own_kind=None):
    """Return a DamagedError that says what a file is, if its first bytes tell; else the message.

    own_kind   what identify returns for an undamaged file
    """
    kind = identify(path) if os.path.getsize(path) > 0 else "empty"
    return DamagedError(message if kind in (None, own_kind) else f"{path} is {kind}")
