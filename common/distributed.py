"""The process group of a run, and DDP, FSDP and HSDP around a model.

    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py              DDP
    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py --fsdp=True  FSDP

torchrun starts several processes, the ranks 0 .. world_size - 1. Rank 0 prints, logs and decides.
Without torchrun there is one rank, and every collective below returns at once.
docs/DISTRIBUTED.md explains the modes.
"""

import atexit
import contextlib
import datetime
import gc
import os
import re

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.errors import OtherRankError, UserError


class ProcessGroup:
    """The ranks of a run, as torchrun's environment variables describe them.

    Methods marked "Collective" must be called by every rank: a rank that does not call one blocks
    the others, until `timeout` seconds have passed.
    """

    def __init__(self, timeout):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.launched = "RANK" in os.environ  # by torchrun, perhaps with one rank
        # Not by torchrun: other launchers may leave LOCAL_RANK out.
        self.local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None
        if self.launched and not dist.is_initialized():
            try:
                self._init_process_group(datetime.timedelta(seconds=timeout))
            except RuntimeError as error:
                reason = describe_lost_rank(error)
                if reason is None:
                    raise
                raise UserError(f"the ranks cannot connect to each other: {reason}") from error
        # Each machine's torchrun counts its own restarts.
        self.restarted = self.any_rank(_restart_count() != "0")

    def _init_process_group(self, timeout):
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The agent's store outlives its workers. Without a prefix of their own, restarted
            # workers would read the addresses of the workers that died.
            store = dist.PrefixStore(f"restart {_restart_count()}", store)
        # Gradients on GPUs go through nccl; the small values below are on the CPU and use gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
        )
        atexit.register(_destroy_process_group)

    # Collectives ------------------------------------------------------------------------------

    def all_gather(self, value):
        """Collective. Return the value of every rank, a list in rank order; values are pickled."""
        if not self.launched:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Collective. Return rank 0's value on every rank; it is pickled."""
        if not self.launched:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_reduce(self, numbers, op=dist.ReduceOp.SUM):
        """Collective. Return the elementwise sum (or another reduction) of a list of numbers."""
        if not self.launched:
            return numbers
        numbers = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(numbers, op)
        return numbers.tolist()

    def any_rank(self, flag):
        """Collective. Return whether the flag is true on at least one rank."""
        return bool(self.all_reduce([flag], dist.ReduceOp.MAX)[0])

    def check_equal(self, values):
        """Collective. Exit with an error if an entry of the dict differs between ranks."""
        all_values = self.all_gather(values)
        names = dict.fromkeys(name for values in all_values for name in values)
        expected = all_values[0]
        for rank, actual in enumerate(all_values):
            for name in names:
                if actual.get(name) != expected.get(name):
                    self.exit(
                        f"rank {rank} has {name}={actual.get(name)}, rank 0 has "
                        f"{name}={expected.get(name)}: start all ranks with the same options and "
                        "data"
                    )

    @contextlib.contextmanager
    def exit_together(self):
        """Collective. If any rank raises UserError or OSError in the block, exit on every rank.

        Rank 0 prints one error. Without this the other ranks would block in their next collective.
        """
        message = None
        try:
            yield
        except (UserError, OSError) as error:
            if not self.launched:
                raise
            message = str(error)
        messages = self.all_gather(message)
        for message in messages:
            if message is not None:
                self.exit(message)

    # Rank 0 speaks ----------------------------------------------------------------------------

    def print(self, text):
        """Print on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def exit(self, message):
        """End the run on every rank with a UserError; all ranks must call it.

        A program then exits with status 2 on every rank, and rank 0 prints the message.
        """
        if self.rank == 0:
            raise UserError(message)
        raise OtherRankError(message)


def _restart_count():
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _destroy_process_group():
    # Without this call gloo sometimes aborts at exit, and also while a wrapped model still exists.
    gc.collect()
    dist.destroy_process_group()


def describe_lost_rank(error):
    """Return why an error says that another rank does not answer; None for other errors."""
    is_lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    if not is_lost and "gloo" not in str(error):  # gloo raises a plain RuntimeError
        return None
    reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])  # without gloo's source line
    return reason.split(". ")[0]


# DDP, FSDP, HSDP ------------------------------------------------------------------------------


def shard_model(model, group, device, dtype, shard_degree):
    """Shard a model's parameters with FSDP2, in place (Zhao et al. 2023; ZeRO stage 3).

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
    # last (head), so it must stay gathered for the whole forward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy)


def load_initial_weights(model, weights, group, device):
    """Collective. Give a model on the meta device its memory and rank 0's weights.

    weights   rank 0: the full state dict, on the CPU; the other ranks: None
    """
    if isinstance(model, FSDPModule):
        model.to_empty(device=device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights or {}, options=options)
    elif group.rank == 0:
        model.load_state_dict(weights, assign=True)
        model.to(device)
    else:
        model.to_empty(device=device)  # DistributedDataParallel broadcasts rank 0's weights


def wrap_ddp(model, device):
    """Collective. Return DDP around a model (Li et al. 2020): it averages the ranks' gradients."""
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(wrapped, enabled):
    """Reduce the gradients over the ranks in this micro-step's backward pass only if enabled.

    With several micro-steps per optimizer step, only the last one needs to communicate. Until then
    FSDP keeps the full, unsharded gradients on every rank.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
    else:
        yield


def full_tensor(tensor):
    """Return the full tensor of a DTensor (a collective), or a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
