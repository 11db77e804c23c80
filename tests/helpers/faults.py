"""Call a program in a forked process, in which the n-th file operation is killed or fails.

    fault = None                                  none; Outcome.operations lists the operations
    fault = Fault(7)                              SIGKILL in the place of operation 7
    fault = Fault(7, halfway=True)                SIGKILL after half the bytes of a write
    fault = Fault(7, errno.ENOSPC)                operation 7 raises OSError
    fault = Fault(7, errno.ENOSPC, lasting=True)  and so do all operations after it
    outcome = Forked(call, cwd, "out", fault).finish()

Operations are what changes files: open for writing, write, truncate, fsync, rename, remove, mkdir,
rmdir. Those in one folder are counted, in the order in which Python passes them to the system: a
buffered write counts when the buffer is flushed.

Forking takes milliseconds; starting Python and importing torch takes seconds.
"""

import builtins
import errno
import functools
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch

from common.errors import run_program

TIMEOUT = 120  # seconds after which a process counts as hung
AUDIT_EVENTS = {"os.mkdir": "mkdir", "os.rmdir": "rmdir", "os.remove": "remove"}

# The CUDA backend of autograd starts threads, after which a process that forks cannot use it.
needs_fork = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="needs Linux without CUDA"
)


class Operation(NamedTuple):
    kind: str  # open, write, truncate, fsync, rename, remove, mkdir, rmdir
    path: str  # relative to the watched folder; of a rename the new one


@dataclass
class Fault:
    number: int  # of the operation that it meets, from 0
    errno: int | None = None  # of the OSError; None: SIGKILL
    halfway: bool = False  # a write writes half of its bytes before
    lasting: bool = False  # the operations after it fail, too


@dataclass
class Outcome:
    status: int  # the exit status, or minus the signal, as of subprocess
    out: str
    err: str
    operations: list = field(default_factory=list)  # that were begun; none if it was killed

    def problem(self, *names):
        """Return what is wrong with an error: it must be one line that holds one of the names."""
        if not is_one_error(self):
            return f"status {self.status}, {self.err[-500:]!r}"
        if not any(name in self.err for name in names):
            return f"{' or '.join(names)} is not named: {self.err!r}"
        return None


# In the forked process ------------------------------------------------------------------------


class _Operations:
    """Counts the operations of this process below a folder, and causes the fault."""

    def __init__(self, folder, fault):
        self.folder = os.path.abspath(folder) + os.sep
        self.fault = fault
        self.begun = []

    def install(self):
        """Watch all operations of this process from now on; there is no way back."""
        files = self
        open_file, fsync = builtins.open, os.fsync

        class WatchedFile(io.FileIO):
            def write(self, data):
                view = memoryview(data).cast("B")
                files.begin("write", self.name, lambda: io.FileIO.write(self, half_of(view)))
                return super().write(data)

            def truncate(self, size=None):
                files.begin("truncate", self.name)
                return super().truncate(size)

        def watched_open(
            file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **options
        ):
            is_watched = set(mode) & set("wax+") and files.relative(file) is not None
            if not is_watched:
                return open_file(file, mode, buffering, encoding, errors, newline, **options)
            raw = WatchedFile(file, mode.replace("b", "").replace("t", ""))
            binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return binary
            return io.TextIOWrapper(binary, encoding, errors, newline)

        def watched_fsync(descriptor):
            files.begin("fsync", descriptor)
            fsync(descriptor)

        builtins.open = io.open = pathlib.Path.open = watched_open
        os.fsync = watched_fsync
        sys.addaudithook(self._audit)

    def _audit(self, event, arguments):
        """Begin the operations that Python announces itself, whichever module calls them."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.begin("open", path)
        elif event == "os.rename":  # os.replace too
            self.begin("rename", arguments[1])
        elif event in AUDIT_EVENTS:
            self.begin(AUDIT_EVENTS[event], arguments[0], descriptor=arguments[-1])

    def relative(self, path, descriptor=-1):
        """Return a path relative to the folder, None if it is elsewhere.

        path         a path or an open file's descriptor
        descriptor   of the directory that the path is relative to; -1: the current one
        """
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fspath(path)
        if descriptor >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
        path = os.path.abspath(path) + os.sep
        return path[len(self.folder) : -1] if path.startswith(self.folder) else None

    def begin(self, kind, path, do_half=None, descriptor=-1):
        """Count an operation, and cause the fault if it is its turn.

        do_half   does half of the operation
        """
        relative = self.relative(path, descriptor)
        if relative is None:
            return
        number = len(self.begun)
        self.begun.append(Operation(kind, relative))
        fault = self.fault
        if fault is None or number < fault.number or (number > fault.number and not fault.lasting):
            return
        if fault.halfway and do_half is not None:
            do_half()
        if fault.errno is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if kind in ("write", "fsync", "truncate"):  # the system gets a descriptor, not a name
            raise OSError(fault.errno, os.strerror(fault.errno))
        raise OSError(fault.errno, os.strerror(fault.errno), os.fspath(path))


def half_of(view):
    return view[: len(view) // 2]


def _exit_status(call):
    try:
        run_program(lambda argv: call(), [])
    except SystemExit as stopped:
        return stopped.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


# In the test ----------------------------------------------------------------------------------


class Forked:
    """A call in a forked process.

    cwd      its working directory
    watched  the folder whose operations are counted, relative to cwd; None: none are
    fault    what happens to one of them
    """

    def __init__(self, call, cwd, watched=None, fault=None):
        self._out, self._err, self._operations = (tempfile.TemporaryFile() for _ in range(3))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._call_and_exit(call, cwd, watched, fault)

    def _call_and_exit(self, call, cwd, watched, fault):
        os.dup2(self._out.fileno(), 1)
        os.dup2(self._err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)
        os.chdir(cwd)
        operations = _Operations(watched or ".", fault)
        if watched is not None:
            operations.install()
        status = _exit_status(call)
        sys.stdout.flush()
        os.write(self._operations.fileno(), json.dumps(operations.begun).encode())
        os._exit(status)

    def finish(self, timeout=TIMEOUT):
        """Wait for the process and return its Outcome. Kill one that hangs, and fail the test."""
        deadline = time.monotonic() + timeout
        pid = 0
        while not pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if not pid and time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"hung: {_content(self._out)} {_content(self._err)}")
            time.sleep(0.002)
        return self._outcome(status)

    def printed(self):
        """Return what the process has printed so far, to stdout and to stderr."""
        return _content(self._out) + _content(self._err)

    def kill(self):
        """Kill the process, which may have ended, and return its Outcome."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return self._outcome(status)

    def _outcome(self, status):
        operations = json.loads(_content(self._operations) or "[]")
        return Outcome(
            status=os.waitstatus_to_exitcode(status),
            out=_content(self._out),
            err=_content(self._err),
            operations=[Operation(*fields) for fields in operations],
        )


