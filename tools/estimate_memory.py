"""Compute (not measure) what a rank holds and sends under DDP, FSDP and HSDP. Needs no GPU.

    python -m tools.estimate_memory --n_layer=48 --n_head=25 --n_embd=1600 --world_size=8

Parameters and traffic follow from shapes; activations are counted in a forward pass on fake tensors, which have shapes
and no memory. torch.compile may keep less.
"""

import sys

if __name__ == "__main__" and not __package__:
    sys.exit("error: run it from the repository root as: python -m tools.estimate_memory")

from collections import ChainMap
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensorMode

from common.device import pick_dtype
from common.errors import UserError, program
from common.models import model_module, models_with_option
from configurator import check_range, configure_with_model


@dataclass
class EstimateConfig:
    # As in train.py
    model: str = "model"  # the model file, without .py
    batch_size: int = 16  # sequences per forward pass and process
    dtype: str = "bfloat16"  # float32, bfloat16, float16
    fsdp: bool = False  # mark FSDP's column rather than DDP's
    shard_degree: int = 0  # ranks that share one copy of the model, with fsdp; 0: all of them
    # Instead of torchrun and total_batch_size
    world_size: int = 8  # ranks
    micro_steps: int = 1  # forward and backward passes of a rank per optimizer step


def shard_numel(params, ranks):
    """Elements of a rank's shards: fully_shard splits dim 0 as torch.chunk does, and pads to the largest."""
    return sum(-(-p.size(0) // ranks) * (p.numel() // p.size(0)) for p in params)


def rank_bytes(params, blocks, copies, size, S, config):
    """Bytes that a rank holds, by kind, and those that it sends in an optimizer step.

    S = 0, DDP: all, and autocast's copies of weights. Sends 2 (N - 1) / N of the gradient, by a ring all-reduce (ZeRO,
    Rajbhandari et al. 2020, section 7.1).
    S > 0, FSDP, S ranks share all (ZeRO stage 3, sections 5.3, 7.2.2; Zhao et al. 2023, section 3.2). Whole, in dtype:
    weights outside blocks and of two blocks (one computes, one is fetched ahead), gradients outside and of one; whole,
    in float32 as fully_shard adds them up: gradients of earlier micro-steps. Sends (S - 1) / S of the weights for each
    forward, of the blocks' for each backward, of the gradient; then 2 (R - 1) / R of its share, to R = N / S copies."""
    N, whole = config.world_size, 4 * shard_numel(params, 1)
    part, weights, unshared, sent = whole, copies, 0, 2 * (N - 1) / N * whole
    if S:
        part, shares, R = (
            4 * shard_numel(params, S),
            sorted(shard_numel(block, S) for block in blocks),
            N // S,
        )
        weights = size * S * (part // 4 - sum(shares[:-2]))
        unshared = size * (
            shard_numel(params, 1) - sum(sorted(shard_numel(block, 1) for block in blocks)[:-1])
        )
        unshared += whole if config.micro_steps > 1 else 0
        sent = (S - 1) * (config.micro_steps * size * (part // 4 + sum(shares)) + part) + 2 * (
            R - 1
        ) / R * part
    names = (
        "parameters",
        "gradients",
        "AdamW's moments",
        "weights in dtype",
        "unsharded gradients",
    )
    return dict(zip(names, (part, part, 2 * part, weights, unshared), strict=True)), sent


def storages(args):
    """{identity: storage} of tensors, alone or in tuples: views of one another have one."""
    tensors = (
        t for arg in args for t in (arg if isinstance(arg, tuple) else (arg,)) if t is not None
    )
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def is_copy(tensor):
    """Whether a tensor is a parameter, cast and viewed: a copy that autocast has made."""
    node = tensor.grad_fn
    while node and node.name() in (
        "ToCopyBackward0",
        "TBackward0",
        "TransposeBackward0",
        "ViewBackward0",
    ):
        node = node.next_functions[0][0]
    return bool(tensor.grad_fn and node and "AccumulateGrad" in node.name())


def activations(model, tokens, dtype):
    """Bytes that a forward on tokens (B, T) keeps for the backward pass: (all, with checkpointing, copies of weights).

    By autocast, as under DDP; by itself where the model is in dtype, as under FSDP. With checkpointing (Chen et al.
    2016, section 4): all blocks' inputs, what lies outside, and one block. torch.compile may keep less. Dropout takes
    attention from its T x 1 to T x T on CPUs, and so here."""
    parameters, calls, saved = storages(model.parameters()), [], []
    for module in (
        *model.transformer.h,
        model.transformer.ln_f,
    ):  # where a block begins, and what follows the last
        module.register_forward_pre_hook(lambda module, args: calls.append(args))

    def nbytes(*groups):
        return sum(
            storage.nbytes() for key, storage in ChainMap(*groups).items() if key not in parameters
        )

    autocast = torch.autocast("cpu", dtype, enabled=next(model.parameters()).dtype != dtype)
    with (
        autocast,
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append((len(calls), t)) or t, lambda t: t
        ),
    ):
        model(tokens, tokens)
    copies = storages(t for _, t in saved if is_copy(t))
    groups = [
        storages(t for i, t in saved if i == n and not is_copy(t)) for n in range(len(calls) + 1)
    ]
    (before, *blocks, after), inputs = groups, storages(arg for args in calls for arg in args)
    return (
        nbytes(*groups),
        max(nbytes(before, inputs, block, after) for block in blocks),
        nbytes(copies),
    )


def estimate(config, options):
    """Print a table of what a rank holds, by mode; return its columns as dicts."""
    N, S, module = config.world_size, config.shard_degree, model_module(config.model)
    dtype = pick_dtype(config.dtype, torch.device("cpu"))
    if S and (not config.fsdp or N % S):
        raise UserError(f"shard_degree={S} needs --fsdp=True and must divide world_size={N}")
    try:
        shape = module.GPTConfig(**options)
    except ValueError as error:
        raise UserError(str(error)) from error
    with FakeTensorMode():
        model, cast = module.GPT(shape), module.GPT(shape)
        cast.load_state_dict(
            {name: p.to(dtype) for name, p in cast.state_dict().items()}, assign=True
        )
        tokens = torch.zeros(config.batch_size, shape.block_size, dtype=torch.int64)
        *ddp, copies = activations(model, tokens, dtype)
        *fsdp, _ = activations(cast, tokens, dtype)
    params, blocks = (
        list(model.parameters()),
        [list(block.parameters()) for block in model.transformer.h],
    )
    tokens_per_step = f"{config.micro_steps} x {config.batch_size} x {shape.block_size} tokens"
    print(
        f"{config.model}, {shard_numel(params, 1):,} parameters, {config.dtype}, {N} ranks with {tokens_per_step} each "
        "per step; *: the mode of these options"
    )
    modes = {"DDP": 0, "FSDP": N} | ({f"HSDP {N // S} x {S}": S} if S else {})
    columns = []
    for mode, ranks in modes.items():
        asked = ranks == (S or N if config.fsdp else 0)
        column, sent = rank_bytes(params, blocks, copies, dtype.itemsize, ranks, config)
        always = sum(column.values())
        for how, kept in zip(("", ", checkpointed"), fsdp if ranks else ddp, strict=True):
            column[f"activations{how}"] = kept
            column[f"  per token{how}"] = kept / tokens.numel()
            column[f"total{how}"] = always + kept
        columns.append({"mode": f"* {mode}" if asked else mode} | column | {"sent per step": sent})
    for name in columns[0]:
        unit, size = ("MB", 1e6) if "token" in name else ("GB", 1e9)
        values = [column[name] for column in columns]
        cells = (
            values
            if name == "mode"
            else [f"{value / size:#,.3g}".rstrip(".") + f" {unit}" for value in values]
        )
        print(f"{name:30}" + "".join(f"{cell:>16}" for cell in cells))
    return columns


@program
def main(argv):
    config, options = configure_with_model(
        EstimateConfig,
        argv,
        __doc__,
        model_config=lambda config: model_module(config.model).GPTConfig,
        hint=models_with_option,
    )
    check_range(config, 1, "batch_size", "micro_steps", "world_size")
    check_range(config, 0, "shard_degree")
    return estimate(config, options)


if __name__ == "__main__":
    main(sys.argv[1:])
