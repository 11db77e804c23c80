"""Compute (not measure) what a rank holds and sends under DDP, FSDP and HSDP. Needs no GPU.

    python -m tools.estimate_memory --n_layer=48 --n_head=25 --n_embd=1600 --world_size=8
    python -m tools.estimate_memory --model=model_rope --fsdp=True --shard_degree=4
    python -m tools.estimate_memory config/gpt2.py --world_size=4

Of a config file of train.py, the options that decide about memory are used. If it leaves vocab_size
to the dataset, add --vocab_size, which is GPT-2's by default.

Every quantity is one line with its formula, so that the table can be checked by hand. Activations
are what a forward pass keeps for the backward pass, as uncompiled PyTorch keeps it: torch.compile
keeps less, and the temporary tensors of a pass come on top. For a model file of your own they are
approximate, as only its Linear layers, norms and attention are counted (within 15 % for SwiGLU).

ZeRO: Rajbhandari et al. 2020. FSDP: Zhao et al. 2023. Activation checkpointing: Chen et al. 2016.

Shapes: B batch, T tokens, C channels, H query heads, G KV heads, D = C / H channels of a head,
W window, V vocabulary.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.estimate_memory")

from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

from common.device import pick_dtype
from common.errors import UserError, run_program
from common.models import make_config, model_module, models_with_option
from configurator import check_minimum, configure_with_model
from train import TrainConfig
from training.optimizer import OPTIMIZERS, hidden_matrices

FLOAT32 = 4  # bytes of a master weight, of its gradient, of each of AdamW's moments and of Muon's
INT64 = 8  # bytes of a token id


@dataclass
class EstimateConfig:
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
    """Return {quantity: bytes} of a DDP rank, without activations: every rank holds all."""
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
    """Return {quantity: bytes} of an FSDP or HSDP rank, without activations.

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


# Activations ----------------------------------------------------------------------------------


