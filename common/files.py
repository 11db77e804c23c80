"""Files that are either complete or not there, also after a crash; locks; and checked JSON."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import sys
from pathlib import Path

from common.errors import DamagedError, UserError

FOLDER_ATTEMPTS = 100  # to open a file in a folder that other processes make and remove
DEEPEST = 50  # levels of a JSON value; ours have five
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
    """Flush a file, or the entries of a directory, to disk: they survive a power failure."""
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

    Its folders are made if need be; those that stay empty are removed at the end, as is the file.

    on_busy   called before waiting for another process that holds the lock; may raise instead

    The system releases the lock when the process ends, however it ends. Without locks (Windows,
    some network file systems) nothing is locked.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost is first
    file, waited = None, False
    while file is None:
        check_regular(path)
        file = _open_in_folder(path)
        waited |= _wait_for_lock(file, on_busy)
        if not _is_same_file(file, path):  # the process that held the lock has removed it
            file.close()
            file = None
    try:
        yield waited
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked
        file.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _open_in_folder(path):
    """Open a file for writing, and make its folders, which others may remove at the same time."""
    for _ in range(FOLDER_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "w")
    path.parent.mkdir(parents=True, exist_ok=True)  # it is something else: a file in the way
    return open(path, "w")


def _wait_for_lock(file, on_busy):
    """Lock an open file; return whether another process had it locked."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        try:
            on_busy()
        except BaseException:
            file.close()
            raise
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
    except (OSError, ValueError):
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
        raise DamagedError(f"{path} is damaged: byte {error.start} is not UTF-8") from error


def read_json(path, shape):
    """Return the object in a JSON file; see parse_json for `shape` and read_text for errors."""
    return parse_json(read_text(path), shape, path)


def parse_json(text, shape, where):
    """Return the value of a JSON text. Raises DamagedError, which names `where`, for other shapes.

    shape   a type, a tuple of types, [shape of all items], or {key: shape}. A key that ends in "?"
            may be missing; "*" stands for all keys; float allows integers, too. Numbers must be
            finite and have at most 64 bits, and strings must be valid Unicode.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # fails at half a surrogate pair
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DamagedError(f"{where} is not JSON: {reason}") from error
    if _is_nested(value, DEEPEST):
        raise DamagedError(f"{where} is damaged: it is nested more than {DEEPEST} levels deep")
    mismatch = _find_mismatch(value, shape, "it")
    if mismatch:
        raise DamagedError(f"{where} is damaged: {mismatch}")
    return value


def _is_nested(value, levels):
    """Return whether a JSON value has more than so many lists and objects around a value."""
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)):
        return False
    return levels == 0 or any(_is_nested(item, levels - 1) for item in inner)


def _find_mismatch(value, shape, name):
    """Return what a value has that its shape does not allow, or None."""
    if isinstance(shape, dict):
        if type(value) is not dict:
            return f"{name} is {_kind(value)}, not an object"
        for key, part in shape.items():
            keys = list(value) if key == "*" else [key.removesuffix("?")]
            for k in keys:
                if k in value:
                    mismatch = _find_mismatch(value[k], part, k)
                elif key.endswith("?"):
                    mismatch = None
                else:
                    mismatch = f"{k} is missing"
                if mismatch:
                    return mismatch
        return None
    if isinstance(shape, list):
        if type(value) is not list:
            return f"{name} is {_kind(value)}, not a list"
        mismatches = (_find_mismatch(item, shape[0], f"an item of {name}") for item in value)
        return next(filter(None, mismatches), None)
    types = shape if isinstance(shape, tuple) else (shape,)
    if type(value) is int and not -(2**63) <= value < 2**63:
        return f"{name} is beyond 64 bits"
    if type(value) is float and not math.isfinite(value):
        return f"{name} is {value}"
    if type(value) in types or (float in types and type(value) is int):
        return None
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
    return f"{name} is {_kind(value)}, not {names}"


def _kind(value):
    return "null" if value is None else type(value).__name__
