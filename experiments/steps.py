"""Steps of training and of decoding, to be timed, and the memory of a training step."""

import torch

from common.device import peak_memory
from common.models import model_module
from tools.bench.sampling import fill_cache


def build_model(shape):
    """Return a new model.

    shape   "model", the name of the model file, and options of its GPTConfig
    """
    options = dict(shape)
    module = model_module(options.pop("model"))
    return module.GPT(module.GPTConfig(**options))


def make_training_step(shape, B, T, device, dtype):
    """Return a function that trains a new model for one step on B random sequences of T tokens.

    A step is one forward and backward pass in `dtype` by autocast, and one step of AdamW.
    """
    model = build_model(shape).to(device)
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
def make_decoding_step(shape, position, device, dtype):
    """Return a function that decodes one token at this position, and the bytes of its KV cache.

    Each call decodes at the same position, with the same cached tokens before it.
    """
    model = build_model(shape).to(device, dtype).eval()
    cache = model.make_cache(1, position + 1)
    fill_cache(model, cache, position)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def step():
        cache.pos = position
        model(token, cache=cache)

    return step, cache.nbytes


def measure_step_memory(shape, B, T, device, dtype):
    """Return the peak memory of training steps in GB, beyond what the process used before."""
    before = peak_memory(device)
    step = make_training_step(shape, B, T, device, dtype)
    for _ in range(2):  # the first step creates the optimizer state, the second begins with it
        step()
    return peak_memory(device) - before
