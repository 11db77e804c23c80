"""Record what a rank computes and sends in one step of train.py."""

import contextlib

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # these send nothing


class Collectives(TorchDispatchMode):
    """Add each collective, [name, number of elements of its largest tensor], to a list."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(tensor_type, DTensor) for tensor_type in types):
            return NotImplemented  # DTensor then calls collectives of plain tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            if name not in LOCAL:
                tensors = [tensor for arg in args[:2] for tensor in flatten(arg)]
                largest = max(tensor.numel() for tensor in tensors)
                self.events.append([NAMES.get(name, name), largest])
        return func(*args, **(kwargs or {}))


def flatten(arg):
    """Return the tensors in an argument of a collective: a tensor, a list of tensors or neither."""
    items = arg if isinstance(arg, list) else [arg]
    return [item for item in items if hasattr(item, "numel")]


@contextlib.contextmanager
def recorded_events(gpt):
    """Return the list of the events of a step, in their order: collectives, and what computes.

    What computes is [pass, module, gathered], for the model (in its forward pass only), each block
    and the final norm. `gathered` lists those of the model and its blocks that have full parameters
    then, not shards.
    """
    events = []
    groups = {"model": gpt.transformer.wte}
    for index, block in enumerate(gpt.transformer.h):
        groups[f"block {index}"] = block

    def record(direction, name):
        gathered = []
        for group, module in groups.items():
            if not isinstance(next(module.parameters()), DTensor):
                gathered.append(group)
        events.append([direction, name, gathered])

    handles = []
    for name, module in (groups | {"model": gpt, "norm": gpt.transformer.ln_f}).items():

        def before_forward(module, inputs, name=name):
            record("forward", name)

        def after_backward(module, grad_inputs, grad_outputs, name=name):
            record("backward", name)

        handles.append(module.register_forward_pre_hook(before_forward))
        if name != "model":
            handles.append(module.register_full_backward_hook(after_backward))
    with Collectives(events):
        yield events
    for handle in handles:
        handle.remove()