def attention_bytes(module, shape, B, T, itemsize):
    """Return the bytes that attention keeps of a batch, in one block, without its output.

    module     the model file; the block sizes of SWA are among its constants
    shape      its GPTConfig
    itemsize   bytes of an element of the computation's dtype

    FlashAttention keeps q, k, v, the output and one logsumexp per query and head, but no T x T
    matrix (Dao 2023, section 3.1). A view costs nothing beyond the tensor that it is a view of.
    """
    C, H = shape.n_embd, shape.n_head
    G = getattr(shape, "n_kv_head", H)
    qkv = C + 2 * G * (C // H)  # channels of c_attn's output
    rope = hasattr(shape, "rope_theta")
    gqa = hasattr(shape, "n_kv_head")
    if rope and gqa:
        channels = C + 2 * C  # q rotated; k, v repeated for all query heads
    elif rope:
        channels = qkv + 2 * C  # v is a view of c_attn's output; q, k rotated
    elif gqa:
        channels = qkv + 2 * C  # q is a view of c_attn's output; k, v repeated
    else:
        channels = qkv  # q, k, v are views of c_attn's output
    if rope:
        channels += C  # the output, whose heads c_proj needs side by side: a copy
    logsumexp = FLOAT32 * H
    total = B * T * (itemsize * channels + logsumexp)
    if getattr(shape, "window", T) < T and hasattr(module, "MAX_DENSE_QUERIES"):
        total += itemsize * window_numel(module, shape, B, T)
    return total


def window_numel(module, shape, B, T):
    """Return the elements that sliding windows, shorter than T, add to full attention (SWA).

    A mask is kept in the dtype of the computation, once for the whole batch.
    """
    C, W = shape.n_embd, shape.window
    size = min(max(W, module.MIN_BLOCK), module.MAX_BLOCK)  # queries of a block
    m = -(-(W - 1) // size)  # earlier blocks that a block attends to, rounded up
    n = (T - m * size) // size  # blocks
    if T <= module.MAX_DENSE_QUERIES or n < 1:
        return T * T  # one mask over all pairs
    T_before = T - n * size  # the queries before the blocks
    total = size * (m + 1) * size  # one mask for all blocks
    if T_before > W:
        total += T_before * T_before  # a mask for the queries before; else is_causal needs none
    total += 2 * B * n * (m + 1) * size * C  # k and v: each block's, with those of m blocks before
    if not hasattr(shape, "rope_theta"):
        total += B * T * C  # the outputs of all blocks, joined: the copy that RoPE makes anyway
        if B > 1:
            total += B * n * size * C  # q, cut into blocks; if B = 1 or rotated, by a view
    return total


def block_bytes(module, shape, block, B, T, itemsize, stream_itemsize):
    """Return the bytes that one block keeps of a batch.

    itemsize          bytes of an element of the computation's dtype
    stream_itemsize   of the residual stream: float32 under autocast (DDP), else the dtype

    For model.py in bfloat16 under FSDP with dropout it is 34 C + 8 + 4 H per token: Korthikanti et
    al. 2022, section 4.1, count 34 C besides the T x T matrices, which FlashAttention avoids.
    """
    C = shape.n_embd
    per_token = 0
    for name, layer in block.named_modules():
        if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            # Its input, one mean and one deviation (on a GPU these two are always float32).
            per_token += stream_itemsize * (C + 2)
        if isinstance(layer, nn.Linear):
            per_token += itemsize * layer.in_features  # its input
            is_residual = name.endswith("c_proj")  # the residual addition keeps nothing
            if not is_residual and not name.startswith("attn."):
                per_token += itemsize * layer.out_features  # GELU's input
            if is_residual and shape.dropout > 0:
                per_token += C  # the mask, of one byte per element on a GPU
    return B * T * per_token + attention_bytes(module, shape, B, T, itemsize)


def outside_bytes(shape, model, B, T, itemsize, stream_itemsize):
    """Return the bytes that the embeddings, the final norm, the head and the loss keep."""
    C, V = shape.n_embd, shape.vocab_size
    per_token = INT64 + INT64  # token ids: wte's input, and the targets
    per_token += stream_itemsize * (C + 2)  # the final norm: its input, a mean and a deviation
    per_token += itemsize * C  # the head's input
    per_token += FLOAT32 * V  # cross entropy: log-probabilities, in float32 in every dtype
    if shape.dropout > 0:
        per_token += C  # the mask of the embeddings' dropout
    per_position = 0
    if hasattr(model.transformer, "wpe"):
        per_position += INT64  # wpe's input
    if hasattr(shape, "rope_theta"):
        per_position += FLOAT32 * (C // shape.n_head)  # cos and sin of D / 2 angles
    return B * T * per_token + T * per_position


def estimate_activations(module, model, B, T, itemsize, stream_itemsize):
    """Return {quantity: bytes} of what a forward pass of a batch keeps for the backward pass."""
    shape = model.config
    blocks = [
        block_bytes(module, shape, block, B, T, itemsize, stream_itemsize)
        for block in model.transformer.h
    ]
    block_input = stream_itemsize * B * T * shape.n_embd
    outside = outside_bytes(shape, model, B, T, itemsize, stream_itemsize)

    column = {}
    column["activations outside blocks"] = outside
    column["activations of one block"] = max(blocks)  # in our models all are equal
    # activations = outside blocks + n_layer * one block.
    column["activations"] = outside + sum(blocks)
    # checkpointed = outside blocks + (n_layer - 1) * input of a block + one block, which is the one
    # that the backward pass recomputes (Chen et al. 2016, section 4).
    inputs = (len(blocks) - 1) * block_input
    column["activations, checkpointed"] = outside + inputs + max(blocks)
    return column


# The program ----------------------------------------------------------------------------------

TABLE = (  # the rows, in this order
    "parameters",
    "gradients",
    "optimizer state",
    "parameters in dtype",
    "unsharded gradients",
    "activations outside blocks",
    "activations of one block",
    "activations",
    "total",
    "activations, checkpointed",
    "total, checkpointed",
    "sent per step",
)


def add_totals(states, activations):
    """Return one column of the table: what is always held, activations, and their sums."""
    held = sum(states.values()) - states["sent per step"]
    column = states | activations
    column["total"] = held + activations["activations"]
    column["total, checkpointed"] = held + activations["activations, checkpointed"]
    return column


def print_table(columns, marked):
    """Print {mode: {quantity: bytes}}; the mode `marked` is the one that the options choose."""
    largest = max(column["total"] for column in columns.values())
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

    B, T = config.batch_size, shape.block_size
    # Under autocast the embeddings, and all that is added to them, are float32. FSDP computes
    # everything in dtype.
    ddp_activations = estimate_activations(module, model, B, T, dtype.itemsize, FLOAT32)
    fsdp_activations = estimate_activations(module, model, B, T, dtype.itemsize, dtype.itemsize)
    columns = {
        "DDP": add_totals(estimate_ddp(model, config, dtype), ddp_activations),
        "FSDP": add_totals(estimate_fsdp(model, config, dtype, ranks), fsdp_activations),
    }
    marked = "FSDP" if config.fsdp else "DDP"
    if shard_degree:
        marked = f"HSDP {ranks // shard_degree} x {shard_degree}"
        states = estimate_fsdp(model, config, dtype, shard_degree)
        columns[marked] = add_totals(states, fsdp_activations)
    print(
        f"{config.model}, {numel(model.parameters()):,} parameters, {config.dtype} | "
        f"{ranks} ranks, each {config.micro_steps} x {B} x {T} tokens per step | "
        "*: chosen by the options"
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
        ignored_in_files={field.name for field in fields(TrainConfig)},
    )
    check_minimum(config, 1, "batch_size", "total_batch_size", "micro_steps", "world_size")
    check_minimum(config, 0, "shard_degree")
    return estimate(config, options)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
