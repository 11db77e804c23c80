"""Write the tables of README.md and of docs/REPORT.md, RECIPES.md and others; redraw the plots.

    python -m experiments.report

A block between the lines "<!-- begin WHAT -->" and "<!-- end -->" is what a function returns:

    costs.sizes cpu     sizes() of experiments/costs.py, for docs/experiments/costs_cpu.json
    bench decode cpu    bench("decode", "cpu") of this file; so are made, texts, times and changes

All other text is written by hand.
"""

import difflib
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, run_program
from configurator import configure
from experiments.study import DOCS, save_plot
from tools.bench.results import describe_source, markdown_rows, markdown_table

DOCUMENTS = (
    Path("README.md"),
    Path("docs/REPORT.md"),
    Path("docs/RECIPES.md"),
    Path("docs/SAMPLES.md"),
)
BLOCK = re.compile(r"<!-- begin ([^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass
class ReportConfig:
    """No options."""


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_results(name, preset):
    """Return the state of a finished study."""
    path = DOCS / f"{name}_{preset}.json"
    if not path.exists():
        raise UserError(f"no {path}: python -m experiments.{name} --preset={preset} makes it")
    return read_json(path)


# Blocks ---------------------------------------------------------------------------------------


def made(name, result):
    """Return the plot of a study, and how, where and with what its results were made.

    result   the preset, followed by _DATASET if it is not the preset's
    """
    state = read_results(name, result)
    machine, versions = state["machine"], state["versions"]
    commits = sorted(set(state.get("commits", {}).values())) or [state["commit"]]
    commits = ", ".join(f"`{commit[:10]}`" for commit in commits)
    command = f"python -m experiments.{name} --preset={state['preset']}"
    if state.get("dataset"):
        command += f" --dataset={state['dataset']}"
    file = f"{name}_{result}"
    image = ""
    if (DOCS / f"{file}.png").exists():
        image = f"![{name}](experiments/{file}.png)\n\n"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{image}Made by `{command}` at commit {commits}: "
        f"[{file}.json](experiments/{file}.json). {machine['device']}, {threads}, "
        f"{machine['dtype']}, torch {versions['torch']}, Python {versions['python']}."
    )


def texts(name, preset):
    """Return the points of a study whose points are texts."""
    blocks = []
    for key, text in read_results(name, preset)["points"].items():
        blocks.append(f"{key}:\n\n```\n{text.rstrip()}\n```")
    return "\n\n".join(blocks)


def times(preset):
    """Return a table of the minutes that the studies of a preset took."""
    rows = []
    total = 0.0
    for path in sorted(DOCS.glob(f"*_{preset}.json")):
        state = read_json(path)
        seconds = state.get("seconds", {})
        command = f"`python -m experiments.{state['experiment']} --preset={preset}`"
        threads = state["machine"]["threads"]
        if seconds.keys() == state["points"].keys():
            minutes = sum(seconds.values()) / 60
            total += minutes
            rows.append([command, threads, f"{minutes:.1f}"])
        else:  # an earlier file, without seconds
            rows.append([command, threads, "not recorded"])
    rows.append(["all that were recorded", "", f"{total:.1f}"])
    return markdown_table(["command", "threads", "minutes"], rows)


def bench(name, device):
    """Return the rows of docs/bench/NAME-DEVICE.json, and how they were made."""
    results = read_json(Path(f"docs/bench/{name}-{device}.json"))
    return f"{markdown_rows(results['rows'])}\n\n{describe_source(results)}"


def changes(name):
    """Return the diff from model.py to another model file, without its file names."""
    old = Path("model.py").read_text(encoding="utf-8").splitlines()
    new = Path(f"{name}.py").read_text(encoding="utf-8").splitlines()
    diff = difflib.unified_diff(old, new, n=0, lineterm="")
    lines = [line for line in diff if not line.startswith(("---", "+++"))]
    return "\n".join(
        [
            "<details><summary>The diff</summary>",
            "",
            "```diff",
            *lines,
            "```",
            "",
            "</details>",
        ]
    )


BLOCKS = {"made": made, "texts": texts, "times": times, "bench": bench, "changes": changes}


# Documents ------------------------------------------------------------------------------------


def make_block(what, *arguments):
    """Return the text of a block; what and arguments are the words of its first line."""
    if "." not in what:
        return BLOCKS[what](*arguments)
    name, function = what.split(".")
    module = importlib.import_module(f"experiments.{name}")
    make_table = getattr(module, function)
    return make_table(read_results(name, *arguments))


def fill(text):
    """Return a document with all of its blocks made again."""

    def replacement(match):
        words = match[1]
        return f"<!-- begin {words} -->\n{make_block(*words.split())}\n<!-- end -->"

    return BLOCK.sub(replacement, text)


def main(argv):
    configure(ReportConfig, argv, __doc__)
    for path in DOCUMENTS:
        text = fill(path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")
        print(path)
    for path in sorted(DOCS.glob("*.json")):
        state = read_json(path)
        module = importlib.import_module(f"experiments.{state['experiment']}")
        if hasattr(module, "draw"):
            save_plot(state, module.draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
