"""Jobs that start several processes, done by a forked process while other tests run.

Most tests keep one core busy; the jobs use the other one meanwhile. A test module names its jobs:

    BACKGROUND = {"launches": function}

The job of a fixture is a function of the selected tests that use the fixture. It runs in a folder
of its own with the dataset data/tiny, and what it returns must be something that JSON can hold.
conftest.py starts the jobs before the first test, and puts the tests that wait for them last.

    @pytest.fixture(scope="module")
    def launches(background):
        with background.result("launches") as result:  # in the job's folder
            yield result
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from conftest import write_tiny

from common.errors import UserError

LONGEST_JOB = 2400  # seconds until a job counts as hung, on a machine that is busy otherwise


def select_jobs(items):
    """Return {fixture: (its job, the selected tests that use the fixture)}."""
    jobs = {}
    for item in items:
        for name, job in getattr(item.module, "BACKGROUND", {}).items():
            if name in item.fixturenames:
                _, tests = jobs.setdefault(name, (job, []))
                tests.append(item)
    return jobs


class Background:
    """A forked process that does the jobs of the selected tests, one after the other."""

    def __init__(self, jobs):
        self.folder = tempfile.TemporaryDirectory()
        self.pytest_pid = os.getpid()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._do_jobs, args=(jobs,))
        self.process.start()

    def _do_jobs(self, jobs):
        os.setsid()  # Ctrl-C then reaches pytest alone, which calls stop()
        os.chdir(self.folder.name)
        log = open("output.txt", "w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        for name, (job, tests) in jobs.items():
            if os.getppid() != self.pytest_pid:  # pytest was killed
                break
            folder = Path(self.folder.name, name)
            write_tiny(folder)
            os.chdir(folder)
            try:
                outcome = {"result": job(tests)}
            except UserError as error:  # it says all
                outcome = {"error": str(error)}
            except BaseException:  # pytest.fail() raises one, too
                outcome = {"error": traceback.format_exc() + self._output()}
            (folder / "unfinished.json").write_text(json.dumps(outcome))
            os.rename(folder / "unfinished.json", folder / "outcome.json")

    @contextlib.contextmanager
    def result(self, name):
        """Wait for a job, change into its folder for the block, and yield what the job returned."""
        folder = Path(self.folder.name, name)
        deadline = time.monotonic() + LONGEST_JOB
        while not (folder / "outcome.json").exists():
            assert self.process.is_alive() and time.monotonic() < deadline, self._output()
            time.sleep(0.05)
        outcome = json.loads((folder / "outcome.json").read_text())
        if "error" in outcome:
            pytest.fail(outcome["error"], pytrace=False)
        before = os.getcwd()
        os.chdir(folder)
        yield outcome["result"]
        os.chdir(before)

    def _output(self):
        return Path(self.folder.name, "output.txt").read_text()[-4000:]

    def stop(self):
        if self.process.is_alive():
            kill_tree(self.process.pid)
        self.process.join()
        self.folder.cleanup()


def kill_tree(pid):
    """Kill a process and all that it and its children have started."""
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def descendants(pid):
    output = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    children = [int(line) for line in output.split()]
    return [*children, *(pid for child in children for pid in descendants(child))]