def _content(file):
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")  # the process may still write


def run_forked(main, argv, folder):
    """Return the Outcome of main(argv) in a forked process whose working directory is `folder`."""
    return Forked(lambda: main(argv), folder).finish(timeout=20)


def fork_at_once(calls, cwd):
    """Call several programs that start at the same moment; return their Outcomes."""
    start = time.monotonic() + 0.05

    def call_at_start(call):
        time.sleep(max(0, start - time.monotonic()))
        call()

    processes = [Forked(functools.partial(call_at_start, call), cwd) for call in calls]
    return [process.finish() for process in processes]


def fork_ranks(call, cwd, world_size, watched=None, faults=None):
    """Call a program as torchrun's ranks; return their Outcomes.

    faults   {rank: Fault}
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def call_as_rank(rank):
        os.environ |= {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        call()
        torch.distributed.destroy_process_group()

    ranks = []
    for rank in range(world_size):
        fault = (faults or {}).get(rank)
        ranks.append(Forked(functools.partial(call_as_rank, rank), cwd, watched, fault))
    return [rank.finish() for rank in ranks]


# Cases ----------------------------------------------------------------------------------------


# Parameters of tests: how many cases to try. None: all, marked slow.
EFFORTS = [pytest.param(1, id="sample"), pytest.param(None, id="all", marks=pytest.mark.slow)]
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@dataclass
class Case:
    name: str  # the fault and its operation
    folder: pathlib.Path  # the working directory that was left behind
    outcome: Outcome


@dataclass
class Tried:
    """A call, the working directory of one without a fault, and the cases of those with one."""

    call: Callable
    finished: pathlib.Path
    cases: list


def run_in(folder, call):
    """Call a program that must succeed in a working directory, in a forked process."""
    outcome = Forked(call, folder).finish()
    assert outcome.status == 0, outcome.err
    return outcome


def kill(call, watched, start, folder, count):
    """Kill a call at so many of its operations, None: at all; writes also halfway.

    watched   the folder of the operations, relative to the working directory
    start     the working directory that the call finds
    folder    where the cases are made
    """

    def kills_at(number, kind):
        faults = {"before": Fault(number)}
        if kind == "write":
            faults["in"] = Fault(number, halfway=True)
        return faults

    tried = _try_faults(kills_at, call, watched, start, folder, count)
    assert [case.name for case in tried.cases if case.outcome.status != -signal.SIGKILL] == []
    return tried


def fail(call, watched, start, folder, count):
    """Let so many operations of a call fail, None: all, alone and with all that follow.

    Each fails with one of ERRORS. The other arguments are those of `kill`.
    """
    choose = random.Random(1)

    def failures_at(number, kind):
        faults = {}
        for lasting in (False, True):
            code = choose.choice(ERRORS)
            halfway = kind == "write" and choose.random() < 0.5
            name = f"{errno.errorcode[code]} {'from' if lasting else 'at'}"
            faults[name] = Fault(number, code, halfway, lasting)
        return faults

    return _try_faults(failures_at, call, watched, start, folder, count)


def _try_faults(faults_at, call, watched, start, folder, count):
    finished = folder / "finished"
    shutil.copytree(start, finished)
    outcome = Forked(call, finished, watched).finish()
    assert outcome.status == 0, outcome.err

    faults = []
    for number, (kind, path) in enumerate(outcome.operations):
        for name, fault in faults_at(number, kind).items():
            faults.append((f"{name} operation {number}, {kind} {path}", fault))
    if count is not None:
        faults = random.Random(0).sample(faults, count)

    cases = []
    for name, fault in faults:
        case_folder = folder / f"case{len(cases)}"
        shutil.copytree(start, case_folder)
        outcome = Forked(call, case_folder, watched, fault).finish()
        cases.append(Case(name, case_folder, outcome))
    return Tried(call, finished, cases)


def is_one_error(outcome):
    """Return whether a program ended with one line on stderr, apart from warnings."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    return outcome.status == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def files_of(folder):
    """Return the contents of all files below a folder by their names; None for directories."""
    contents = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else None
        if path.suffix == ".json":
            content = json.loads(content)  # in which the order of keys does not matter
        contents[str(path.relative_to(folder))] = content
    return contents


def failed_cases(tried, has_right_result):
    """Return the names of the cases for which a check of a copy of their directory is false."""
    failed = []
    for case in tried.cases:
        copy = case.folder.with_name("copy")
        shutil.copytree(case.folder, copy)
        if not has_right_result(copy):
            failed.append(case.name)
        shutil.rmtree(copy)
    return failed
