"""Write the constants and the test cases of docs/explorer.html, from the model files.

    python -m experiments.explorer

The page computes in JavaScript what the model files compute, so that a reader can change settings.
This program calls the model files, training/parallel.py and tools/estimate_memory.py (by
experiments/probes.py) and writes what they return into the page, as cases [function, arguments,
result]. The page compares its functions with all cases when it is opened, and
tests/tools/test_explorer.py does so in node.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import run_program
from common.models import make_config, model_module, models_with_option
from configurator import configure, configure_with_model
from experiments import probes
from experiments.intervals import interval_of, paired_difference
from experiments.probes import MISTAKES, make_mistakes
from experiments.quality import final_losses
from experiments.report import read_experiment
from experiments.runs import variants
from tools import estimate_memory

PAGE = Path("docs/explorer.html")
BLOCK = re.compile(r'(<script type="application/json" id="data">\n).*?(</script>)', re.DOTALL)
IN_FLOAT32 = ("angle", "rotate", "score")  # by the model files; the page computes in float64
QUALITY = ("cpu", "cpu_long")  # presets of experiments/quality.py
CONFIGS = {  # of GPT-2's sizes
    "gpt2": "config/gpt2.py",
    "gpt2-medium": "config/gpt2_medium.py",
    "gpt2-large": "config/gpt2_large.py",
    "gpt2-xl": "config/gpt2_xl.py",
}


@dataclass
class ExplorerConfig:
    """No options."""


# The cases ------------------------------------------------------------------------------------

FUNCTIONS = {
    "angle": probes.angle,
    "attends": probes.attends,
    "bfloat16": probes.bfloat16,
    "cacheBytes": probes.cache_bytes,
    "computedBlocks": probes.computed_blocks,
    "countScores": probes.count_scores,
    "headOf": probes.head_of,
    "keysHeld": probes.keys_held,
    "maskOf": probes.mask_of,
    "parameters": probes.parameters,
    "receptiveField": probes.receptive_field,
    "ringAfter": probes.ring_after,
    "rotate": probes.rotate,
    "score": probes.score,
    "stepBytes": probes.step_bytes,
    "stepEvents": probes.step_events,
}


def vector(size, seed):
    """Return a list of random numbers with one digit behind the point."""
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return [round(number, 1) for number in numbers.tolist()]


def cache_setup(layers, kv_heads, head_dim, tokens, window, bytes_per_number):
    return {
        "layers": layers,
        "kvHeads": kv_heads,
        "headDim": head_dim,
        "tokens": tokens,
        "window": window,
        "bytes": bytes_per_number,
    }


def shape(layers, heads, kv_heads, head_dim, vocab_size, block_size, rope=False):
    return {
        "layers": layers,
        "heads": heads,
        "kvHeads": kv_heads,
        "headDim": head_dim,
        "vocabSize": vocab_size,
        "blockSize": block_size,
        "rope": rope,
    }


def step_setup(mode, ranks, micro_steps, dtype, *model_shape):
    setup = {"mode": mode, "ranks": ranks, "microSteps": micro_steps, "dtype": dtype}
    return setup | shape(*model_shape)


GPT2 = (12, 12, 12, 64, 50257, 1024)
SMALL = (2, 2, 2, 4, 33, 8)  # 2, 4 and 8 ranks split 33 and 9 unevenly

# {function: [arguments]}
ARGUMENTS = {
    "attends": [
        *((i, j, 4) for i, j in ((0, 0), (3, 0), (4, 0), (7, 4), (7, 3), (2, 5))),
        *((i, j, None) for i, j in ((0, 0), (9, 0), (2, 3))),
        (5, 5, 1),
        (5, 4, 1),
        (7, 3, 4, {"lessOrEqual": True}),
        (7, 2, 4, {"lessOrEqual": True}),
        (3, 4, 4, {"lessOrEqual": True}),
    ],
    "keysHeld": [
        *((T, 0, 4) for T in (1, 4, 9)),
        *((T, 5, 4) for T in (1, 3, 6)),
        *((T, 2, 4) for T in (1, 2)),
        *((T, 3, None) for T in (1, 4)),
        (6, 0, None),
        (1, 7, 1),
        (3, 7, 1),
        (4, 3, 20),
    ],
    "maskOf": [
        *((T, 0, 3) for T in (1, 3, 7)),
        *((T, cached, 3) for T, cached in ((1, 1), (1, 2), (1, 6), (2, 1), (3, 2), (4, 5))),
        *((T, cached, None) for T, cached in ((1, 0), (6, 0), (1, 5), (3, 4))),
        *((T, cached, 1) for T, cached in ((4, 0), (1, 3), (3, 2))),
        *((T, cached, 9) for T, cached in ((5, 0), (1, 4), (3, 3))),
        *((T, cached, 3, {"topLeft": True}) for T, cached in ((5, 0), (1, 5), (3, 2), (4, 5))),
        *((T, cached, None, {"topLeft": True}) for T, cached in ((5, 0), (1, 5), (3, 2), (2, 6))),
        *((T, cached, 3, {"lessOrEqual": True}) for T, cached in ((6, 0), (1, 5), (3, 4), (2, 1))),
        (3, 4, 3, {"lessOrEqual": True, "topLeft": True}),
    ],
    "countScores": [
        *((12, window) for window in (1, 4, 12, 13, None)),
        (1, 4),
        *((T, 4) for T in (256, 257, 300)),
        *((T, 256) for T in (511, 512, 1024)),
        (1024, 16),
        (1024, 400),
        (600, None),
    ],
    "computedBlocks": [
        *((T, 4) for T in (1, 12, 256, 257, 300)),
        *((T, 64) for T in (257, 320)),
        *((T, 65) for T in (257, 260)),
        *((512, window) for window in (1, 256, 257, 511, 512)),
        (700, 400),
        (300, None),
        (12, None),
    ],
    "receptiveField": [
        *((12, 4, layers, 0, 11) for layers in (1, 2, 3, 4)),
        *((12, 3, 4, full_every, 11) for full_every in (1, 2, 3, 4, 5)),
        *((10, 2, 3, full_every, 7) for full_every in (0, 2, 3)),
        *((8, 1, 3, full_every, 5) for full_every in (0, 2)),
        *((8, window, 2, 0, 5) for window in (8, 20, None)),
        (8, 3, 2, 0, 0),
        (1, 4, 3, 0, 0),
    ],
    "ringAfter": [
        *((4, chunks) for chunks in ([3, 1, 1, 1], [1] * 6, [4, 1], [9], [9, 1], [2, 3, 4])),
        *((3, chunks) for chunks in ([4, 7], [1, 2, 1, 5, 1], [4, 7, 1, 2])),
        *((1, chunks) for chunks in ([1, 1], [3, 1, 2])),
        (20, [3, 1, 2]),
        *((None, chunks) for chunks in ([1], [3, 1, 2], [1, 1, 1])),
        *(
            (slots, chunks, {"oneSlotOff": True})
            for slots, chunks in (
                (4, [3, 1, 1, 1]),
                (4, [9, 1, 3]),
                (4, [2, 1, 3, 1]),
                (3, [1, 1, 1, 1, 5]),
                (1, [2, 1]),
                (4, [5, 3]),
            )
        ),
    ],
    "headOf": [
        *((head, 12, 4) for head in (0, 1, 2, 3, 11)),
        *((head, 8, 2) for head in (3, 4)),
        *((head, 6, 1) for head in (0, 5)),
        *((head, 6, 6) for head in (0, 5)),
        *((head, 12, 4, {"repeat": True}) for head in (0, 1, 4, 11)),
        (5, 6, 1, {"repeat": True}),
        (5, 6, 6, {"repeat": True}),
    ],
    "cacheBytes": [
        *((cache_setup(12, kv, 64, 1023, None, 4),) for kv in (12, 4, 1)),
        *((cache_setup(12, 12, 64, 1023, window, 4),) for window in (1, 256, 1023, 5000)),
        *((cache_setup(48, 25, 64, tokens, 1024, 2),) for tokens in (1, 1024, 8192)),
        (cache_setup(1, 1, 2, 1, 1, 2),),
        (cache_setup(24, 4, 64, 32768, 256, 2),),
    ],
    "parameters": [
        (shape(*GPT2),),
        (shape(24, 16, 16, 64, 50257, 1024),),
        (shape(36, 20, 20, 64, 50257, 1024),),
        (shape(48, 25, 25, 64, 50257, 1024),),
        (shape(12, 12, 4, 64, 50257, 1024),),
        (shape(12, 12, 1, 64, 50257, 1024),),
        (shape(*GPT2, True),),
        (shape(12, 12, 4, 64, 50257, 1024, True),),
        (shape(1, 1, 1, 2, 1, 1),),
    ],
    "angle": [
        *((position, pair, 64, 10000) for position in (0, 1, 1023) for pair in (0, 6, 31)),
        (5, 0, 2, 10000),
        (100, 7, 16, 500000),
        (7, 3, 8, 1),
        *((position, 0, 64, 10000, {"bfloat16Angles": True}) for position in (256, 257, 1001)),
        *((100, pair, 64, 10000, {"bfloat16Angles": True}) for pair in (6, 31)),
    ],
    "bfloat16": [
        *((x,) for x in (0.0, 1.0, -1.0, 0.1, 3.14159, -2.71828, 1e-5, 256.0, 257.0, 258.0, 259.0)),
        *((x,) for x in (1.00390625, 1.01171875, 65535.0, 1e30)),
    ],
    "rotate": [
        *(([1.0, 0.0], position, 10000) for position in (0, 1, 100)),
        *((vector(4, 1), position, 10000) for position in (0, 3, 1023)),
        (vector(8, 2), 50, 500000),
        (vector(16, 3), 7, 10000),
        (vector(8, 2), 5, 10000, {"interleaved": True}),
        (vector(2, 4), 9, 10000, {"interleaved": True}),
        *((vector(8, 2), position, 10000, {"bfloat16Angles": True}) for position in (50, 1001)),
        (vector(8, 5), 300, 10000, {"interleaved": True, "bfloat16Angles": True}),
    ],
    "score": [
        *(
            (vector(8, 1), vector(8, 2), m, n, 10000)
            for m, n in ((0, 0), (5, 5), (9, 2), (107, 100))
        ),
        *((vector(2, 3), vector(2, 4), m, n, 10000) for m, n in ((1, 0), (40, 7))),
        (vector(16, 5), vector(16, 6), 300, 20, 500000),
        *(
            (vector(8, 1), vector(8, 2), m, n, 10000, {"restart": True})
            for m, n in ((0, 0), (5, 5), (9, 2), (107, 100))
        ),
        (vector(8, 1), vector(8, 2), 9, 2, 10000, {"interleaved": True}),
        (vector(8, 1), vector(8, 2), 300, 257, 10000, {"bfloat16Angles": True}),
    ],
    "stepBytes": [
        *((step_setup("ddp", ranks, 1, "bfloat16", *GPT2),) for ranks in (2, 4, 8)),
        *((step_setup("fsdp", ranks, 1, "bfloat16", *GPT2),) for ranks in (2, 4, 8)),
        *((step_setup(mode, 4, 3, "float32", *GPT2),) for mode in ("one", "ddp", "fsdp")),
        *((step_setup(mode, 8, 2, "bfloat16", *SMALL),) for mode in ("one", "ddp", "fsdp")),
        (step_setup("fsdp", 8, 2, "bfloat16", 1, 2, 1, 6, 33, 8),),
        (step_setup("fsdp", 4, 2, "float32", 3, 4, 2, 6, 33, 8, True),),
        (step_setup("ddp", 4, 1, "bfloat16", 3, 4, 2, 6, 33, 8, True),),
    ],
    "stepEvents": [
        *((step_setup("one", 2, micro_steps, "float32", *SMALL),) for micro_steps in (1, 2)),
        *((step_setup("ddp", 4, micro_steps, "float32", *SMALL),) for micro_steps in (1, 2)),
        *((step_setup("fsdp", 4, micro_steps, "bfloat16", *SMALL),) for micro_steps in (1, 2)),
        (step_setup("fsdp", 2, 1, "float32", 1, 2, 1, 4, 33, 8, True),),
        (step_setup("fsdp", 8, 1, "bfloat16", 3, 2, 2, 4, 33, 8, True),),
        (step_setup("ddp", 2, 2, "float32", *SMALL), {"noSync": True}),
        *(
            (step_setup("fsdp", 2, steps, "bfloat16", *SMALL), {"rootOnly": True})
            for steps in (1, 2)
        ),
    ],
}


def make_case(name, arguments):
    """Return [function, arguments, result] with the result of the model files."""
    inputs, mistakes = arguments, {}
    has_mistakes = isinstance(arguments[-1], dict) and arguments[-1].keys() <= MISTAKES.keys()
    if has_mistakes:
        *inputs, mistakes = arguments
    with make_mistakes(mistakes):
        result = FUNCTIONS[name](*inputs)
    if name in IN_FLOAT32:
        result = rounded(result)
    return [name, list(arguments), as_whole_numbers(result)]


def make_cases():
    return [make_case(name, case) for name, cases in ARGUMENTS.items() for case in cases]


def rounded(value):
    """Return a number, or all of a list, with the seven digits that float32 has."""
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}")


def as_whole_numbers(value):
    """Return a result in which bytes are integers where they are whole, as in JavaScript."""
    if isinstance(value, dict):
        return {key: as_whole_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


# The constants --------------------------------------------------------------------------------


def gpt2_sizes():
    """Return {name: {layers, heads, headDim}} of the files that train GPT-2's sizes."""
    sizes = {}
    for name, path in CONFIGS.items():
        _, options = configure_with_model(
            estimate_memory.EstimateConfig,
            [path],
            __doc__,
            model_config=lambda config: model_module(config.model).GPTConfig,
            hint=models_with_option,
        )
        config = make_config(model_module("model"), options)
        head_dim = config.n_embd // config.n_head
        sizes[name] = {"layers": config.n_layer, "heads": config.n_head, "headDim": head_dim}
    return sizes


