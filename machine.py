"""The machine: which device and number format to use, how fast it could be, its memory, and its signals."""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time

import torch

from configurator import UserError

DTYPES = ("float32", "bfloat16", "float16")
# Dense bfloat16 and float16 matrix products, FLOP/s, by the vendor's data sheets; the names as patterns, matched whole.
PEAK_FLOPS = {"NVIDIA A100.*": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA L40S": 362e12}
PEAK_FLOPS |= {"NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


def pick_device(name, local_rank=None):
    """The torch.device of an option; auto is the best that is there; of several ranks each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cpu" if name == "mps" and local_rank is not None else name
    if name.partition(":")[0] not in ("cuda", "mps", "cpu"):
        raise UserError(f"device={name} is none of auto, cuda, cuda:N, mps, cpu")
    if local_rank is not None and name.partition(":")[0] == "mps":
        raise UserError("device=mps is for one process: --device=cpu, or without torchrun")
    if local_rank is not None and name.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"device={name} is one GPU for several processes: --device=cuda gives each its own")
    if name == "cuda" and local_rank is not None:
        count = torch.cuda.device_count()
        if 0 < count <= local_rank:
            raise UserError(f"{count} GPUs are here, not one for each process: --nproc_per_node={count} at most")
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # compiled kernels run on the current one
    except Exception as error:  # what a missing device raises depends on how torch was built
        raise UserError(f"device={name} is not there: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name, device):
    """The torch.dtype of an option; auto is bfloat16 where matrix products in it are fast, else float32."""
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"dtype={name} is none of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (has.get("amx_bf16") or has.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def device_name(device):
    """What the device is called: the GPU's own name, cpu or mps."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device):
    """The most memory held so far, in GB: of tensors on CUDA, of the process on a CPU (None on Windows); on MPS, the
    memory held now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    with contextlib.suppress(OSError, TypeError), open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read())[1]) * 1024 / 1e9
    try:
        import resource  # not on Windows; on Linux it would count the process that started this one too
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def keep_freed_memory():
    """Have glibc keep what tensors free, rather than return it to the kernel, which then hands out zeroed pages anew:
    worth a quarter of the step on a CPU. Elsewhere there is no mallopt, and nothing happens."""
    with contextlib.suppress(AttributeError, TypeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and leave them there


def peak_flops(device, dtype):
    """How fast the device can multiply matrices in this dtype, FLOP/s; None where that is not known."""
    name = device_name(device) if dtype in (torch.bfloat16, torch.float16) else ""
    return next((flops for pattern, flops in PEAK_FLOPS.items() if re.fullmatch(pattern, name)), None)


def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice: each device says it in other words."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


def out_of_memory(config, block_size, size=1):
    """What to do where memory does not suffice on one of `size` ranks: a batch_size that keeps total_batch_size."""
    sequences = config.total_batch_size // block_size // size
    smaller = [n for n in range(1, config.batch_size) if sequences % n == 0]
    help = [f"--batch_size={smaller[-1]} keeps total_batch_size={config.total_batch_size}"] if smaller else []
    help += [] if config.activation_checkpointing else ["--activation_checkpointing=True"]
    return f"out of memory with batch_size={config.batch_size}: " + (", or ".join(help) or "take a smaller block_size")


class Stop:
    """Notes the first SIGTERM or SIGINT, for the loop to end well; a second one ends the process at once."""

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number, frame):
        if self.asked:
            # what stops torchrun and its workers reaches these twice, as torchrun passes it on
            if "RANK" not in os.environ or time.monotonic() - self.first > 1:
                os._exit(128 + number)
            return
        self.asked, self.first = True, time.monotonic()
        with contextlib.suppress(OSError):  # who reads our output may have got the signal too, and be gone
            os.write(2, b"\nstopping at the next micro-step; a second signal ends at once\n")

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
