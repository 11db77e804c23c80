"""How a model is prepared for training: DDP, FSDP, HSDP, activation checkpointing, torch.compile.

    python train.py config/quickstart.py                                                one process
    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py              DDP
    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py --fsdp=True  FSDP

Every rank has its own sequences of the global batch. DDP keeps the full model on every rank and
averages the gradients. FSDP shards parameters, gradients and optimizer state over the ranks, and
gathers the parameters of one block at a time. docs/DISTRIBUTED.md compares them.

train.py calls the functions in this order:

    prepare_blocks          check the model; activation checkpointing; with FSDP: shard
    load_initial_weights    in a new run; else a checkpoint is loaded, with the optimizer state
    wrap_ddp                without FSDP
    prepare_forward         compile; with DDP: settle its gradient buckets
    gradient_sync           around each micro-step
"""

import contextlib
import sys
from dataclasses import replace

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from common.cpu import use_float32_attention, wants_float32_attention
from common.device import is_out_of_memory, to_device
from common.errors import UserError
from common.models import model_module
from training.optimizer import hidden_matrices

# Before the weights ---------------------------------------------------------------------------


def check_model(model, config):
    """Raise UserError if a model breaks a rule of docs/YOUR_OWN_VARIANT.md that training needs.

    config   train.py's options

    What gets no gradient is found by check_gradients, after the first backward pass.
    """
    name = config.model
    blocks = getattr(getattr(model, "transformer", None), "h", None)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise UserError(f"{name}.py: GPT needs transformer.h, an nn.ModuleList of its blocks")
    for buffer, _ in model.named_buffers():
        raise UserError(f"{name}.py: {buffer} is a buffer: compute it in the forward pass")
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor):  # on the meta device it has no values
                path = f"{module_name}.{attribute}".lstrip(".")
                raise UserError(
                    f"{name}.py: {path} is a tensor, not a parameter: compute it in the "
                    "forward pass"
                )
    first_path = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        if p in first_path:
            raise UserError(
                f"{name}.py: {path} and {first_path[p]} are the same parameter: assign it to one "
                "module, and call that module"
            )
        first_path[p] = path
        if p.dtype != torch.float32:
            raise UserError(f"{name}.py: {path} is {p.dtype}: parameters must be float32")
        if config.fsdp and p.dim() == 0:
            raise UserError(
                f"{name}.py: fsdp=True cannot shard {path}, which has no dimension: give it one, "
                "as in torch.ones(1)"
            )
    if config.optimizer == "muon" and not hidden_matrices(model):
        raise UserError(f"{name}.py: its blocks have no matrices for Muon: use --optimizer=adamw")


def check_loss(run, loss):
    """Collective. End the run unless a forward pass with targets returned the loss alone."""
    is_tensor = isinstance(loss, torch.Tensor)
    if not is_tensor or loss.dim() > 0:
        kind = f"shape {tuple(loss.shape)}" if is_tensor else type(loss).__name__
        run.group.exit(
            f"{run.config.model}.py: GPT.forward(idx, targets) must return the mean loss alone, a "
            f"tensor without dimensions, not {kind}"
        )


def check_gradients(run):
    """Collective. End the run if a backward pass gave a parameter no gradient.

    Such a parameter has no optimizer state to save, and DDP would wait for its gradient.
    """
    for name, p in run.model.named_parameters():
        if p.requires_grad and p.grad is None:
            run.group.exit(
                f"{run.config.model}.py: {name} got no gradient: use it in every forward pass, or "
                "give it requires_grad=False"
            )


def prepare_blocks(model, config, group, device, dtype):
    """Collective. Check the model, wrap its blocks' forward passes and, with FSDP, shard it.

    config   train.py's options
    group    the ProcessGroup
    dtype    of the computation

    The model may be on the meta device.
    """
    with group.exit_together():
        check_model(model, config)
    wrap_blocks(model, config, device, dtype)
    if config.fsdp:
        shard_model(model, group, device, dtype, config.shard_degree)


def wrap_blocks(model, config, device, dtype):
    """Let blocks compute attention in float32, or recompute activations, where the run wants it."""
    for block in model.transformer.h:
        if wants_float32_attention(device, dtype):  # faster, on many CPUs in bfloat16
            use_float32_attention(block)
        if config.activation_checkpointing:
            checkpoint_activations(block)


def checkpoint_activations(block):
    """Make a block drop its activations and recompute them in the backward pass.

    "Training Deep Nets with Sublinear Memory Cost" (Chen et al. 2016, section 4).
    """
    forward = block.forward
    # A lambda, because torch.compile does not trace a functools.partial as a module's forward.
    block.forward = lambda *inputs, **options: recompute_in_backward(
        forward, *inputs, use_reentrant=False, **options
    )


def shard_model(model, group, device, dtype, shard_degree):
    """Shard a model's parameters with FSDP2, in place (Zhao et al. 2023; ZeRO stage 3).

    group          the ProcessGroup
    shard_degree   ranks that hold one copy of the model together; 0: all ranks. With fewer than
                   world_size ranks per copy there are several replicas (HSDP).
    """
    shard_degree = shard_degree or group.world_size
    replicas = group.world_size // shard_degree
    # Row r of the mesh is a replica. Parameters are gathered within a row; gradients are reduced
    # within a row and then averaged over the rows.
    names = ("replicate", "shard")
    mesh = init_device_mesh(device.type, (replicas, shard_degree), mesh_dim_names=names)
    if replicas == 1:
        mesh = mesh["shard"]
    # Forward and backward use parameters in `dtype`, gradients are reduced in float32. Inputs of a
    # block are not cast, because RoPE's cos and sin are among them and must stay float32.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root group holds the embeddings and the final norm. wte is used first (embedding) and
    # last (head), so it must stay gathered for the whole forward pass: fully_shard's default for
    # the root.
    fully_shard(model, mesh=mesh, mp_policy=policy)


