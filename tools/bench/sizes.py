"""What a benchmark is given: the device, its seconds, and the sizes of what it measures."""

import time
from dataclasses import dataclass, field

import torch

from common.device import pick_dtype
from common.models import model_module
from tools.results.table import cell

WINDOW = 256  # of most cases of attention; a shorter one needs blocks from fewer tokens on


@dataclass
class Sizes:
    """The sizes of the benchmarks. The model is GPT-2 small with some options changed."""

    batch_size: int  # sequences of a training step
    model: dict = field(default_factory=dict)  # options of model.py in training steps
    sampled_model: dict = field(default_factory=dict)  # options of each model that samples
    read_bytes: int = 1 << 29  # of the tensor that is read: larger than the caches
    limit_seconds: float = 3  # for a limit that another benchmark needs
    streams: dict = field(default_factory=lambda: {1: 200, 10: 100})  # {streams: new tokens}
    decode_batches: tuple = (1, 10)  # samples of a decode step
    decode_position: int = 512  # of that step
    attention: tuple = (  # B, T, window
        (2, 256, 64),
        (2, 320, 64),
        (2, 512, 64),
        (2, 256, WINDOW),
        (2, 384, WINDOW),
        (2, 512, WINDOW),
        (2, 768, WINDOW),
        (2, 1000, WINDOW),
        (2, 1024, WINDOW),
        (1, 8192, WINDOW),
    )
    memory_lengths: tuple = (4096, 16384)  # tokens between which attention's memory grows
    run_steps: tuple = (200, 3)  # of the quickstart and of GPT-2 124M, for the overhead of a run
    # GPT-2's steps in that run: those of its config, or of one micro-step, which a CPU has time for
    keeps_total_batch_size: bool = False
    is_tiny: bool = False

    def config(self):
        return model_module("model").GPTConfig(**self.model)

    @property
    def tokens(self):
        return self.batch_size * self.config().block_size


# 124M parameters, 1024 tokens, and the padded vocabulary of config/gpt2.py, as nanoGPT has it too.
PADDED = {"vocab_size": 50304}
CPU = Sizes(2, PADDED)
CUDA = Sizes(32, PADDED, decode_batches=(1, 10, 100), keeps_total_batch_size=True)
TINY_MODEL = {"n_layer": 1, "n_head": 4, "n_embd": 16, "block_size": 32, "vocab_size": 64}
TINY = Sizes(
    2,
    model=TINY_MODEL,
    sampled_model=TINY_MODEL,
    read_bytes=1 << 16,
    limit_seconds=0,
    streams={1: 3, 2: 2},
    decode_batches=(1, 2),
    decode_position=20,
    attention=((1, 128, 32),),
    memory_lengths=(128, 192),
    run_steps=(2, 2),
    is_tiny=True,
)


@dataclass
class Bench:
    """What a benchmark is given, and where it reports."""

    device: torch.device
    deadline: float  # of time.monotonic(), for all that it does
    sizes: Sizes
    nanogpt: str | None = None  # directory of nanoGPT's programs
    position: int = 100_000  # of decode
    notes: list = field(default_factory=list)  # what was left out, and why

    def left(self):
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def limit_deadline(self):
        """Return the deadline of a short measurement of one of the machine's limits."""
        return time.monotonic() + self.sizes.limit_seconds

    def show(self, row):
        """Print a row and return it."""
        print(" | ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
        return row

    def note(self, text):
        """Print a line that belongs to the result."""
        self.notes.append(text)
        print(text, flush=True)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def dtypes(device):
    """Return float32 and, where the hardware computes it fast, bfloat16."""
    fast = pick_dtype("auto", device)
    return [torch.float32] if fast == torch.float32 else [torch.float32, fast]
