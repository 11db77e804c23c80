"""common/device.py: what each device is called, can do, and says when its memory is full."""

from types import SimpleNamespace

import pytest
import torch

import train
from common.device import (
    is_out_of_memory,
    peak_flops,
    pick_device,
    pick_dtype,
    set_float32_precision,
)
from common.errors import UserError

BF16, FP32 = torch.bfloat16, torch.float32


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
def test_auto_is_bfloat16_on_gpus_that_compute_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize(
    "has, dtype", [({}, FP32), ({"amx_bf16": True}, BF16), ({"avx512_bf16": True}, BF16)]
)
def test_auto_is_bfloat16_on_cpus_that_compute_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_dtype("auto", torch.device("cpu")) == dtype


def test_auto_is_float32_on_apple_gpus():
    assert pick_dtype("auto", torch.device("mps")) == FP32


@pytest.mark.parametrize(
    "name, dtype, flops",
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989e12),
        ("NVIDIA A100-SXM4-80GB", BF16, 312e12),
        ("NVIDIA H100 PCIe", BF16, None),  # slower, and not listed
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA H100 80GB HBM3", FP32, None),
    ],
)
def test_only_known_devices_have_a_peak(monkeypatch, name, dtype, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), dtype) == flops


def test_memory_that_a_cpu_cannot_give_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 55)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    "batch_size, advice", [(12, "=8 keeps"), (3, "=2 keeps"), (1, "--activation_checkpointing=")]
)
def test_the_advice_is_the_largest_smaller_batch_that_divides(batch_size, advice):
    config = SimpleNamespace(
        total_batch_size=24 * 16, batch_size=batch_size, activation_checkpointing=False
    )
    assert advice in train.out_of_memory_advice(config, 16)


def test_the_advice_shares_a_step_s_sequences_out_over_the_ranks():
    config = SimpleNamespace(total_batch_size=24 * 16, batch_size=6, activation_checkpointing=False)
    assert "=4 keeps" in train.out_of_memory_advice(config, 16, world_size=2)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [pick_device("auto", rank).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        pick_device("auto", 2)


@pytest.mark.parametrize(("name", "message"), [("mps", "device=mps"), ("cuda:1", "--device=cuda ")])
def test_a_device_that_several_processes_cannot_use_is_refused(monkeypatch, name, message):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        pick_device(name, local_rank=0)


def test_several_processes_choose_the_cpu_rather_than_one_apple_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", local_rank=0) == torch.device("cpu")


@pytest.mark.parametrize("deterministic, precision", [(False, "high"), (True, "highest")])
def test_float32_products_use_tf32_on_cuda_unless_deterministic(
    monkeypatch, deterministic, precision
):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    set_float32_precision(torch.device("cuda", 0), deterministic)
    set_float32_precision(torch.device("cpu"), deterministic)  # whose precision stays as it is
    assert chosen == [precision]
