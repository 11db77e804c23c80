"""The idea of the exercise fsdp: each rank holds a shard, and gathers one block at a time."""

import functools

import pytest
import torch
from exercises import missing, version_fixture
from forked import on_ranks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training_exercises import compare_with_one_process
from variants import make, tokens

import model_rope
from common.distributed import ProcessGroup
from training.parallel import load_initial_weights

module = version_fixture("fsdp")
pytestmark = pytest.mark.usefixtures("workdir")
CPU = torch.device("cpu")


def shard(module, dtype=torch.float32, shard_degree=0):
    """Return a small model on the meta device, sharded over the ranks, and the process group."""
    group = ProcessGroup(timeout=60)
    with torch.device("meta"):
        model = make(model_rope)
    try:
        module.shard_model(model, group, CPU, dtype, shard_degree)
    except RuntimeError:
        if isinstance(model, FSDPModule) and not isinstance(model.transformer["h"][0], FSDPModule):
            missing(
                "the model is sharded before its blocks, and so has their parameters, too: call "
                "fully_shard for each block, then for the model, which takes what is left"
            )
        raise
    return model, group


def describe_shards(module):
    """Return what a rank holds: {parameter: (its rows, those of the shard)}, and a list of bools.

    The bools say which blocks are FSDP modules of their own.
    """
    model, _ = shard(module)
    rows = {}
    for name, p in model.named_parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        rows[name] = (p.size(0), local.size(0))
    return rows, [isinstance(block, FSDPModule) for block in model.transformer["h"]]


@functools.cache
def shards(module):
    """Return describe_shards() of each of two ranks."""
    return on_ranks(2, describe_shards, module, case="sharding the model")


def test_each_rank_holds_half_of_the_rows_of_each_parameter(module):
    for rank, (rows, are_sharded) in enumerate(shards(module)):
        for name in sorted(rows, key=lambda name: "c_attn.weight" not in name):  # a block's first
            total, held = rows[name]
            half = -(-total // 2) if rank == 0 else total // 2
            if held == half:
                continue
            cause = "block 0 is not sharded"
            if ".h." not in name:
                cause = "the blocks are sharded, but not the model with its embedding"
            elif are_sharded[0]:
                cause = "the mesh of block 0 must have both ranks in its dimension of shards"
            missing(
                f"rank {rank} holds {held} of the {total} rows of "
                f"{name.removeprefix('transformer.')}, but must hold {half}: {cause}"
            )


def test_each_block_is_sharded_by_itself(module):
    blocks = shards(module)[0][1]
    if not all(blocks):
        missing(
            f"block {blocks.index(False)} is not sharded by itself, so all {len(blocks)} blocks "
            "would be gathered at once: call fully_shard for each block, then for the model"
        )


def pass_of_rank(module):
    """Take a bfloat16 forward and backward pass; return what the ranks computed with."""
    model, group = shard(module, torch.bfloat16)
    load_initial_weights(model, make(model_rope).state_dict(), group, CPU)
    block = model.transformer["h"][0]
    record = {}

    def note_inputs(block, inputs):
        x, cos, _, _ = inputs
        record["parameters"] = str(block.attn.c_attn.weight.dtype)
        record["angles"] = str(cos.dtype)
        if x.dtype != torch.bfloat16 and record["parameters"] == "torch.bfloat16":
            missing(
                f"block 0 gets {x.dtype} from the embedding in a bfloat16 run: give mp_policy to "
                "fully_shard for the model, too"
            )

    block.register_forward_pre_hook(note_inputs)
    idx = tokens(2, 16, seed=group.rank)
    loss = model(idx, idx)
    record["is_resharded"] = isinstance(block.attn.c_attn.weight, DTensor)
    loss.backward()
    gradients = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])
    # The sum of two bfloat16 numbers rarely is one, unless it was rounded to one.
    record["are_rounded"] = torch.equal(gradients, gradients.bfloat16().float())
    return record


@functools.cache
def record(module):
    """Return pass_of_rank() of rank 0 of two."""
    return on_ranks(2, pass_of_rank, module, case="a forward and backward pass")[0]


def test_blocks_compute_with_parameters_in_the_dtype_of_the_run(module):
    dtype = record(module)["parameters"]
    if dtype != "torch.bfloat16":
        missing(
            f"block 0 computes with {dtype} parameters in a bfloat16 run: "
            "MixedPrecisionPolicy(param_dtype=dtype)"
        )


def test_rotary_angles_stay_float32(module):
    dtype = record(module)["angles"]
    if dtype != "torch.float32":
        missing(
            f"RoPE's angles reach block 0 in {dtype}, not torch.float32: "
            "MixedPrecisionPolicy(cast_forward_inputs=False)"
        )


def test_gradients_are_reduced_in_float32(module):
    if record(module)["are_rounded"]:
        missing("gradients are reduced in bfloat16, not float32: reduce_dtype=torch.float32")


def test_a_block_is_freed_after_its_forward_pass(module):
    if not record(module)["is_resharded"]:
        missing(
            "rank 0 still holds all parameters of block 0 after its forward pass: "
            "reshard_after_forward must be True"
        )


def mesh_of_rank(module):
    """Return the mesh of ranks that each hold a copy of the model, and the rows of c_attn."""
    model, _ = shard(module, shard_degree=1)
    weight = model.transformer["h"][0].attn.c_attn.weight
    return weight.device_mesh.mesh.tolist(), weight.size(0), weight.to_local().size(0)


def test_shard_degree_is_the_number_of_ranks_that_hold_one_copy(module):
    mesh, rows, held = on_ranks(2, mesh_of_rank, module, case="shard_degree=1 on two ranks")[0]
    replicas = "shard_degree=1 on two ranks makes two replicas, of one shard each"
    if mesh != [[0], [1]]:
        missing(f"{replicas}: the mesh must be [[0], [1]], not {mesh}")
    if held != rows:
        missing(
            f"{replicas}: rank 0 must hold {rows} of the {rows} rows of c_attn.weight, not {held}"
        )


def test_a_run_of_two_ranks_is_that_of_one_process(module):
    compare_with_one_process(module, "FSDP", fsdp=True)
