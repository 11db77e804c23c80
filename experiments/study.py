"""A study: points that are measured once, row by row, and the tables and the plot made of them.

Each point is stored in out/experiments/NAME_PRESET.json as soon as it is measured, so the same
command resumes an interrupted study. The file of a finished study is copied to docs/experiments/,
where its plot is drawn beside it; so is that of an unfinished one after each row, unless docs have
more points. With --only or --seeds nothing is written into docs. Processes with different --seeds
or --only can measure one study at the same time.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.device import keep_freed_memory, pick_device, pick_dtype
from common.errors import UserError
from common.files import lock
from tools.results.plot import save_lines
from tools.results.result_file import describe, read_result, write_result

OUT = Path("out/experiments")
DOCS = Path("docs/experiments")


@dataclass
class StudyConfig:
    preset: str = "cpu"  # cpu: minutes on two cores; cpu_long: nights; gpu: hours on one GPU
    dataset: str = ""  # in data/; default: the preset's
    only: str = ""  # one row of the table, such as "GQA 1/4"; default: all
    seeds: str = ""  # some of the preset's seeds, such as 1,2; default: all
    overwrite: bool = False  # measure the stored points of this study again


@dataclass
class Point:
    """One measurement: the value is measure(*arguments), which JSON must be able to hold."""

    row: str  # of the table
    key: str  # in the result file
    measure: Callable
    arguments: tuple


class Study:
    """One experiment: its config, its device, the points to measure and their values.

    name      the experiment is experiments/NAME.py
    options   a filled StudyConfig
    presets   {preset: config}; each config is a dataclass, perhaps with a dtype and with seeds
    """

    def __init__(self, name, options, presets):
        if options.preset not in presets:
            raise UserError(f"preset={options.preset} must be one of {', '.join(presets)}")
        self.config = presets[options.preset]
        if options.dataset:
            self.config = with_dataset(self.config, options.dataset)
        self.options = options
        self.seeds = chosen_seeds(options.seeds, getattr(self.config, "seeds", ()))
        self.device = pick_device("cuda" if options.preset == "gpu" else "cpu")
        keep_freed_memory(self.device)
        self.dtype = pick_dtype(getattr(self.config, "dtype", "auto"), self.device)
        self.points = []
        self.result = self._describe(name)
        self.path = OUT / f"{file_stem(self.result)}.json"
        if options.overwrite:
            self.path.unlink(missing_ok=True)
        else:
            self._report_stored()
            self._add_stored()

    def _describe(self, name):
        """Return the result of the study, without values."""
        preset, dataset = self.options.preset, self.options.dataset
        command = f"python -m experiments.{name} --preset={preset}"
        if dataset:
            command += f" --dataset={dataset}"
        result = describe(name, command, {"preset": preset, "dataset": dataset}, self.device)
        result["machine"]["dtype"] = str(self.dtype).removeprefix("torch.")
        result["config"] = asdict(self.config)
        # commits and seconds of each point; a run that several points use counts once
        result |= {"values": {}, "commits": {}, "seconds": {}}
        return json.loads(json.dumps(result))  # as a file has it: tuples become lists

    def _changes(self, stored):
        """Return the names of what differs in the stored result: config, versions, machine."""
        changed = [key for key in ("config", "versions") if stored[key] != self.result[key]]
        for key in ("device", "cpu", "threads", "dtype"):
            if stored["machine"].get(key) != self.result["machine"][key]:
                changed.append(key)
        return changed

    def _report_stored(self):
        """Print whether the stored points are of another config, machine or commit."""
        if not self.path.exists():
            return
        stored = read_result(self.path)
        changed = self._changes(stored)
        if changed:
            names = " and ".join(changed)
            print(f"{self.path} was measured with another {names}: measuring all points again")
            return
        others = set(stored["commits"].values()) - {self.result["commit"]}
        if others:
            names = ", ".join(sorted(commit[:10] for commit in others))
            print(f"{self.path} has points of commit {names}: --overwrite=True measures them again")

    def _add_stored(self):
        """Add the stored points, unless they were measured with another config or elsewhere.

        Points of another commit are kept, because a long study takes many days.
        """
        if self.path.exists():
            stored = read_result(self.path)
            if not self._changes(stored):
                for key in ("values", "commits", "seconds"):
                    for point, value in stored[key].items():
                        self.result[key].setdefault(point, value)

    def add(self, row, key, measure, *arguments):
        """Add a point to measure."""
        self.points.append(Point(row, key, measure, arguments))

    def add_seeds(self, rows, measure, *arguments):
        """Add points measure(config, row, seed, *arguments): for each row, one for each seed."""
        for row in rows:
            for seed in self.seeds:
                self.add(row, seed_key(row, seed), measure, self.config, row, seed, *arguments)

    def run(self, *tables, draw=None):
        """Measure what is not stored, row by row, and print the tables.

        tables   functions from a result to a text
        draw     function from a result, and the panels of the plot
        """
        is_part = bool(self.options.only or self.options.seeds)
        for _ in self._measure_rows():
            if not is_part and not self._is_published_further():
                self._publish(draw)
        shown = self.result
        if self.seeds:
            shown = shown | {"config": shown["config"] | {"seeds": list(self.seeds)}}
        for table in tables:
            print(f"\n{table(shown)}")
        if is_part:
            print(f"\n{self.path}; without --only and --seeds the same command writes {DOCS}/")
        else:
            self._publish(draw)
            print(f"\n{DOCS / self.path.name}")

    def _measure_rows(self):
        """Measure the points that are not stored; yield after each row of which some were not."""
        only = self.options.only
        rows = list(dict.fromkeys(point.row for point in self.points))
        if only and only not in rows:
            raise UserError(f"only={only} must be one of the rows: {', '.join(rows)}")
        chosen = [point for point in self.points if only in ("", point.row)]
        waiting = [point for point in chosen if point.key not in self.result["values"]]
        print(f"{len(chosen) - len(waiting)} of {len(chosen)} points are stored", flush=True)
        remaining = len(waiting)
        for row in rows:
            of_row = [point for point in waiting if point.row == row]
            for point in of_row:
                remaining -= 1
                print(f"\nmeasuring {point.key}; after it {remaining} remain", flush=True)
                self._measure(point)
            if of_row:
                yield row

    def _measure(self, point):
        """Measure a point and store its value."""
        start = time.perf_counter()
        value = point.measure(*point.arguments)
        self.result["values"][point.key] = value
        self.result["seconds"][point.key] = time.perf_counter() - start
        self.result["commits"][point.key] = self.result["commit"]
        with lock(self.path.with_suffix(".lock"), on_busy=lambda: None):
            self._add_stored()  # another process may have stored points in the meantime
            write_result(self.path, self.result)
        print(f"{point.key}: {json.dumps(value)}"[:300], flush=True)

    def _is_published_further(self):
        """Return whether docs have more points than this study, which is unfinished, has so far."""
        path = DOCS / self.path.name
        return path.exists() and len(read_result(path)["values"]) > len(self.result["values"])

    def _publish(self, draw):
        """Write the result file into docs and, with a draw function, its plot."""
        path = DOCS / self.path.name
        write_result(path, self.result)
        if draw is not None:
            save_lines(self.result, draw, path.with_suffix(".png"))


def with_dataset(config, dataset):
    """Return a config of runs whose dataset is another. Raises UserError if it has no runs."""
    if not hasattr(config, "run"):
        raise UserError(f"dataset={dataset}: this experiment trains on no dataset of your choice")
    return replace(config, run=config.run | {"dataset": dataset})


def chosen_seeds(text, seeds):
    """Return the seeds that the option names, all if it is empty."""
    if not text:
        return tuple(seeds)
    known = {str(seed): seed for seed in seeds}
    names = text.split(",")
    if not set(names) <= known.keys():
        raise UserError(f"seeds={text} must be some of {','.join(known) or 'none'}")
    return tuple(known[name] for name in names)


def file_stem(result):
    """Return the name of a study's files: NAME_PRESET, or NAME_PRESET_DATASET."""
    parts = [result["name"], result["options"]["preset"], result["options"]["dataset"]]
    return "_".join(part for part in parts if part)


# Values of a result ---------------------------------------------------------------------------


def seed_key(row, seed):
    return f"{row}, seed {seed}"


def complete_rows(result, rows):
    """Return {row: values of all seeds}, without the rows that an unfinished study lacks."""
    complete = {}
    for row in rows:
        keys = [seed_key(row, seed) for seed in result["config"]["seeds"]]
        if result["values"].keys() >= set(keys):
            complete[row] = [result["values"][key] for key in keys]
    return complete


def texts(result):
    """Return the values of a study whose values are texts, in Markdown."""
    blocks = []
    for key, text in result["values"].items():
        blocks.append(f"{key}:\n\n```\n{text.rstrip()}\n```")
    return "\n\n".join(blocks)
