"""Which positions does a model attend to, and what does it cost? A picture of the receptive field.

    python -m experiments.look --model=model_swa --window=4 --n_layer=2

Prints the receptive field, measured by gradients, the number of parameters, the FLOPs and the size
of the KV cache: the quickest way to check a model file of your own (--model=model_mine). Without a
model and model options it describes all models, at a tiny size, and writes the texts into docs/.
"""

import sys
from dataclasses import asdict, dataclass

import torch

from common.errors import UserError, run_program
from common.flops import flops_per_token
from common.models import model_module, models_with_option
from configurator import check_minimum, configure_with_model
from experiments.study import Study, StudyConfig, texts

VARIANTS = {
    "model": {},
    "model_rope": {},
    "model_gqa": {"n_kv_head": 2},
    "model_swa": {"window": 4},
    "model_rope_gqa_swa": {"n_kv_head": 2, "window": 4},
}


@dataclass
class Config:
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 32
    block_size: int = 64
    vocab_size: int = 257


PRESETS = {"cpu": Config(), "gpu": Config()}


@dataclass
class LookConfig(StudyConfig):  # its options are for a call without a model
    model: str | None = None  # the model file, without .py
    tokens: int = 12  # positions to draw


def receptive_field(model, tokens):
    """Return a bool matrix (tokens, tokens): row i marks the inputs that affect output i.

    An input affects an output if the gradient of the logits with respect to its embedding is not
    zero. The model is converted to float64, in which small gradients do not round to zero.
    """
    model.double()
    embedding = model.transformer.wte
    embeddings = []  # what the embedding layer returns: (1, tokens, C)
    embedding.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    idx = torch.zeros(1, tokens, dtype=torch.int64, device=embedding.weight.device)
    logits = model(idx)[0]  # (tokens, V)
    # Random weights, because the gradient of a plain sum of the logits could vanish.
    weights = torch.randn(logits.size(1), dtype=logits.dtype, device=logits.device)
    rows = []
    for output in logits:
        (gradient,) = torch.autograd.grad(output @ weights, embeddings[0], retain_graph=True)
        rows.append(gradient[0].abs().sum(1) > 0)  # (tokens,)
    return torch.stack(rows)


def describe_model(name, options, tokens, device="cpu"):
    """Return the receptive field and the costs of a new model as text.

    options   of the model's GPTConfig
    """
    module = model_module(name)
    config = module.GPTConfig(**options)
    torch.manual_seed(0)
    model = module.GPT(config).to(device).eval()
    T = config.block_size
    parameters = sum(p.numel() for p in model.parameters())
    flops = flops_per_token(model, T)
    bytes_per_token = model.make_cache(1, 1).nbytes
    cache_bytes = model.make_cache(1, T).nbytes
    settings = [f"{key}={value}" for key, value in options.items()]
    lines = [f"{name}, {', '.join(settings)}", ""]
    for i, row in enumerate(receptive_field(model, tokens).tolist()):
        marks = ["x" if is_attended else "." for is_attended in row]
        lines.append(f"output {i:2d}   {' '.join(marks)}")
    lines.append("")
    lines.append(f"{parameters:,} parameters, {flops:,} FLOPs per token of training on {T}")
    lines.append(f"{bytes_per_token:,} bytes of float32 cache for a token, {cache_bytes:,} for {T}")
    return "\n".join(lines)


def main(argv):
    config, options = configure_with_model(
        LookConfig,
        argv,
        __doc__,
        model_config=lambda config: model_module(config.model or "model").GPTConfig,
        hint=models_with_option,
    )
    check_minimum(config, 1, "tokens")
    if config.model or options:
        try:
            print(describe_model(config.model or "model", options, config.tokens))
        except ValueError as error:
            raise UserError(str(error)) from error
        return
    study = Study("look", config, PRESETS)
    for name, own_options in VARIANTS.items():
        options = asdict(study.config) | own_options
        study.add(name, name, describe_model, name, options, config.tokens, study.device)
    study.run(texts)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
