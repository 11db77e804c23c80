"""Result files: what was measured, and how, where and with what.

A result file is JSON:

    name        of the benchmark or the experiment
    command     that measured it
    options     of that command
    date, commit, machine, versions
    values      of a benchmark: a list of rows {column: value}, where a value that was measured in
                several rounds is {"median": m, "min": a, "max": b}
                of an experiment: {point: value}

The file of an experiment also has its `config`, and `commits` and `seconds` of each point.
"""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

from common.device import device_name
from common.files import write_json

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # instructions that matrix products use


def describe(name, command, options, device):
    """Return a result without values."""
    return {
        "name": name,
        "command": command,
        "options": options,
        "date": datetime.date.today().isoformat(),
        "commit": current_commit(),
        "machine": describe_machine(device),
        "versions": versions(),
    }


def write_result(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def read_result(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def describe_source(result, path):
    """Return a sentence in Markdown: how, where and with what a result was made.

    path   of the result file; the link is relative to the folder above
    """
    machine, made_with = result["machine"], result["versions"]
    commits = sorted(set(result.get("commits", {}).values())) or [result["commit"]]
    commits = ", ".join(f"`{commit[:10]}`" for commit in commits)
    is_gpu = machine["device"] not in ("cpu", "mps")
    parts = [machine["device"] if is_gpu else machine["cpu"]]
    parts.append("1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads")
    parts += machine.get("instructions", [])
    if "dtype" in machine:
        parts.append(machine["dtype"])
    parts += [f"torch {made_with['torch']}", f"Python {made_with['python']}"]
    link = f"[{path.name}]({path.parent.name}/{path.name})"
    return f"Made by `{result['command']}` at commit {commits}: {link}. {', '.join(parts)}."


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
    """Return those of FLAGS that the CPU has, as far as the system reports them."""
    match = re.search(r"flags\s*: (.*)", _cpuinfo())
    available = match[1].split() if match else []
    return [flag for flag in FLAGS if flag in available]


def _cpuinfo():
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def memory_gb():
    """Return the memory of the machine, or None where the system does not report it."""
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
