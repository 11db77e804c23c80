"""What do long sequences cost? Time and memory of training, time and cache of decoding, from 1k to 32k tokens.

python -m experiments.long_sequences --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import program
from configurator import configure
from experiments.steps import decoding_step, in_new_process, step_memory, training_step
from experiments.study import COLOURS, Study, StudyConfig, label, markdown
from tools.bench import take_turns


@dataclass
class Config:
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 257
    window: int = 256
    lengths: tuple = (1024, 2048, 4096, 8192, 16384, 32768)
    rounds: int = 3  # of training steps taking turns; ten times as many of decoding


PRESETS = {
    "cpu": Config(),
    "gpu": Config(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, rounds=5),
}


def contestants(config, T):
    shape = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")} | {
        "block_size": T
    }
    quarter, window = {"n_kv_head": config.n_head // 4}, {"window": config.window}
    return {
        "base": shape | {"model": "model"},
        "GQA 1/4": shape | {"model": "model_gqa"} | quarter,
        "SWA": shape | {"model": "model_swa"} | window,
        "all three": shape | {"model": "model_rope_gqa_swa"} | quarter | window,
    }


def training(config, T, device, dtype):
    steps = {
        name: training_step(shape, 1, T, device, dtype)
        for name, shape in contestants(config, T).items()
    }
    return take_turns(config.rounds, device, steps)


def decoding(config, T, device, dtype):
    made = {
        name: decoding_step(shape, T - 1, device, dtype)
        for name, shape in contestants(config, T).items()
    }
    seconds = take_turns(
        10 * config.rounds, device, {name: step for name, (step, _) in made.items()}
    )
    return {
        name: {"seconds": seconds[name], "cache_bytes": nbytes}
        for name, (_, nbytes) in made.items()
    }


def memory(config, T, device, dtype):
    shapes = contestants(config, T)
    return {
        name: in_new_process(step_memory, shape, 1, T, device, dtype)
        for name, shape in shapes.items()
    }


def costs(state):
    """Markdown: time and memory of a training step, time of decoding a token."""
    points, rows = state["points"], []
    for T in state["config"]["lengths"]:
        train, gb, decode = (points[f"{T}, {key}"] for key in ("training", "memory", "decoding"))
        cells = [
            f"{train[n]:.2f} s, {gb[n]:.2f} GB; {1e3 * d['seconds']:.2f} ms"
            for n, d in decode.items()
        ]
        rows.append([f"{T // 1024}k", *cells, f"{train['base'] / train['SWA']:.1f}x"])
    return markdown(["T", *contestants(Config(), 1), "base / SWA, training"], rows)


def draw(state, training, memory, decoding):
    points, lengths = state["points"], state["config"]["lengths"]
    panels = {
        "training": (training, "training step (s)"),
        "memory": (memory, "memory of training (GB)"),
    }
    for key, (panel, text) in (panels | {"decoding": (decoding, "decoding a token (ms)")}).items():
        ends = []
        for name, colour in zip(contestants(Config(), 1), (0, 1, 2, 5), strict=True):
            y = [points[f"{T}, {key}"][name] for T in lengths]
            y = [1000 * value["seconds"] for value in y] if key == "decoding" else y
            panel.plot(lengths, y, color=COLOURS[colour], marker="o", markersize=4)
            ends.append((name, lengths[-1], y[-1], COLOURS[colour]))
        label(panel, *ends)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlim(right=5 * lengths[-1])
        panel.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
        panel.set_xlabel("T (tokens)")
        panel.set_ylabel(text)


@program
def main(argv):
    study = Study("long_sequences", configure(StudyConfig, argv, __doc__), PRESETS)
    for T in study.config.lengths:
        for measure in (training, memory, decoding):
            study.point(
                f"{T}, {measure.__name__}", measure, study.config, T, study.device, study.dtype
            )
    study.finish(draw)


if __name__ == "__main__":
    main(sys.argv[1:])
