"""Steps of training and of decoding, to be timed; a training loop for data made on the spot."""

from dataclasses import dataclass

import torch

from common.cpu import prepare_for_sampling
from common.device import peak_memory
from common.models import model_module
from tools.bench.sampling import fill_cache
from train import set_learning_rates
from training.optimizer import make_optimizer


def build_model(shape):
    """Return a new model.

    shape   "model", the name of the model file, and options of its GPTConfig
    """
    options = dict(shape)
    module = model_module(options.pop("model"))
    return module.GPT(module.GPTConfig(**options))


def cache_bytes(shape, tokens):
    """Return the bytes of the KV cache of a sequence of this length, in float32."""
    with torch.device("meta"):
        return build_model(shape).make_cache(1, tokens).nbytes


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


@dataclass
class Schedule:
    """How train_on trains; the names are those of train.py's options."""

    max_steps: int
    learning_rate: float = 8e-3
    muon_learning_rate: float = 0.01
    min_lr: float = 0.0
    warmup_steps: int = 50
    lr_schedule: str = "wsd"
    optimizer: str = "muon"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.98


def train_on(model, next_batch, schedule, device, dtype):
    """Train a model, in place, on batches that train.py's loader does not make.

    next_batch   function of the step that returns inputs and targets (B, T), int64, on the CPU
    """
    optimizer = make_optimizer(model, schedule, dtype)
    for step in range(schedule.max_steps):
        x, y = next_batch(step)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(x.to(device), y.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rates(optimizer, schedule, step)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def make_decoding_step(shape, position, device, dtype, B=1):
    """Return a function that decodes one token at this position, and the bytes of its KV cache.

    Each call decodes at the same position, with the same cached tokens before it, as sample.py does
    for B samples of one prompt.
    """
    model = build_model(shape).to(device, dtype).eval()
    prepare_for_sampling(model, rows=B)  # on a CPU, as sample.py does
    cache = model.make_cache(B, position + 1)
    fill_cache(model, cache, position)
    token = torch.zeros(B, 1, dtype=torch.int64, device=device)

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
