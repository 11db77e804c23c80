"""The device of a run: which one, which dtype is fast on it, its peak FLOP/s, and its memory."""

import contextlib
import ctypes
import os
import re
import sys

import torch

from common.cpu import cpu_features
from common.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
# Peak TFLOP/s of dense bfloat16 matrix products with float32 accumulation, by the vendors' data
# sheets and architecture white papers (half of a figure "with sparsity"); for V100, T4 and Quadro
# RTX of float16. The names are regular expressions that must match the whole device name.
PEAK_TFLOPS = {
    # Data center
    "NVIDIA (GB200|GB300)": 2500,
    "NVIDIA (B200|B300 SXM6 AC)": 2250,
    "NVIDIA (GH200.*|H200|H100 80GB HBM3|H800)": 989,
    "NVIDIA H200 NVL|NVIDIA H100 NVL": 835,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H20": 148,
    "NVIDIA (A100|A800).*": 312,
    "NVIDIA A30": 165,
    "NVIDIA A40": 150,
    "NVIDIA A10": 125,
    "NVIDIA A10G": 70,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L20": 119.5,
    "NVIDIA L4": 121,
    "Tesla V100-SXM2.*": 125,
    "Tesla V100-PCIE.*": 112,
    "Tesla T4": 65,
    # Workstations
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 504,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 439,
    "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA RTX A6000": 155,
    "NVIDIA RTX A5000": 111,
    "NVIDIA RTX A4000": 77,
    # GeForce
    "NVIDIA GeForce RTX 5090": 209,
    "NVIDIA GeForce RTX 5080": 113,
    "NVIDIA GeForce RTX 5070 Ti": 88,
    "NVIDIA GeForce RTX 5070": 62,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 4080 SUPER": 104,
    "NVIDIA GeForce RTX 4080": 97,
    "NVIDIA GeForce RTX 4070 Ti": 80,
    "NVIDIA GeForce RTX 4070": 58,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 3070": 41,
    # AMD
    "AMD Instinct MI300X.*": 1307,
    "AMD Instinct MI250X.*": 191.5,  # of one of its two dies, which are two devices
}


def pick_device(name, local_rank=None):
    """Return the torch.device for an option; "auto" is cuda, mps or cpu, the first that works.

    With a local_rank (under torchrun) each rank gets a GPU of its own. Raises UserError if the
    device does not exist or cannot serve several ranks.
    """
    if name == "auto":
        name = _best_device_type(local_rank)
    kind = name.partition(":")[0]
    if kind not in ("cuda", "mps", "cpu"):
        raise UserError(f"device={name} must be one of auto, cuda, cuda:N, mps, cpu")
    if local_rank is not None:
        name = _device_of_rank(name, local_rank)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)  # compiled kernels run on the current device
    except Exception as error:  # its type depends on how torch was built
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not available: {reason}") from error
    return device


def _best_device_type(local_rank):
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available() and local_rank is None:
        return "mps"
    return "cpu"


def _device_of_rank(name, local_rank):
    """Return the device name of a rank. Raises UserError if ranks would have to share a device."""
    if name.startswith("mps"):
        raise UserError("device=mps works with one process only: use --device=cpu or omit torchrun")
    if name.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(
            f"device={name} is one GPU for several ranks: --device=cuda gives each rank its own"
        )
    if name != "cuda":
        return name
    count = torch.cuda.device_count()
    if 0 < count <= local_rank:
        raise UserError(
            f"{count} GPUs are not enough for local rank {local_rank}: use "
            f"--nproc_per_node={count} at most"
        )
    return f"cuda:{local_rank}"


def pick_dtype(name, device):
    """Return the torch.dtype for an option; "auto" is bfloat16 where the hardware computes it fast.

    Fast means CUDA compute capability 8.0 and later, and CPUs with AMX or AVX512-BF16. Elsewhere
    "auto" is float32.
    """
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"dtype={name} must be one of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        features = cpu_features()
        fast = features.get("amx_bf16") or features.get("avx512_bf16")
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def set_precision(device, deterministic):
    """Choose between speed and reproducible bits, on CUDA.

    Without `deterministic`, float32 matrix products use TF32 (10 mantissa bits). With it they do
    not, and torch uses deterministic algorithms only.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(deterministic)  # also ends those of an earlier run
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only, and slow


def use_cudnn_attention(device, enabled):
    """Enable or disable cuDNN's attention kernels on CUDA, which torch prefers on H100 and later.

    They are fast in training. But for each new number of keys, as in decoding, they build a plan
    (pytorch/pytorch#155958), and with a mask their gradients can be NaN (pytorch/pytorch#196678).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        # A compiled graph calls one kernel, and the key of torch's cache of graphs does not tell
        # which. This variable has the same effect as enabled=False.
        deprioritized = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED")
        torch.compiler.config.cache_key_tag = f"cudnn_attention={enabled} {deprioritized}"


def device_name(device):
    """Return the GPU's own name, or "cpu" or "mps"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device):
    """Return the peak memory so far in GB: tensors on CUDA, the whole process on a CPU.

    On MPS it is the memory allocated now. None on Windows CPUs.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    with contextlib.suppress(OSError, TypeError), open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read())[1]) * 1024 / 1e9
    try:
        import resource  # not on Windows; on Linux ru_maxrss includes the parent process's peak
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def to_device(tensor, device):
    """Copy a batch to the device; to CUDA from pinned memory, which overlaps with computation.

    A prefetched batch is pinned already; pin_memory() then returns the tensor itself.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)  # MPS could read the source of a non-blocking copy after it is freed


def keep_freed_memory(device):
    """Make glibc keep freed memory in the process, if the device is a CPU.

    By default glibc returns large freed tensors to the kernel, which zeroes the pages again at the
    next allocation: a quarter of a training step's time on a CPU. Other systems stay as they are.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, TypeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX = 0: take large blocks from the heap too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def peak_flops(device, dtype):
    """Return the device's peak FLOP/s in this dtype, or None if it is not known."""
    if dtype == torch.float32:
        return None
    name = device_name(device)
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.fullmatch(pattern, name):
            return tflops * 1e12
    return None


def is_out_of_memory(error):
    """Return whether an exception means that memory ran out; often only its words tell."""
    words = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "size calculation over",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    is_known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return is_known or any(text in str(error) for text in words)
