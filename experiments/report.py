"""Write the tables of README.md and of the files in docs/ from the result files; redraw the plots.

    python -m experiments.report

A block between the lines "<!-- begin WHAT -->" and "<!-- end -->" is what a function returns:

    costs.sizes cpu     sizes() of experiments/costs.py, for docs/experiments/costs_cpu.json
    bench decode        bench("decode") of this file; so are made and times

All other text is written by hand.
"""

import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, run_program
from configurator import configure
from experiments.study import DOCS
from tools.results.plot import save_lines
from tools.results.result_file import describe_source, read_result
from tools.results.table import markdown_rows, markdown_table

BENCH = Path("docs/bench")
BLOCK = re.compile(r"<!-- begin ([^\n]*?) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass
class ReportConfig:
    """No options."""


def documents():
    return [Path("README.md"), *sorted(Path("docs").glob("*.md"))]


def read_experiment(name, preset):
    """Return the result of a finished study, and its path.

    preset   followed by _DATASET if it is not the preset's
    """
    path = DOCS / f"{name}_{preset}.json"
    if not path.exists():
        raise UserError(f"no {path}: python -m experiments.{name} --preset={preset} makes it")
    return read_result(path), path


# Blocks ---------------------------------------------------------------------------------------


def image(name, path):
    """Return the plot beside a result file, followed by an empty line; "" if there is none."""
    plot = path.with_suffix(".png")
    return f"![{name}]({plot.parent.name}/{plot.name})\n\n" if plot.exists() else ""


def made(name, preset):
    """Return the plot of a study, and how, where and with what its results were made."""
    result, path = read_experiment(name, preset)
    return image(name, path) + describe_source(result, path)


def times(preset):
    """Return a table of the minutes that the studies of a preset took, and their longest points.

    A point is what --only and --seeds with one row and one seed measure.
    """
    rows = []
    total = 0.0
    for path in sorted(DOCS.glob(f"*_{preset}.json")):
        result = read_result(path)
        seconds = result.get("seconds", {})
        row = [f"`{result['command']}`", result["machine"]["threads"]]
        if seconds.keys() == result["values"].keys():
            minutes = [value / 60 for value in seconds.values()]
            total += sum(minutes)
            rows.append([*row, f"{max(minutes):.1f}", f"{sum(minutes):.1f}"])
        else:  # an earlier file, without seconds
            rows.append([*row, "not recorded", "not recorded"])
    rows.append(["all that were recorded", "", "", f"{total:.1f}"])
    header = ["command", "threads", "minutes of the longest point", "minutes in all"]
    return markdown_table(header, rows)


def bench(name):
    """Return, for each device, the plot of a benchmark, its rows, and how they were made."""
    blocks = []
    for path in sorted(BENCH.glob(f"{name}-*.json")):
        result = read_result(path)
        parts = [markdown_rows(result["values"])]
        parts += [f"{note}." for note in result["notes"]]
        parts.append(describe_source(result, path))
        blocks.append(image(name, path) + "\n\n".join(parts))
    return "\n\n".join(blocks)


BLOCKS = {"made": made, "times": times, "bench": bench}


# Documents ------------------------------------------------------------------------------------


def make_block(what, *arguments):
    """Return the text of a block; what and arguments are the words of its first line."""
    if "." not in what:
        return BLOCKS[what](*arguments)
    name, function = what.split(".")
    module = importlib.import_module(f"experiments.{name}")
    make_table = getattr(module, function)
    result, _ = read_experiment(name, *arguments)
    return make_table(result)


def fill(text):
    """Return a document with all of its blocks made again."""

    def replacement(match):
        words = match[1]
        return f"<!-- begin {words} -->\n{make_block(*words.split())}\n<!-- end -->"

    return BLOCK.sub(replacement, text)


def main(argv):
    configure(ReportConfig, argv, __doc__)
    for path in documents():
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            path.write_text(filled, encoding="utf-8")
            print(path)
    for path in sorted(DOCS.glob("*.json")):
        result = read_result(path)
        module = importlib.import_module(f"experiments.{result['name']}")
        if hasattr(module, "draw"):
            save_lines(result, module.draw, path.with_suffix(".png"))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
