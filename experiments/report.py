"""Put the tables of README.md and docs/REPORT.md in step with the result files, and draw these anew.

    python -m experiments.report

Between a line "<!-- begin WHAT -->" and "<!-- end -->" stands what a function below, or one of an experiment, makes of
the results (table.sizes cpu: of docs/experiments/table_cpu.json). All other text is written by hand.
"""

import difflib
import importlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, program
from configurator import configure
from experiments.study import DOCS, markdown, plot

DOCUMENTS = (Path("README.md"), Path("docs/REPORT.md"))


@dataclass
class ReportConfig:
    """No options."""


def results(name, preset):
    """The state of a finished study."""
    path = DOCS / f"{name}_{preset}.json"
    if not path.exists():
        raise UserError(f"no {path}: python -m experiments.{name} --preset={preset} makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def made(name, preset):
    """Where a study's figures come from, and its plot."""
    state, file = results(name, preset), f"experiments/{name}_{preset}"
    machine, versions = state["machine"], state["versions"]
    plot = f"![{name}]({file}.png)\n\n" if (DOCS / f"{name}_{preset}.png").exists() else ""
    return (
        f"{plot}Made by `python -m experiments.{name} --preset={preset}` at commit `{state['commit'][:10]}`: "
        f"[{name}_{preset}.json]({file}.json). {machine['device']}, {machine['threads']} threads, {machine['dtype']}, "
        f"torch {versions['torch']}, Python {versions['python']}."
    )


def texts(name, preset):
    """The points of a study that are texts, as they are."""
    return "\n\n".join(
        f"{key}:\n\n```\n{text.rstrip()}\n```"
        for key, text in results(name, preset)["points"].items()
    )


def bench(name):
    """The rows of docs/bench/NAME.json: a table for each kind of row."""
    about, kinds = json.loads(Path(f"docs/bench/{name}.json").read_text(encoding="utf-8")), {}
    for row in about["rows"]:
        kinds.setdefault(tuple(row), []).append(
            [f"{v:.4g}" if isinstance(v, float) else v for v in row.values()]
        )
    tables = [
        markdown([key.replace("_", " ") for key in header], rows) for header, rows in kinds.items()
    ]
    where = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
    note = f"Made by `python -m tools.bench {name}`, {where}."
    return "\n\n".join([*tables, note])


def changes(name):
    """The changed lines of a model file against model.py."""
    old, new = (
        Path(f).read_text(encoding="utf-8").splitlines() for f in ("model.py", f"{name}.py")
    )
    lines = [
        line
        for line in difflib.unified_diff(old, new, n=0, lineterm="")
        if not line.startswith(("---", "+++"))
    ]
    return (
        "<details><summary>The diff</summary>\n\n```diff\n"
        + "\n".join(lines)
        + "\n```\n\n</details>"
    )


def fill(text):
    """A document with its blocks made anew."""

    def block(match):
        what, *arguments = match[1].split()
        if "." in what:
            module, function = what.split(".")
            new = getattr(importlib.import_module(f"experiments.{module}"), function)(
                results(module, *arguments)
            )
        else:
            new = {"made": made, "texts": texts, "bench": bench, "changes": changes}[what](
                *arguments
            )
        return f"<!-- begin {match[1]} -->\n{new}\n<!-- end -->"

    return re.sub(r"<!-- begin ([^\n]*?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


@program
def main(argv):
    configure(ReportConfig, argv, __doc__)
    for path in DOCUMENTS:
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
    for path in sorted(DOCS.glob("*.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        module = importlib.import_module(f"experiments.{state['experiment']}")
        if hasattr(module, "draw"):
            plot(state, module.draw)


if __name__ == "__main__":
    main(sys.argv[1:])