# Weights --------------------------------------------------------------------------------------


def load_initial_weights(model, weights, group, device):
    """Collective. Allocate a model that is on the meta device, and fill it with rank 0's weights.

    weights   rank 0: the full state dict, on the CPU; the other ranks: None

    Under DDP the other ranks only allocate memory: wrap_ddp sends them the weights. A model has no
    buffers (docs/YOUR_OWN_VARIANT.md); they would stay unset here.
    """
    if isinstance(model, FSDPModule):
        model.to_empty(device=device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights or {}, options=options)
    elif group.rank == 0:
        model.load_state_dict(weights, assign=True)  # a tensor on meta cannot be copied into
        model.to(device)
    else:
        model.to_empty(device=device)


def wrap_ddp(model, device):
    """Collective. Broadcast rank 0's weights; return DDP around the model (Li et al. 2020).

    DDP averages the ranks' gradients. They are views of its communication buckets, which saves a
    second copy of the gradients, as long as they are not set to None (Run.zero_grad).
    """
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


# Before the first step ------------------------------------------------------------------------


def uses_compile(config, device):
    """Return whether to use torch.compile."""
    return config.compile is True or (config.compile == "auto" and device.type == "cuda")


def prepare_forward(run):
    """Collective. Compile the model, and settle DDP's buckets, where the run has them.

    run   a Run of train.py
    """
    if uses_compile(run.config, run.device):
        compile_model(run)
    if isinstance(run.wrapped, DistributedDataParallel):
        settle_ddp_buckets(run)


def compile_model(run):
    """Collective. Compile each block and the loss; leave them uncompiled if that fails on a rank.

    DDP, and FSDP's hooks around the blocks, are not compiled. All blocks run the same code, which
    torch compiles once. A rank on which memory runs out or the GPU fails ends, and with it the run.
    """
    run.group.print("compiling, which takes about a minute (--compile=False skips it)")
    before = compile_parts(run.model)  # torch compiles at the first call
    x, y = first_batch(run)
    failure = None
    try:  # no collective in here: a rank on which it fails must not leave the others waiting
        model = run.model  # not DDP around it, whose hooks do nothing then
        if run.config.fsdp:
            model = one_layer_model(run)
            compile_parts(model)
        forward_and_backward(run, model, x, y)
        model.eval()
        with torch.no_grad(), run.autocast():
            model(x, y)  # evaluations have graphs of their own
    except UserError:  # of check_loss, which fails on all ranks together
        raise
    except Exception as error:  # each backend raises its own exception types
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise
        reason = " ".join(str(error).split())[:300]
        failure = f"{type(error).__name__}: {reason}"
    run.model.train()
    run.optimizer.zero_grad()  # to None: these gradients are not yet views of DDP's buckets
    failures = [text for text in run.group.all_gather(failure) if text is not None]
    if not failures:
        return
    for owner, name, function in before:
        setattr(owner, name, function)
    if run.group.rank == 0:
        reason = failures[0]
        print(f"warning: training uncompiled, torch.compile failed: {reason}", file=sys.stderr)


def compile_parts(model):
    """Compile each block and the loss of a model, in place.

    Returns what they were, [(owner, name, function)]. A model of your own may have no method
    `loss`.
    """
    before = [(block, "forward", block.forward) for block in model.transformer.h]
    if callable(getattr(type(model), "loss", None)):
        before.append((model, "loss", model.loss))
    # torch compiles a function at most 8 times, then no more. Blocks whose attributes differ need a
    # graph each for training and for evaluation, under FSDP also in the model of the trial.
    limit = max(torch.compiler.config.recompile_limit, 4 * len(before))
    torch.compiler.config.recompile_limit = limit
    for owner, name, function in before:
        # The shapes of a run are fixed. Without dynamic=False torch would switch to dynamic shapes
        # in a process that has compiled a run of other shapes before.
        setattr(owner, name, torch.compile(function, dynamic=False))
    return before


def one_layer_model(run):
    """Return a new model like run.model, but with one layer, unsharded and of any values."""
    with torch.device("meta"):
        model = model_module(run.config.model).GPT(replace(run.model.config, n_layer=1))
    wrap_blocks(model, run.config, run.device, run.dtype)
    return model.to(run.dtype).to_empty(device=run.device)


def settle_ddp_buckets(run):
    """Collective. Let DDP arrange its gradient buckets before the first step.

    DDP rearranges its buckets once, after the first synchronized backward pass. The arrangement
    decides the order in which three or more ranks sum their gradients, and so the last bits. After
    this extra pass every step of a run, new or resumed, uses the final arrangement.
    """
    forward_and_backward(run, run.wrapped, *first_batch(run))
    check_gradients(run)
    run.zero_grad()


def first_batch(run):
    """Collective. Return inputs and targets (B, T) of the rank's first batch, on its device."""
    with run.group.exit_together():
        x, y = run.loader.train_batch(0, run.config.batch_size)
    return to_device(x, run.device), to_device(y, run.device)


def forward_and_backward(run, forward, x, y):
    with run.autocast():
        loss = forward(x, y)
    check_loss(run, loss)
    loss.backward()


# In a step ------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradient_sync(wrapped, enabled):
    """Reduce the gradients over the ranks in this micro-step's backward pass only if enabled.

    wrapped   the model, under DDP wrapped by it

    With several micro-steps per optimizer step only the last one communicates. Under FSDP the
    gradients of the others stay unsharded, in full size on every rank: docs/DISTRIBUTED.md says
    how much memory that takes.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
    else:
        yield
