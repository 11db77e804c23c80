"""The processes that train together: one, or those that torchrun starts, as DDP or FSDP.

    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py              DDP: each has the whole model
    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py --fsdp=True  FSDP: each has a share of it

docs/DISTRIBUTED.md explains the modes. A rank is one of the processes; rank 0 speaks, logs and decides.
"""

import atexit
import contextlib
import datetime
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError


class Ranks:
    """The processes of a run, by torchrun's environment; started without it there is one, and nothing is sent.

    timeout   seconds after which a rank gives up waiting for another
    """

    def __init__(self, timeout):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None
        self.launched = "RANK" in os.environ  # by torchrun, even if alone
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if self.launched and not dist.is_initialized():
            patience = datetime.timedelta(seconds=timeout)
            store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun's own store outlives its workers: new ones must not read the addresses of those that died
                store = dist.PrefixStore(f"restart {restarts}", store)
            # GPUs talk by nccl, what is said on CPUs goes by gloo
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=patience)
            atexit.register(self.leave)
        self.restarted = self.any(restarts != "0")  # each machine counts for itself
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")

    def gather(self, value):
        """Every rank's value, in the order of ranks; any that can be pickled."""
        values = [value] * self.size
        if self.launched:
            dist.all_gather_object(values, value)
        return values

    def share(self, value):
        """Rank 0's value, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def reduce(self, values, how="sum"):
        """A list of numbers: their sums or maxima over the ranks."""
        values = torch.tensor(values, dtype=torch.float64)
        if self.launched:
            dist.all_reduce(values, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
        return values.tolist()

    def any(self, flag):
        """Whether one rank at least says so."""
        return bool(self.reduce([flag], "max")[0])

    def fail(self, message):
        """End with a UserError that every rank has come to: rank 0 says it."""
        if self.rank == 0:
            raise UserError(message)
        sys.exit(2)

    @contextlib.contextmanager
    def together(self):
        """Do what each rank may fail at by itself: then all end, and none waits for another in vain."""
        message = None
        try:
            yield
        except (UserError, OSError) as error:
            if not self.launched:
                raise
            message = str(error)
        failed = [text for text in self.gather(message) if text is not None]
        if failed:
            self.fail(failed[0])

    def same(self, what):
        """UserError where a dict differs between the ranks."""
        everyone = self.gather(what)
        for key in what:
            values = [other.get(key) for other in everyone]
            odd = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if odd is not None:
                self.fail(f"rank {odd} has {key}={values[odd]}, rank 0 has {key}={values[0]}: all must have the same")

    def leave(self):
        """End the process group, when the process ends: gloo aborts, now and again, where nobody does, or where a
        wrapped model is still there."""
        gc.collect()
        dist.destroy_process_group()


def place(model, weights, ranks, device, dtype, fsdp, shard_size):
    """Bring a model from the meta device to where it trains; returns the module to call.

    weights      the state dict to begin with on rank 0, {} on the others; None on all: a checkpoint will fill it
    shard_size   ranks that share one copy of the model under FSDP; 0: all
    """
    if fsdp:
        share = shard_size or ranks.size
        # One copy per row: a block is gathered along a row, gradients are also averaged over the rows (HSDP).
        mesh = init_device_mesh(device.type, (ranks.size // share, share), mesh_dim_names=("replicate", "shard"))
        # Parameters, and with them the stream, are in dtype, gradients are averaged in float32. A block's inputs stay
        # as they are: RoPE's float32 angles are among them.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Each block is gathered when its turn comes; what is left, the tied embedding among it, is one group.
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh if share < ranks.size else mesh["shard"], mp_policy=policy)
    if weights and not fsdp:
        model.load_state_dict(weights, assign=True)
        model.to(device)
    else:
        model.to_empty(device=device)
    if weights is not None and fsdp:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, weights, options=options)
    if fsdp or not ranks.launched:
        return model
    # DDP sends rank 0's weights to all, and averages gradients while the backward pass computes the next ones.
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


@contextlib.contextmanager
def accumulate(wrapped, last):
    """Around a micro-step's forward and backward: gradients travel in the last one only. FSDP keeps them whole until
    then, on every rank."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync():
        yield


def whole(tensor):
    """A tensor that FSDP has shared out, or its partial sums, as the one that they stand for."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
