"""What all experiments use: points that are measured once, result files, plots and tables.

A study measures point after point and stores each in out/experiments/NAME_PRESET.json, so the same
command resumes an interrupted study. The complete file is copied to docs/experiments/, and its plot
is drawn beside it.
"""

import inspect
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.device import device_name, keep_freed_memory, pick_device, pick_dtype
from common.errors import UserError
from common.files import write_json
from tools.bench.results import cpu_name, current_commit

OUT = Path("out/experiments")
DOCS = Path("docs/experiments")
# The colours of Okabe and Ito (Wong, Nature Methods 8, 441, 2011) and a grey, ordered so that
# neighbours differ in lightness.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#888888")
LINE_HEIGHT = 11  # of a label in a plot, in typographic points


@dataclass
class StudyConfig:
    preset: str = "cpu"  # cpu: minutes on two cores; cpu_long: nights; gpu: hours on one GPU
    dataset: str = ""  # in data/; default: the preset's
    overwrite: bool = False  # measure the stored points of this study again


class Study:
    """One experiment: its config, its device, and the points measured so far.

    name      the experiment is experiments/NAME.py
    options   a filled StudyConfig
    presets   {preset: config}; each config is a dataclass, perhaps with a dtype
    """

    def __init__(self, name, options, presets):
        if options.preset not in presets:
            raise UserError(f"preset={options.preset} must be one of {', '.join(presets)}")
        self.config = presets[options.preset]
        if options.dataset:
            self.config = with_dataset(self.config, options.dataset)
        keep_freed_memory()
        self.device = pick_device("cuda" if options.preset == "gpu" else "cpu")
        self.dtype = pick_dtype(getattr(self.config, "dtype", "auto"), self.device)
        state = {
            "experiment": name,
            "preset": options.preset,
            "dataset": options.dataset,
            "config": asdict(self.config),
            **describe_environment(self.device, self.dtype),
            "points": {},
            "commits": {},  # of each point
            "seconds": {},  # of each point; a run that several points use counts once
        }
        self.state = json.loads(json.dumps(state))  # as a file has it: tuples become lists
        self.path = OUT / f"{result_name(state)}.json"
        if self.path.exists() and not options.overwrite:
            self._load_points()

    def _load_points(self):
        """Load the stored points, unless they were measured with another config or elsewhere.

        Points of another commit are kept, because a long study takes many days.
        """
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        about = ["config", "machine", "versions"]
        changed = [key for key in about if stored.get(key) != self.state[key]]
        if changed:
            names = " and ".join(changed)
            print(f"{self.path} was measured with another {names}: measuring all points again")
            return
        self.state["points"] = stored["points"]
        # Earlier files have one commit, of all points.
        one_commit = dict.fromkeys(stored["points"], stored["commit"])
        self.state["commits"] = stored.get("commits", one_commit)
        self.state["seconds"] = stored.get("seconds", {})  # earlier files have none
        others = set(self.state["commits"].values()) - {self.state["commit"]}
        if others:
            names = ", ".join(sorted(commit[:10] for commit in others))
            print(f"{self.path} has points of commit {names}: --overwrite=True measures them again")

    def measure_once(self, key, measure, *arguments):
        """Return the point `key`: measure(*arguments), now or in an earlier call.

        The value must be one that JSON can hold.
        """
        points = self.state["points"]
        if key not in points:
            start = time.perf_counter()
            points[key] = measure(*arguments)
            self.state["seconds"][key] = time.perf_counter() - start
            self.state["commits"][key] = self.state["commit"]
            OUT.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.state)
            line = f"{key}: {json.dumps(points[key])}"
            print(line[:300], flush=True)
        return points[key]

    def finish(self, draw=None):
        """Write the result file and, with a draw function, its plot."""
        DOCS.mkdir(parents=True, exist_ok=True)
        result = DOCS / self.path.name
        write_json(result, self.state)
        print(result)
        if draw is not None:
            save_plot(self.state, draw)


def with_dataset(config, dataset):
    """Return a config of runs whose dataset is another. Raises UserError if it has no runs."""
    if not hasattr(config, "run"):
        raise UserError(f"dataset={dataset}: this experiment trains on no dataset of your choice")
    return replace(config, run=config.run | {"dataset": dataset})


# Where a result comes from --------------------------------------------------------------------


def describe_environment(device, dtype):
    """Return the machine, the versions and the commit, for a result file."""
    return {
        "machine": {
            "device": cpu_name() if device.type == "cpu" else device_name(device),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "commit": current_commit(),
    }


def result_name(state):
    """Return the name of a study's files: NAME_PRESET, or NAME_PRESET_DATASET."""
    parts = [state["experiment"], state["preset"], state.get("dataset", "")]
    return "_".join(part for part in parts if part)


# Plots --------------------------------------------------------------------------------------


def points_of_seeds(state, name):
    """Return the points of a model, one for each seed of the study."""
    return [state["points"][f"{name}, seed {seed}"] for seed in state["config"]["seeds"]]


def has_all_seeds(state, name):
    """Return whether a model was measured with each seed: a long study may be unfinished."""
    return all(f"{name}, seed {seed}" in state["points"] for seed in state["config"]["seeds"])


def save_plot(state, draw):
    """Draw a study's state into the PNG file beside its result file.

    draw   function of the state and of one or more panels (matplotlib Axes, side by side); its
           number of parameters says how many
    """
    from matplotlib.figure import Figure  # see tools/plot_loss.py

    count = len(inspect.signature(draw).parameters) - 1
    width = 8 if count < 3 else 11
    figure = Figure(figsize=(width, 4), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    draw(state, *panels)
    for panel in panels:
        panel.margins(y=0.12)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{result_name(state)}.png", dpi=110)


def label_points(panel, *points, offset=(6, -3)):
    """Write a text beside each point (text, x, y, colour), offset by typographic points.

    A text that would overlap the one below it is moved up.
    """
    panel.get_ylim()  # updates transData, which maps data to pixels
    lowest = float("-inf")
    for text, x, y, colour in sorted(points, key=lambda point: point[2]):
        height = panel.transData.transform((x, y))[1] * 72 / panel.figure.dpi
        lowest = max(height, lowest + LINE_HEIGHT)
        panel.annotate(
            text,
            xy=(x, y),
            xytext=(offset[0], offset[1] + lowest - height),
            textcoords="offset points",
            color=colour,
            fontsize="small",
        )
