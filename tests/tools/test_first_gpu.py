"""tools/first_gpu.sh: its options, its tests and its benchmarks exist. DRY=1 runs it on a CPU."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

from torch.distributed.run import get_args_parser
from variants import MODELS

import sample
import train
from common.models import model_module
from tools.bench import __main__ as bench

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "tools/first_gpu.sh").read_text(encoding="utf-8")
OF_OTHERS = {"query-gpu", "format", "tb"}  # options of nvidia-smi and pytest


def test_bash_can_parse_it():
    subprocess.run(["bash", "-n", ROOT / "tools/first_gpu.sh"], check=True)


def test_its_options_exist():
    configs = [train.TrainConfig, sample.SampleConfig, bench.BenchConfig]
    configs += [model_module(model).GPTConfig for model in MODELS]
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    known |= {flag.lstrip("-") for flag in get_args_parser()._option_string_actions}
    used = set(re.findall(r"--([a-z][\w-]*)", SCRIPT)) - OF_OTHERS
    assert used and used <= known


def test_its_benchmarks_exist():
    used = re.findall(r"^bench [\w-]+ \d+ (\w+)", SCRIPT, re.M)
    assert used and set(used) <= bench.BENCHMARKS.keys()


def test_its_parts_hold_every_test_of_the_gpu():
    """pytest -k "a or b" takes the tests whose names contain a or b.

    Of "a and b", b is part of a parameter.
    """
    [path] = set(re.findall(r"tests/\S+\.py", SCRIPT))
    nodes = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    tests = [node.name for node in nodes if getattr(node, "name", "").startswith("test_")]
    parts = re.findall(r'^at_once gpu_tests [\w-]+ "(.+?)"', SCRIPT, re.M)
    words = [word.split(" and ")[0] for part in parts for word in part.split(" or ")]
    assert [word for word in words if not any(word in test for test in tests)] == []
    assert [test for test in tests if not any(word in test for word in words)] == []
