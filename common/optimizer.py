"""The optimizer and its learning rate: AdamW, with a cosine or a warmup-stable-decay schedule."""

import math

import torch

WSD_DECAY = 0.2  # fraction of the steps; 10 to 20 % suffice (Hägele et al. 2024, section 3)


def learning_rate(config, step):
    """Return the learning rate of optimizer step `step` (from 0).

    Linear warmup, then a cosine decay (lr_schedule=cosine), or a constant rate with a linear decay
    over the last fifth of the steps (wsd). Both end at min_lr.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_start = config.warmup_steps
    if config.lr_schedule == "wsd":
        decay_start = max(decay_start, config.max_steps * (1 - WSD_DECAY))
    progress = (step - decay_start) / max(1, config.max_steps - decay_start)
    progress = min(1.0, max(0.0, progress))
    if config.lr_schedule == "wsd":
        coeff = 1 - progress
    else:
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + coeff * (config.learning_rate - config.min_lr)


def make_optimizer(model, config):
    """Return AdamW (Loshchilov & Hutter 2019): decay on matrices, none on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    param_groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [param_group for param_group in param_groups if param_group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
