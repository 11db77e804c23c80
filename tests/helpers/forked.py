"""Run a program's main() in a forked child, in milliseconds, as torch is imported already.

A child has its own working directory, stdout, stderr, time limit and memory limit. What it does to
its process (a crash, a closed stream, a changed module) cannot reach the tests.
"""

import contextlib
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from common.errors import run_program

SECONDS = 20  # that a child may take
GIGABYTE = 10**9
ADDRESS_SPACE = 8 * GIGABYTE  # that a child may reserve, beyond what its parent has


@dataclass
class Outcome:
    """What a child did."""

    status: int  # its exit status; the negative number of the signal that ended it
    out: str
    err: str
    memory: int  # bytes that it needed beyond its parent's

    @property
    def timed_out(self):
        return self.status == -signal.SIGALRM

    def problem(self, *names):
        """Return what is wrong with an error: it must be one line that holds one of the names."""
        if self.timed_out:
            return f"no end after {SECONDS} s"
        lines = self.err.splitlines()
        if self.status != 2 or not lines or not lines[-1].startswith("error: "):
            return f"status {self.status}, {self.err[-500:]!r}"
        if not all(line.startswith(("warning: ", "downloading ")) for line in lines[:-1]):
            return f"more than one line: {self.err[:500]!r}"
        if not any(name in self.err for name in names):
            return f"{' or '.join(names)} is not named: {self.err!r}"
        return None


def run_forked(main, argv, folder):
    """Return the Outcome of main(argv) in a child whose working directory is `folder`."""
    with contextlib.ExitStack() as stack:
        out, err, memory = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        pid = os.fork()
        if pid == 0:
            _run_child(main, argv, folder, out, err, memory)
        _, wait_status = os.waitpid(pid, 0)  # a child that hangs is ended by its alarm
        texts = []
        for file in (out, err, memory):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    status = os.waitstatus_to_exitcode(wait_status)
    return Outcome(status, texts[0], texts[1], int(texts[2] or 0))


def _run_child(main, argv, folder, out, err, memory):
    """Run main(argv) in this child and end it; never returns."""
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)
        os.chdir(folder)
        before = _memory("VmRSS")
        limit = _memory("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        try:
            run_program(main, argv)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        memory.write(str(_memory("VmHWM") - before).encode())
        memory.flush()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _memory(name):
    """Return a number of bytes that Linux knows about this process, elsewhere 0."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(re.search(name + r":\s*(\d+) kB", status)[1])