def quality(preset):
    """Return the losses of a study of quality, with 95 % intervals, and what the page says of it.

    halfWidth         of the interval of the mean loss over the seeds
    difference        from the base, seed by seed, with an interval of its own
    kvHeadFraction    KV heads of the variant over query heads
    windowFraction    window of the variant over the sequence length
    """
    result, _ = read_experiment("quality", preset)
    run = result["config"]["run"]
    H, T = run["n_head"], run["block_size"]
    final = final_losses(result)
    rows = []
    for name, losses in final.items():
        options = variants(run)[name]
        loss = interval_of(losses)
        difference = paired_difference(losses, final["base"])
        rows.append(
            {
                "name": name,
                "loss": rounded(loss.mean),
                "halfWidth": rounded(loss.half_width),
                "difference": rounded(difference.mean),
                "differenceHalfWidth": rounded(difference.half_width),
                "kvHeadFraction": options.get("n_kv_head", H) / H,
                "windowFraction": options.get("window", T) / T,
                "rope": "rope" in options["model"],
            }
        )
    return {
        "layers": run["n_layer"],
        "heads": H,
        "channels": run["n_embd"],
        "blockSize": T,
        "tokens": run["max_steps"] * run["total_batch_size"],
        "seeds": len(result["config"]["seeds"]),
        "variants": rows,
    }


