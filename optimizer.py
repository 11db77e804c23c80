"""The optimizer and its learning rate: AdamW, with a cosine or a warmup-stable-decay schedule."""

import math

import torch

WSD_DECAY = 0.2  # share of the steps; 10 to 20 % suffice (Hägele et al. 2024, section 3)


def learning_rate(config, step):
    """The learning rate of step `step` (from 0): linear warmup, then cosine or constant with a linear decay."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    begin = config.warmup_steps
    if config.lr_schedule == "wsd":
        begin = max(begin, config.max_steps * (1 - WSD_DECAY))
    done = min(1.0, max(0.0, (step - begin) / max(1, config.max_steps - begin)))
    share = 1 - done if config.lr_schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def make_optimizer(model, config):
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices, embeddings included, and none on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
