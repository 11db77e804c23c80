"""What the experiments share: presets, points that are measured once, result files, plots.

A study measures point after point and keeps them in out/experiments/NAME_PRESET.json, so that the same command goes on
where it stopped. When it is whole it becomes docs/experiments/NAME_PRESET.json, with its plot beside it.
"""

import inspect
import json
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common.device import device_name, keep_freed_memory, pick_device, pick_dtype
from common.errors import UserError
from common.files import write_json

OUT, DOCS = Path("out/experiments"), Path("docs/experiments")
# Okabe and Ito's colours, and a grey, neighbours far apart in lightness (Wong, Nature Methods 8, 441, 2011)
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#888888")


@dataclass
class StudyConfig:
    preset: str = "cpu"  # cpu: minutes on two cores; gpu: hours on one GPU, models of tens of millions of parameters
    overwrite: bool = False  # forget the points of an unfinished study, and measure them anew


class Study:
    """One experiment, for a filled StudyConfig; `presets` has each preset's config, a dataclass."""

    def __init__(self, name, options, presets):
        if options.preset not in presets:
            raise UserError(f"preset={options.preset} is none of {', '.join(presets)}")
        self.name, self.config = f"{name}_{options.preset}", presets[options.preset]
        keep_freed_memory()
        self.device = pick_device("cuda" if options.preset == "gpu" else "cpu")
        self.dtype = pick_dtype("auto", self.device)
        about = {"experiment": name, "preset": options.preset, "config": asdict(self.config)}
        self.state = json.loads(json.dumps(about | where_and_when(self.device, self.dtype))) | {
            "points": {}
        }
        self.path = OUT / f"{self.name}.json"
        if self.path.exists() and not options.overwrite:
            stored = json.loads(self.path.read_text())
            changed = [
                key for key in self.state if key != "points" and stored.get(key) != self.state[key]
            ]
            self.state["points"] = {} if changed else stored["points"]
            if changed:
                print(
                    f"{self.path} was measured with another {' and '.join(changed)}: all points are measured anew"
                )

    def point(self, key, measure, *arguments):
        """The point of a key: what measure(*arguments) returns, in plain values, now or in an earlier call."""
        if key not in self.state["points"]:
            self.state["points"][key] = measure(*arguments)
            OUT.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.state)
            print(f"{key}: {json.dumps(self.state['points'][key])}"[:300], flush=True)
        return self.state["points"][key]

    def finish(self, draw=None):
        """Write the result file, and the plot."""
        DOCS.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, DOCS / self.path.name)
        print(DOCS / self.path.name)
        if draw:
            plot(self.state, draw)


def plot(state, draw):
    """Draw a study's state beside its result file: draw(state, panel, ...) has as many panels as it asks for."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt

    panels = len(inspect.signature(draw).parameters) - 1
    figure, axes = plt.subplots(
        1, panels, figsize=(8 if panels < 3 else 11, 4), layout="constrained", squeeze=False
    )
    draw(state, *axes[0])
    for panel in axes[0]:
        panel.margins(y=0.12)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{state['experiment']}_{state['preset']}.png", dpi=110)
    plt.close(figure)


def label(panel, *points, offset=(6, -3)):
    """Name points, each (text, x, y, colour), beside them; several at once are kept apart, in the order of y."""
    for rank, (text, x, y, colour) in enumerate(sorted(points, key=lambda point: point[2])):
        place = (offset[0], offset[1] + 11 * (rank - (len(points) - 1) / 2))
        panel.annotate(
            text, (x, y), place, textcoords="offset points", color=colour, fontsize="small"
        )


def where_and_when(device, dtype):
    """Machine, versions and commit, for a result file."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next(iter(re.findall(r"model name\s*: (.*)", cpu)), platform.processor())
    name = cpu if device.type == "cpu" else device_name(device)
    what = {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    git = (
        ["git", "log", "-1", "--format=%H", "--", "*.py", ":!tests"],
        ["git", "status", "--porcelain", "--", "*.py"],
    )
    try:
        commit, changes = (
            subprocess.run(g, capture_output=True, text=True, check=True).stdout.strip()
            for g in git
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit, changes = "unknown", ""
    return {
        "machine": what,
        "versions": versions,
        "commit": commit + (" and changes" if changes else ""),
    }


def seeds_of(state, key):
    """The values of a point's seeds, of a study's state."""
    return [state["points"][f"{key}, seed {seed}"] for seed in state["config"]["seeds"]]


def markdown(header, rows):
    """A table for the report."""
    lines = [
        " | ".join(map(str, row)) for row in (header, ["---"] + ["---:"] * (len(header) - 1), *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)
