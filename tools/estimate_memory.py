"""Compute (not measure) what a rank holds and sends under DDP, FSDP and HSDP. Needs no GPU.

    python -m tools.estimate_memory --n_layer=48 --n_head=25 --n_embd=1600 --world_size=8
    python -m tools.estimate_memory --model=model_rope --fsdp=True --shard_degree=4
    python -m tools.estimate_memory config/gpt2.py --world_size=4

Of a config file of train.py, the options that decide about memory are used. If it leaves vocab_size
to the dataset, add --vocab_size, which is GPT-2's by default.

Every quantity is one line with its formula, so that the table can be checked by hand. Activations,
what a forward pass keeps for the backward pass, come on top. They depend on the attention kernel
and on torch.compile: two steps of the run show them, as memory_gb in its log.jsonl.

ZeRO: Rajbhandari et al. 2020. FSDP: Zhao et al. 2023.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.estimate_memory")

from dataclasses import dataclass, replace

import torch

from common.device import pick_dtype
from common.errors import UserError, run_program
from common.models import make_config, model_module, models_with_option
from configurator import check_minimum, configure_with_model
from train import TrainConfig
from training.optimizer import OPTIMIZERS, hidden_matrices

FLOAT32 = 4  # bytes of a master weight, of its gradient, of each of AdamW's moments and of Muon's


@dataclass
class EstimateConfig(TrainConfig):  # so that a config file may set the other options, too
    # As in train.py
    model: str = "model"  # the model file, without .py
    batch_size: int = 16  # sequences per forward pass and process
    total_batch_size: int | None = None  # tokens per optimizer step; None: micro_steps decides
    optimizer: str = "adamw"  # adamw; muon: the matrices in blocks by Muon, the rest by AdamW
    dtype: str = "bfloat16"  # float32, bfloat16, float16
    fsdp: bool = False  # mark the column of FSDP instead of that of DDP
    shard_degree: int = 0  # ranks that hold one copy of the model, with fsdp; 0: all of them
    # Instead of torchrun
    world_size: int = 8  # ranks
    micro_steps: int | None = None  # passes of a rank per step; None: total_batch_size's, else 1


# Parameters, gradients, optimizer state, communication ----------------------------------------


def numel(parameters):
    """Return the number of elements of a list of parameters."""
    return sum(p.numel() for p in parameters)


def shard_numel(parameters, shard_degree):
    """Return the number of elements of a rank's shards of a list of parameters.

    fully_shard splits dimension 0 as torch.chunk does, and pads every shard to the largest.
    """
    total = 0
    for p in parameters:
        rows = -(-p.size(0) // shard_degree)  # of a shard, rounded up
        total += rows * (p.numel() // p.size(0))
    return total


def by_muon(model, config):
    """Return the parameters that Muon updates, none with optimizer=adamw."""
    return list(hidden_matrices(model)) if config.optimizer == "muon" else []


def estimate_ddp(model, config, dtype):
    """Return {quantity: bytes} of a DDP rank: every rank holds all."""
    parameters = list(model.parameters())
    multiplied = [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name]
    ranks = config.world_size

    column = {}
    # parameters = 4 P, for P parameters in float32.
    column["parameters"] = FLOAT32 * numel(parameters)
    # gradients = 4 P. DDP's buckets take no more, because the gradients are views of them.
    column["gradients"] = FLOAT32 * numel(parameters)
    # optimizer state = 8 P: AdamW's means of each gradient and of its square. Muon has one.
    column["optimizer state"] = FLOAT32 * (2 * numel(parameters) - numel(by_muon(model, config)))
    # parameters in dtype = size of dtype * weights of matrix products: autocast's copies, which the
    # backward pass needs too. Embeddings are looked up in float32; wte is also the head.
    copied = 0 if dtype == torch.float32 else numel(multiplied)
    column["parameters in dtype"] = dtype.itemsize * copied
    # unsharded gradients = 0: there are no shards.
    column["unsharded gradients"] = 0
    # sent = 2 (N - 1) / N * gradients, for N ranks: a ring all-reduce is a reduce-scatter and an
    # all-gather (ZeRO, section 7.1). Once per optimizer step, after the last micro-step.
    column["sent per step"] = 2 * (ranks - 1) / ranks * column["gradients"]
    return column


def estimate_fsdp(model, config, dtype, shard_degree):
    """Return {quantity: bytes} of an FSDP or HSDP rank.

    A replica is `shard_degree` ranks that hold one copy of the model together (ZeRO stage 3,
    section 5.3). With several replicas it is HSDP (FSDP, section 3.2.2).
    """
    parameters = list(model.parameters())
    blocks = [list(block.parameters()) for block in model.transformer.h]
    blocks.sort(key=numel)  # in our models all are equal
    in_blocks = [p for block in blocks for p in block]
    two_blocks = [p for block in blocks[-2:] for p in block]
    shard = shard_numel(parameters, shard_degree)
    shard_of_blocks = shard_numel(in_blocks, shard_degree)
    shard_of_root = shard - shard_of_blocks
    root = numel(parameters) - numel(in_blocks)  # the root group: embeddings and final norm
    replicas = config.world_size // shard_degree

    column = {}
    # As DDP, but of a shard: 4, 4 and 8 times P / S, for S = shard_degree (ZeRO, section 5.3).
    column["parameters"] = FLOAT32 * shard
    column["gradients"] = FLOAT32 * shard
    muon_shard = shard_numel(by_muon(model, config), shard_degree)
    column["optimizer state"] = FLOAT32 * (2 * shard - muon_shard)
    # parameters in dtype = size of dtype * S * shards of (root + 2 blocks). Gathered are the root
    # group for the whole pass, the block that computes, and the next one, which is prefetched
    # (FSDP, sections 3.2.1 and 3.3).
    gathered = shard_degree * (shard_of_root + shard_numel(two_blocks, shard_degree))
    column["parameters in dtype"] = dtype.itemsize * gathered
    # unsharded gradients = size of dtype * (root + 1 block), until they are reduce-scattered. If
    # there are several micro-steps, those of all parameters are summed in float32, 4 P, because
    # only the last micro-step communicates (FSDP, section 3.3.4).
    column["unsharded gradients"] = dtype.itemsize * (root + numel(blocks[-1]))
    if config.micro_steps > 1:
        column["unsharded gradients"] += FLOAT32 * numel(parameters)
    # sent: a ring sends S - 1 shards per all-gather and per reduce-scatter (ZeRO, section 7.2.2).
    # Forward passes gather all parameters; backward passes the blocks again, as the root group has
    # stayed. The gradient is reduce-scattered in float32, once per optimizer step.
    forward = config.micro_steps * (shard_degree - 1) * dtype.itemsize * shard
    backward = config.micro_steps * (shard_degree - 1) * dtype.itemsize * shard_of_blocks
    reduce_scatter = (shard_degree - 1) * FLOAT32 * shard
    # HSDP: then a ring all-reduce of the shard's gradient between the R replicas, 2 (R - 1) / R.
    all_reduce = 2 * (replicas - 1) / replicas * column["gradients"]
    # Muon: an all-gather of its updates, once per optimizer step, in float32 or else bfloat16.
    muon = (shard_degree - 1) * dtype.itemsize * muon_shard
    column["sent per step"] = forward + backward + reduce_scatter + all_reduce + muon
    return column


# The program ----------------------------------------------------------------------------------

TABLE = (  # the rows, in this order
    "parameters",
    "gradients",
    "optimizer state",
    "parameters in dtype",
    "unsharded gradients",
    "total without activations",
    "sent per step",
)


def add_total(column):
    """Return a column of the table with the sum of what is held."""
    held = sum(column.values()) - column["sent per step"]
    return column | {"total without activations": held}


def print_table(columns, marked):
    """Print {mode: {quantity: bytes}}; the mode `marked` is the one that the options choose."""
    largest = max(column["total without activations"] for column in columns.values())
    unit, divisor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    modes = [f"* {mode}" if mode == marked else mode for mode in columns]
    print(f"{unit:30}" + "".join(f"{mode:>14}" for mode in modes))
    for name in TABLE:
        cells = [f"{column[name] / divisor:>14,.3f}" for column in columns.values()]
        print(f"{name:30}" + "".join(cells))


def count_micro_steps(config, block_size):
    """Return how many forward and backward passes a rank does per optimizer step."""
    if config.micro_steps is not None or config.total_batch_size is None:
        return config.micro_steps or 1
    tokens = config.batch_size * block_size * config.world_size
    if config.total_batch_size % tokens:
        raise UserError(
            f"total_batch_size={config.total_batch_size} is not a multiple of batch_size x "
            f"block_size x world_size = {config.batch_size} x {block_size} x {config.world_size} "
            f"= {tokens}: choose another --world_size or --batch_size, or give --micro_steps"
        )
    return config.total_batch_size // tokens


def estimate(config, options):
    """Print the table of what a rank holds and sends; return {mode: {quantity: bytes}}."""
    ranks, shard_degree = config.world_size, config.shard_degree
    if shard_degree and not config.fsdp:
        raise UserError(f"shard_degree={shard_degree} needs --fsdp=True; DDP does not shard")
    if shard_degree and ranks % shard_degree:
        raise UserError(f"shard_degree={shard_degree} must divide world_size={ranks}")
    if config.optimizer not in OPTIMIZERS:
        raise UserError(f"optimizer={config.optimizer} must be {' or '.join(OPTIMIZERS)}")
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    module = model_module(config.model)
    shape = make_config(module, options)
    config = replace(config, micro_steps=count_micro_steps(config, shape.block_size))
    with torch.device("meta"):  # shapes without memory
        model = module.GPT(shape)

    columns = {
        "DDP": add_total(estimate_ddp(model, config, dtype)),
        "FSDP": add_total(estimate_fsdp(model, config, dtype, ranks)),
    }
    marked = "FSDP" if config.fsdp else "DDP"
    if shard_degree:
        marked = f"HSDP {ranks // shard_degree} x {shard_degree}"
        columns[marked] = add_total(estimate_fsdp(model, config, dtype, shard_degree))
    step = f"{config.micro_steps} x {config.batch_size} x {shape.block_size}"
    print(
        f"{config.model}, {numel(model.parameters()):,} parameters, {config.dtype} | "
        f"{ranks} ranks, each {step} tokens per step | *: chosen by the options"
    )
    print_table(columns, marked)
    return columns


def main(argv):
    config, options = configure_with_model(
        EstimateConfig,
        argv,
        __doc__,
        model_config=lambda config: model_module(config.model).GPTConfig,
        hint=models_with_option,
    )
    check_minimum(config, 1, "batch_size", "total_batch_size", "micro_steps", "world_size")
    check_minimum(config, 0, "shard_degree")
    return estimate(config, options)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
