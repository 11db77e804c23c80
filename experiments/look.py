"""Who sees whom? Measured by gradients: which inputs move the output at a position; with parameters, cache and FLOPs.

    python -m experiments.look --model=model_swa --window=4 --n_layer=2

The quickest way to check an idea of your own (--model=model_mine). Without a model or options of one: all models, tiny,
into docs/.
"""

import sys
from dataclasses import asdict, dataclass

import torch

from common.errors import UserError, program
from common.models import model_module, models_with_option
from configurator import check_range, configure_with_model
from experiments.study import Study

VARIANTS = {
    "model": {},
    "model_rope": {},
    "model_gqa": {"n_kv_head": 2},
    "model_swa": {"window": 4},
}
VARIANTS |= {"model_rope_gqa_swa": {"n_kv_head": 2, "window": 4}}


@dataclass
class Config:
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 32
    block_size: int = 64
    vocab_size: int = 257


PRESETS = {"cpu": Config(), "gpu": Config()}


@dataclass
class LookConfig:
    model: str | None = None  # the model file, without .py, and options of its GPTConfig
    tokens: int = 12  # positions to draw
    # Without a model
    preset: str = "cpu"  # cpu, gpu: the device
    overwrite: bool = False  # forget the points of an unfinished study, and measure them anew


def sight(model, tokens):
    """(tokens, tokens) bool: row i has the inputs that move the logits at position i."""
    seen, idx = (
        [],
        torch.zeros(1, tokens, dtype=torch.int64, device=model.transformer.wte.weight.device),
    )
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model.double()(idx)[0]  # in float64 nothing rounds to zero
    weights = torch.randn(
        logits.size(1), dtype=logits.dtype, device=logits.device
    )  # their plain sum may not move
    rows = [
        torch.autograd.grad(row @ weights, seen[0], retain_graph=True)[0][0].abs().sum(1) > 0
        for row in logits
    ]
    return torch.stack(rows)


def describe(name, options, tokens, device="cpu"):
    """The picture and the numbers of a model, as text."""
    module = model_module(name)
    config = module.GPTConfig(**options)
    torch.manual_seed(0)
    model = module.GPT(config).to(device).eval()
    T, parameters = config.block_size, sum(p.numel() for p in model.parameters())
    per_token, cache = (model.make_cache(1, length).nbytes for length in (1, T))
    flops = model.flops_per_token(T)
    lines = [f"{name}, " + ", ".join(f"{key}={value}" for key, value in options.items()), ""]
    for i, row in enumerate(sight(model, tokens).tolist()):
        lines.append(f"output {i:2d}   " + " ".join("x" if sees else "." for sees in row))
    lines += ["", f"{parameters:,} parameters, {flops:,} FLOPs per token of training on {T}"]
    lines += [f"{per_token:,} bytes of float32 cache for a token, {cache:,} for {T}"]
    return "\n".join(lines)


@program
def main(argv):
    config, options = configure_with_model(
        LookConfig,
        argv,
        __doc__,
        model_config=lambda config: model_module(config.model or "model").GPTConfig,
        hint=models_with_option,
    )
    check_range(config, 1, "tokens")
    if config.model or options:
        try:
            print(describe(config.model or "model", options, config.tokens))
        except ValueError as error:
            raise UserError(str(error)) from error
        return
    study = Study("look", config, PRESETS)
    for name, own in VARIANTS.items():
        print(
            study.point(
                name, describe, name, asdict(study.config) | own, config.tokens, study.device
            ),
            end="\n\n",
        )
    study.finish()


if __name__ == "__main__":
    main(sys.argv[1:])
