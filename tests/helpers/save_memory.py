"""Measure the memory that a save of a checkpoint needs."""

import ctypes
import re
from pathlib import Path

from faults import run_in

import train
from common import checkpoint
from common.distributed import ProcessGroup
from training.optimizer import make_optimizer


def save_memory(folder, n_layer, n_embd, file_bytes):
    """Save a GPT-2 in a forked process; return the bytes of its state and of the extra memory."""

    def measure():
        checkpoint.FILE_BYTES = file_bytes
        module = train.model_module("model")
        config = module.GPTConfig(n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd)
        model = module.GPT(config)
        optimizer = make_optimizer(model, train.TrainConfig())
        checkpoint.get_state_dict(model, optimizer)  # allocates the optimizer state
        ctypes.CDLL(None).malloc_trim(0)  # gives freed memory back, as it would be used again
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        state = {"step": 1, "metrics": {}}
        checkpoint.save_checkpoint("saved", model, optimizer, state, ProcessGroup(60))
        print(sum(3 * p.nbytes for p in model.parameters()), memory("VmHWM") - before)

    return [int(number) for number in run_in(folder, measure).out.split()]


def memory(name):
    """Return the bytes of a field of this process's memory in /proc."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\s*(\d+) kB", status)[1])