def make_constants():
    gpt2, swa = model_module("model").GPTConfig(), model_module("model_swa")
    return {
        "MIN_BLOCK": swa.MIN_BLOCK,
        "MAX_BLOCK": swa.MAX_BLOCK,
        "MAX_DENSE_QUERIES": swa.MAX_DENSE_QUERIES,
        "vocabSize": gpt2.vocab_size,
        "blockSize": gpt2.block_size,
        "sizes": gpt2_sizes(),
        "quality": {preset: quality(preset) for preset in QUALITY},
    }


# The page -------------------------------------------------------------------------------------


def to_json(value, width=200):
    """Return a value as JSON in as few lines as have at most `width` characters."""
    line = json.dumps(value, separators=(",", ":"))
    if len(line) <= width or not isinstance(value, dict | list):
        return line
    if isinstance(value, list):
        return "[\n" + ",\n".join(to_json(item) for item in value) + "\n]"
    items = [f"{json.dumps(key)}:{to_json(item)}" for key, item in value.items()]
    return "{\n" + ",\n".join(items) + "\n}"


def make_block(constants, cases):
    """Return the JSON of the page, with one case in a line."""
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    return f'{{"constants":{to_json(constants)},\n"cases":[\n{lines}\n]}}\n'


def read_block(text):
    """Return {constants, cases} of the page."""
    [block] = BLOCK.finditer(text)
    return json.loads(block[0].removeprefix(block[1]).removesuffix(block[2]))


def fill(text, block):
    """Return the page with another JSON block."""
    return BLOCK.sub(lambda match: match[1] + block + match[2], text)


def main(argv):
    configure(ExplorerConfig, argv, __doc__)
    block = make_block(make_constants(), make_cases())
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), block), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
