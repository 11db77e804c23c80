"""The process group of a run and its collectives: small values that the ranks exchange.

torchrun starts world_size processes, the ranks 0 .. world_size - 1, and describes them in
environment variables. Rank 0 prints, logs and makes the decisions that all ranks must share.
Without torchrun there is one rank, and every collective returns at once.
"""

import atexit
import contextlib
import datetime
import gc
import os
import re
import socket
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common.errors import OtherRankError, UserError


class ProcessGroup:
    """The ranks of a run, as torchrun's environment variables describe them.

    Every rank must call a method that is marked "Collective": if one rank does not, the others wait
    for it until `timeout` seconds have passed. So an error that only one rank may meet, such as a
    missing file, has to end all of them. Code that can fail stands in this block:

        with group.exit_together():
            if group.rank == 0:
                read_a_file()  # if this raises UserError or OSError, every rank exits
    """

    def __init__(self, timeout):
        self.launched = "RANK" in os.environ  # by torchrun, perhaps with one rank
        self.rank = _read_number("RANK") if self.launched else 0
        self.world_size = _read_number("WORLD_SIZE") if self.launched else 1
        # Other launchers than torchrun may not set LOCAL_RANK; then a rank uses the current GPU.
        self.local_rank = _read_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
        if not 0 <= self.rank < self.world_size:
            limit = f"at least 0 and below WORLD_SIZE={self.world_size}"
            raise UserError(f"RANK={self.rank} must be {limit}: torchrun sets both")
        if self.launched and not dist.is_initialized():
            try:
                self._init_process_group(datetime.timedelta(seconds=timeout))
            except (RuntimeError, ValueError) as error:
                problem = f"the ranks cannot connect to each other ({_reason(error)})"
                raise UserError(f"{problem}: check {_describe_network()}") from error
            self._warn_of_shared_store()
        # Whether torchrun has restarted the workers after a failure; then --overwrite must not
        # delete the run again. Each machine's torchrun counts its own restarts.
        self.restarted = self.launched and self.any_rank(_restart_count() != "0")

    def _init_process_group(self, timeout):
        # Undocumented, but the only way to get the store before init_process_group uses it.
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's agent keeps this store when it restarts the workers. Under the same keys
            # the new workers would find the addresses of the old ones, which are dead.
            store = dist.PrefixStore(f"restart {_restart_count()}", store)
        # Gradients on GPUs go through nccl; the small values below are on the CPU and use gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
        )

    def _warn_of_shared_store(self):
        """Print what several machines lose if torchrun lends its own store to the workers."""
        several_machines = os.environ.get("GROUP_WORLD_SIZE", "1") != "1"  # set by torchrun
        is_private = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
        if self.rank == 0 and several_machines and not is_private:
            print(
                "warning: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is not set: the run survives "
                "workers that die, but not a machine that dies and comes back",
                file=sys.stderr,
            )

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

    def mean(self, tensor):
        """Collective. Return the mean of the ranks' tensors in float64; one rank's as it is.

        They stay on their device. On a GPU nccl does it in turn with other work; the CPU goes on.
        """
        if self.world_size == 1:
            return tensor
        total = tensor.double()
        dist.all_reduce(total)
        return total / self.world_size

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

        Rank 0 prints one error. Any other exception is a bug: it ends its rank with a traceback,
        and torchrun then stops the others.
        """
        message = None
        try:
            yield
        except (UserError, OSError) as error:
            if not self.launched:
                raise
            message = str(error)
        for text in self.all_gather(message):
            if text is not None:
                self.exit(text)

    # The end ----------------------------------------------------------------------------------

    def destroy_at_exit(self):
        """Collective. Destroy torch's process group when the process ends, not before.

        Another call of train.main in this process uses the group again. If no rank destroys it,
        gloo sometimes aborts at exit. A rank that fails alone must not call this method: nccl waits
        for all ranks, so the rank would hang instead of exiting, and torchrun would not stop the
        others.
        """
        if self.launched:
            atexit.unregister(_destroy_process_group)  # of an earlier run in this process
            atexit.register(_destroy_process_group)

    # Output -----------------------------------------------------------------------------------

    def print(self, text):
        """Print on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def exit(self, message):
        """End the run on every rank with a UserError; all ranks must call it.

        A program then exits with status 2 on every rank, and rank 0 prints the message.
        """
        self.destroy_at_exit()
        if self.rank == 0:
            raise UserError(message)
        raise OtherRankError(message)


def _read_number(name):
    """Return the integer in an environment variable of torchrun."""
    text = os.environ.get(name, "")
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text} must be an integer: torchrun sets it") from None


def _describe_network():
    """Return the environment variables by which the ranks find each other, with their values."""
    names = ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    interfaces = [name for _, name in socket.if_nameindex()]
    return f"{', '.join(settings)} (network interfaces here: {', '.join(interfaces)})"


def _restart_count():
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _destroy_process_group():
    # gloo sometimes aborts if a DDP or FSDP model still exists. gc.collect() deletes a model in a
    # reference cycle.
    gc.collect()
    dist.destroy_process_group()


def describe_lost_rank(error):
    """Return the reason if an error means that another rank does not answer, else None."""
    # DistBackendError is nccl's.
    types = (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)
    is_lost = isinstance(error, types)
    if not is_lost and "gloo" not in str(error):  # gloo raises a plain RuntimeError
        return None
    return _reason(error)


def _reason(error):
    """Return the first sentence of an error of torch.distributed."""
    reason = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])  # drop gloo's "[file:line] "
    return reason.split(". ")[0].rstrip(".")


def full_tensor(tensor):
    """Return the full tensor of a DTensor (a collective), or a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
