"""pytest -n 8: pytest-xdist divides the tests among processes, which must see the GPU, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TEST = """
import os
import pytest

@pytest.mark.gpu
def test_visible():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
"""


def test_the_tests_of_the_gpu_see_it_in_a_worker_of_xdist(tmp_path):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_visible.py").write_text(TEST)
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment["CUDA_VISIBLE_DEVICES"] = "7"
    folders = [TESTS.parent, TESTS, TESTS / "helpers"]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    line = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", "1", "-m", "gpu"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
