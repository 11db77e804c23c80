"""Make what one rank computes in one step not finite, and look at its state around that step."""

import contextlib
import hashlib
from unittest import mock

import torch

import train


def digest(run):
    """Return the SHA-256 of a rank's weights and optimizer state."""
    tensors = []
    for p in run.model.parameters():
        state = run.optimizer.state[p]
        tensors += [p, *(state[name] for name in sorted(state))]
    sha256 = hashlib.sha256()
    for tensor in tensors:
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        sha256.update(tensor.detach().numpy().tobytes())
    return sha256.hexdigest()


@torch.no_grad()
def spoil_weight(run, value):
    weight = next(run.model.parameters())
    if hasattr(weight, "to_local"):
        weight = weight.to_local()
    weight[0, 0] = value


@contextlib.contextmanager
def spoiled(what, value, step, rank=0):
    """Spoil one rank in a step, counted from 0; yield the digests before and after that step.

    what    loss: only its value; gradient; weight: one of them; validation: the loss of the
            evaluation before the step
    value   nan or inf
    step    None: every one
    """
    value = float(value)
    digests = []
    train_loop, train_step = train.train_loop, train.train_step

    def spoiled_loop(run):
        forward = run.wrapped.forward

        def spoiled_forward(x, y):
            loss = forward(x, y)
            is_in_step = run.model.training == (what != "validation")
            if step not in (None, run.step) or run.group.rank != rank or not is_in_step:
                return loss
            if what == "gradient":
                loss.register_hook(lambda grad: grad * value)
            elif what != "weight":
                loss = loss + value
            return loss

        run.wrapped.forward = spoiled_forward
        train_loop(run)

    def spoiled_step(run):
        if step not in (None, run.step):
            return train_step(run)
        if what == "weight" and run.group.rank == rank:
            spoil_weight(run, value)
        digests.append(digest(run))
        try:
            return train_step(run)
        finally:
            digests.append(digest(run))

    with (
        mock.patch.object(train, "train_loop", spoiled_loop),
        mock.patch.object(train, "train_step", spoiled_step),
    ):
        yield digests
