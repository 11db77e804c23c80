"""Attention in a sliding window: that of model_swa.py, and a second way to compute it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model_swa import CausalSelfAttention, GPTConfig


def by_brute_force(q, k, v, window):
    """Compute attention of the last T of S positions by a float64 softmax over all scores."""
    T, S, D = q.size(2), k.size(2), q.size(3)
    i = torch.arange(S - T, S)[:, None]
    j = torch.arange(S)
    attends = (i - j >= 0) & (i - j < window)
    scores = q.double() @ k.double().mT / D**0.5
    scores = scores.masked_fill(~attends, float("-inf"))
    return (scores.softmax(dim=-1) @ v.double()).to(q.dtype)


def attention(window, dropout=0.0):
    """Return an attention layer of two heads, in training mode if it has dropout."""
    config = GPTConfig(n_head=2, n_embd=8, window=window, dropout=dropout)
    return CausalSelfAttention(config, layer=0).train(dropout > 0)


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return output
