"""Run a program's main() in a forked child, in milliseconds, as torch is imported already.

A child has its own working directory, stdout, stderr and time limit. What it does to its process
(a crash, a closed stream, a changed module) cannot reach the tests.
"""

import os
import signal
import sys
import tempfile
import traceback
from dataclasses import dataclass

from common.errors import run_program

SECONDS = 20  # that a child may take


@dataclass
class Outcome:
    """What a child did."""

    status: int  # its exit status; the negative number of the signal that ended it
    out: str
    err: str

    def problem(self, *names):
        """Return what is wrong with an error: it must be one line that holds one of the names."""
        if self.status == -signal.SIGALRM:
            return f"no end after {SECONDS} s"
        lines = self.err.splitlines()
        if self.status != 2 or not lines or not lines[-1].startswith("error: "):
            return f"status {self.status}, {self.err[-500:]!r}"
        if not all(line.startswith("warning: ") for line in lines[:-1]):
            return f"more than one line: {self.err[:500]!r}"
        if not any(name in self.err for name in names):
            return f"{' or '.join(names)} is not named: {self.err!r}"
        return None


def run_forked(main, argv, folder):
    """Return the Outcome of main(argv) in a child whose working directory is `folder`."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _run_child(main, argv, folder, out, err)
        _, wait_status = os.waitpid(pid, 0)  # a child that hangs is ended by its alarm
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(wait_status), *texts)


def _run_child(main, argv, folder, out, err):
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
        try:
            run_program(main, argv)
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
