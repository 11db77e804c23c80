"""Steps of training and of decoding, to be timed, and the memory that they take."""

import multiprocessing

import torch

from common.device import peak_memory
from common.models import model_module
from tools.bench import fill_cache


def build(shape):
    """A new model of a shape: `model`, the file's name, and options of its GPTConfig."""
    module = model_module(shape["model"])
    return module.GPT(
        module.GPTConfig(**{key: value for key, value in shape.items() if key != "model"})
    )


def training_step(shape, B, T, device, dtype):
    """A function that takes one training step (AdamW, autocast) of a new model on B x T random tokens."""
    model = build(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(model.config.vocab_size, (B, T + 1), device=device)
    forward = torch.compile(model) if device.type == "cuda" else model

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.inference_mode()
def decoding_step(shape, position, device, dtype):
    """A function that decodes the token at a position, again and again; and the bytes of its cache."""
    model = build(shape).to(device, dtype).eval()
    cache = model.make_cache(1, position + 1)
    fill_cache(model, cache, position)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def step():
        cache.pos = position
        model(token, cache=cache)

    return step, cache.nbytes


def step_memory(shape, B, T, device, dtype):
    """Peak GB of training steps; on a CPU beyond what the process had without a model."""
    before = peak_memory(device)
    step = training_step(shape, B, T, device, dtype)
    for _ in range(2):  # the second has the optimizer's state too
        step()
    return peak_memory(device) - before


def in_new_process(function, *arguments):
    """Call a function in a process of its own: a peak of memory knows no way back."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
