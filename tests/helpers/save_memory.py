"""Measure the memory that a save of a checkpoint needs, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


# A program that prints the bytes of a GPT-2's state, and how much its memory grows in a save.
MEASURE_SAVE = """
import ctypes
import re
import sys
from pathlib import Path

import train
from common import checkpoint, run_dir
from common.distributed import ProcessGroup
from training.optimizer import make_optimizer

n_layer = int(sys.argv[1])
n_embd = int(sys.argv[2])
checkpoint.FILE_BYTES = float(sys.argv[3])
module = train.model_module("model")
model = module.GPT(module.GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd))
optimizer = make_optimizer(model, train.TrainConfig())
checkpoint.get_state_dict(model, optimizer)  # allocates the optimizer state


def memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", status)[1])


ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, as it would be used again
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
state = {"step": 1, "metrics": {}}
checkpoint.save_checkpoint("saved", model, optimizer, state, ProcessGroup(60))
print(sum(3 * p.nbytes for p in model.parameters()), memory("VmHWM") - before)
"""


def save_memory(n_layer, n_embd, file_bytes):
    """Save a GPT-2 in a new process; return the bytes of its state and of the extra memory."""
    command = [sys.executable, "-c", MEASURE_SAVE, str(n_layer), str(n_embd), str(file_bytes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.check_output(command, env=environment, text=True)
    return [int(number) for number in output.split()]
