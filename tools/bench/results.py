"""Result files: docs/bench/NAME-DEVICE.json, which says how, where and with what it was made.

A value of a row that was measured in several rounds is {"median": m, "min": a, "max": b}.
"""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from common.device import device_name
from common.files import write_json

FOLDER = "docs/bench"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # instructions that matrix products use


@dataclass
class Bench:
    """What a benchmark is given, and where it reports."""

    device: torch.device
    seconds: float  # for its rounds
    nanogpt: str | None = None  # directory of nanoGPT's programs
    position: int = 100_000  # of decode
    has_transformers: bool = False
    notes: list = field(default_factory=list)  # what was left out, and why

    def show(self, row):
        """Print a row and return it."""
        print(" | ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
        return row

    def note(self, text):
        """Print a line that belongs to the result."""
        self.notes.append(text)
        print(text, flush=True)


# Where a result comes from --------------------------------------------------------------------


def describe_machine(device):
    """Return what the speed depends on; no name of the machine."""
    machine = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb(),
        "instructions": instructions(),
    }
    if device.type == "cuda":
        machine["gpu_memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
    return machine


def cpu_name():
    """Return the model name of the CPU: on Linux from /proc/cpuinfo, which is more exact."""
    match = re.search(r"model name\s*: (.*)", _cpuinfo())
    return match[1] if match else platform.processor()


def instructions():
    """Return those of FLAGS that the CPU has, as far as the system tells."""
    match = re.search(r"flags\s*: (.*)", _cpuinfo())
    available = match[1].split() if match else []
    return [flag for flag in FLAGS if flag in available]


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def memory_gb():
    """Return the memory of the machine, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def versions():
    """Return the versions of Python and of the packages; None for one that is not installed."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": package_version("transformers"),
    }


def package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # a process runs the code that it has loaded, whatever is committed later
def current_commit():
    """Return the last commit that changed the code, with " and changes" if files differ from it.

    Return "unknown" without git or outside a repository.
    """
    try:
        commit = git_output("log", "-1", "--format=%H", "--", "*.py", ":!tests")
        changes = git_output("status", "--porcelain", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} and changes" if changes else commit


def git_output(*arguments):
    command = ["git", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def describe(name, device, options):
    """Return the head of a result file."""
    return {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "commit": current_commit(),
        "machine": describe_machine(device),
        "versions": versions(),
        "options": options,
    }


# Files ----------------------------------------------------------------------------------------


def slug(text):
    """Return a device's name as a part of a file name: lower case, words joined by "-"."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(folder, results):
    device = slug(results["machine"]["device"])
    return Path(folder) / f"{results['benchmark']}-{device}.json"


def write_results(folder, results):
    """Write a result file; return its path."""
    path = result_path(folder, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    return path


def read_results(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_all(folder):
    """Return the results of all files of a folder, in order of their names."""
    return [read_results(path) for path in sorted(Path(folder).glob("*.json"))]


# Values and tables ----------------------------------------------------------------------------


def median(value):
    """Return the number that a value of a row stands for."""
    return value["median"] if isinstance(value, dict) else value


def cell(value):
    """Return a value of a row as text: with its range, if it was measured in several rounds."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{number(value['median'])} ({number(value['min'])} to {number(value['max'])})"
    return number(value) if isinstance(value, float) else str(value)


def number(value):
    """Return four digits, and never an exponent for a number of a table."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown_table(header, rows):
    """Return a Markdown table: the first column aligned to the left, the others to the right."""
    alignment = ["---"] + ["---:"] * (len(header) - 1)
    lines = []
    for cells in [header, alignment, *rows]:
        texts = [str(cell) for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def markdown_rows(rows):
    """Return Markdown tables of the rows of a result file: one for all with the same columns."""
    tables = {}  # {columns: rows}
    for row in rows:
        tables.setdefault(tuple(row), []).append([cell(value) for value in row.values()])
    blocks = []
    for columns, cells in tables.items():
        header = [column.replace("_", " ") for column in columns]
        blocks.append(markdown_table(header, cells))
    return "\n\n".join(blocks)


def describe_source(results):
    """Return one line: the command, the machine, the versions and the commit of a result file."""
    machine, made_with = results["machine"], results["versions"]
    parts = [machine["device"]]
    if machine.get("cpu"):
        parts.append(machine["cpu"])
    parts.append(f"{machine['threads']} threads")
    if machine.get("instructions"):
        parts.append(", ".join(machine["instructions"]))
    parts += [f"torch {made_with['torch']}", f"Python {made_with['python']}"]
    if results.get("commit"):
        parts.append(f"{results['date']}, commit `{results['commit'][:10]}`")
    return f"Made by `python -m tools.bench {results['benchmark']}`: {'; '.join(parts)}."
