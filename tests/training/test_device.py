"""common/device.py: which device and dtype a run uses, its peak FLOP/s, and out of memory.

Also training.report.out_of_memory_advice, which says how to need less memory.
"""

import re
from types import SimpleNamespace

import pytest
import torch

from common.device import (
    is_out_of_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    set_precision,
    use_cudnn_attention,
)
from common.errors import UserError
from training import report

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def attention_switches():
    """Restore what use_cudnn_attention sets."""
    enabled, tag = torch.backends.cuda.cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag
    yield
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    torch.compiler.config.cache_key_tag = tag


@pytest.mark.parametrize(
    ("device", "enabled", "expected"),
    [("cuda", False, False), ("cuda", True, True), ("cpu", False, True)],
)
def test_attention_of_cudnn_is_switched_for_cuda_only(
    attention_switches, device, enabled, expected
):
    torch.backends.cuda.enable_cudnn_sdp(device == "cpu")
    use_cudnn_attention(torch.device(device), enabled)
    assert torch.backends.cuda.cudnn_sdp_enabled() == expected


def test_compiled_graphs_with_and_without_attention_of_cudnn_are_cached_apart(
    monkeypatch, attention_switches
):
    """torch's cache knows neither the switch nor the variable: this tag is part of its key."""
    tags = set()
    for enabled, variable in ((True, "0"), (False, "0"), (True, "1")):
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", variable)
        use_cudnn_attention(torch.device("cuda"), enabled)
        tags.add(torch.compiler.config.cache_key_tag)
    assert len(tags) == 3


@pytest.mark.parametrize("name, index", [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_chosen_by_its_index(monkeypatch, name, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    assert pick_device(name) == torch.device("cuda", index)
    assert chosen == [index]


@pytest.mark.parametrize("capability, dtype", [((7, 5), FP32), ((8, 0), BF16), ((9, 0), BF16)])
def test_auto_is_bfloat16_on_gpus_that_are_fast_with_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize(
    "features, dtype", [({}, FP32), ({"amx_bf16": True}, BF16), ({"avx512_bf16": True}, BF16)]
)
def test_auto_is_bfloat16_on_cpus_that_are_fast_with_it(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_dtype("auto", torch.device("cpu")) == dtype


def test_auto_is_float32_on_apple_gpus():
    assert pick_dtype("auto", torch.device("mps")) == FP32


@pytest.mark.parametrize(
    "name, dtype, flops",
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989e12),
        ("NVIDIA A100-SXM4-80GB", BF16, 312e12),
        ("NVIDIA H100 PCIe", BF16, 756e12),
        ("NVIDIA H200", BF16, 989e12),
        ("NVIDIA H200 NVL", BF16, 835e12),
        ("NVIDIA GH200 480GB", BF16, 989e12),
        ("NVIDIA B200", BF16, 2250e12),
        ("NVIDIA B300 SXM6 AC", BF16, 2250e12),
        ("NVIDIA GB200", BF16, 2500e12),
        ("NVIDIA GB300", BF16, 2500e12),
        ("NVIDIA L4", BF16, 121e12),
        ("NVIDIA L40S", BF16, 362e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", BF16, 504e12),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", BF16, 439e12),
        # Relatives of a known device, which must not get its figure.
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", BF16, None),
        ("NVIDIA H100", BF16, None),
        ("NVIDIA H100 96GB HBM3", BF16, None),
        ("NVIDIA GB10", BF16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA H100 80GB HBM3", FP32, None),
    ],
)
def test_only_known_devices_have_peak_flops(monkeypatch, name, dtype, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), dtype) == flops


def test_an_allocation_that_a_cpu_cannot_make_is_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 55)
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_library_of_cuda_that_gets_no_memory_is_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(text))


def test_cuda_out_of_memory_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("whatever the wording"))


def test_another_runtime_error_is_not_out_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def advice(batch_size, world_size=1):
    """Return the advice for 24 sequences of 16 tokens per optimizer step."""
    config = SimpleNamespace(
        total_batch_size=24 * 16, batch_size=batch_size, activation_checkpointing=False
    )
    return report.out_of_memory_advice(config, 16, world_size)


@pytest.mark.parametrize(("batch_size", "smaller"), [(12, 8), (3, 2)])
def test_the_advice_is_the_largest_smaller_batch_that_divides(batch_size, smaller):
    assert re.search(rf"--batch_size={smaller}\b", advice(batch_size))


def test_the_advice_for_a_batch_of_one_is_activation_checkpointing():
    assert "--activation_checkpointing=True" in advice(1)
    assert "--batch_size=" not in advice(1)


def test_the_advice_divides_the_sequences_of_a_step_by_the_world_size():
    assert re.search(r"--batch_size=4\b", advice(6, world_size=2))


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


def test_each_rank_has_its_own_gpu(two_gpus):
    assert [pick_device("auto", rank).index for rank in (0, 1)] == [0, 1]


def test_more_ranks_than_gpus_are_refused_with_the_number_of_gpus(two_gpus):
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        pick_device("auto", 2)


@pytest.mark.parametrize(
    ("name", "usable"), [("mps", r"--device=cpu\b"), ("cuda:1", r"--device=cuda(?!:)")]
)
def test_a_device_that_several_ranks_cannot_use_is_refused(monkeypatch, name, usable):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        pick_device(name, local_rank=0)
    assert f"device={name}" in str(error.value)
    assert re.search(usable, str(error.value))


def test_several_ranks_use_the_cpu_and_not_one_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", local_rank=0) == torch.device("cpu")


@pytest.mark.parametrize("deterministic, precision", [(False, "high"), (True, "highest")])
def test_float32_products_use_tf32_on_cuda_unless_deterministic(
    monkeypatch, deterministic, precision
):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_precision(torch.device("cuda", 0), deterministic)
    assert chosen == [precision]


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_products_stay_as_they_are_on_a_cpu(monkeypatch, deterministic):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_precision(torch.device("cpu"), deterministic)
    assert chosen == []


def test_deterministic_algorithms_end_with_the_run_that_asked_for_them():
    set_precision(torch.device("cpu"), deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    set_precision(torch.device("cpu"), deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
