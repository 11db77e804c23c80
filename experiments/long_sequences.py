"""What do long sequences cost? Training and decoding from 1k to 32k tokens: time, memory, KV cache.

python -m experiments.long_sequences --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import run_program
from configurator import configure
from experiments.steps import (
    make_decoding_step,
    make_training_step,
    measure_step_memory,
)
from experiments.study import COLOURS, Study, StudyConfig, label_points
from tools.bench.results import markdown_table
from tools.bench.turns import run_in_new_process, take_turns


@dataclass
class Config:
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 256
    vocab_size: int = 257
    window: int = 256
    lengths: tuple = (1024, 2048, 4096, 8192, 16384, 32768)  # T
    rounds: int = 3  # timed training steps of each model; ten times as many of decoding


PRESETS = {
    "cpu": Config(),
    "gpu": Config(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, rounds=5),
}
NAMES = ("base", "GQA 1/4", "SWA", "all three")
LINE_COLOURS = (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5])


def model_shapes(config, T):
    """Return {name: shape} of the models compared, for sequences of T tokens."""
    shape = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "block_size": T,
    }
    n_kv_head, window = config.n_head // 4, config.window
    return {
        "base": {**shape, "model": "model"},
        "GQA 1/4": {**shape, "model": "model_gqa", "n_kv_head": n_kv_head},
        "SWA": {**shape, "model": "model_swa", "window": window},
        "all three": {
            **shape,
            "model": "model_rope_gqa_swa",
            "n_kv_head": n_kv_head,
            "window": window,
        },
    }


# Measurements, by name of the model -----------------------------------------------------------


def measure_training(config, T, device, dtype):
    """Return {name: seconds of a training step on one sequence of T tokens}."""
    steps = {}
    for name, shape in model_shapes(config, T).items():
        steps[name] = make_training_step(shape, 1, T, device, dtype)
    return take_turns(config.rounds, device, steps)


def measure_memory(config, T, device, dtype):
    """Return {name: peak GB of training on one sequence of T tokens}."""
    memory = {}
    for name, shape in model_shapes(config, T).items():
        arguments = (shape, 1, T, device, dtype)
        memory[name] = run_in_new_process(measure_step_memory, *arguments)
    return memory


def measure_decoding(config, T, device, dtype):
    """Return {name: seconds of decoding the token at position T - 1, bytes of the KV cache}."""
    steps, cache_bytes = {}, {}
    for name, shape in model_shapes(config, T).items():
        steps[name], cache_bytes[name] = make_decoding_step(shape, T - 1, device, dtype)
    seconds = take_turns(10 * config.rounds, device, steps)
    return {name: {"seconds": seconds[name], "cache_bytes": cache_bytes[name]} for name in steps}


# Table and plot -------------------------------------------------------------------------------


def costs(state):
    """Return a table of time and memory of a training step, and time of decoding a token."""
    rows = []
    for T in state["config"]["lengths"]:
        training = state["points"][f"{T}, training"]
        memory = state["points"][f"{T}, memory"]
        decoding = state["points"][f"{T}, decoding"]
        row = [f"{T // 1024}k"]
        for name in NAMES:
            milliseconds = 1000 * decoding[name]["seconds"]
            row.append(f"{training[name]:.2f} s, {memory[name]:.2f} GB; {milliseconds:.2f} ms")
        row.append(f"{training['base'] / training['SWA']:.1f}x")
        rows.append(row)
    return markdown_table(["T", *NAMES, "base / SWA, training"], rows)


def draw(state, training, memory, decoding):
    """Plot the costs over the sequence length, a line for each model."""
    draw_costs(state, training, "training", "training step (s)")
    draw_costs(state, memory, "memory", "memory of training (GB)")
    draw_costs(state, decoding, "decoding", "decoding a token (ms)")


def draw_costs(state, panel, key, text):
    """Draw one kind of points into a panel."""
    lengths = state["config"]["lengths"]
    ends = []
    for name, colour in zip(NAMES, LINE_COLOURS, strict=True):
        values = [state["points"][f"{T}, {key}"][name] for T in lengths]
        if key == "decoding":
            values = [1000 * value["seconds"] for value in values]
        panel.plot(lengths, values, color=colour, marker="o", markersize=4)
        ends.append((name, lengths[-1], values[-1], colour))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    label_points(panel, *ends)
    panel.set_xlim(right=5 * lengths[-1])  # room for the labels
    panel.set_xticks(lengths, [f"{T // 1024}k" for T in lengths])
    panel.set_xlabel("T (tokens)")
    panel.set_ylabel(text)


def main(argv):
    study = Study("long_sequences", configure(StudyConfig, argv, __doc__), PRESETS)
    for T in study.config.lengths:
        arguments = (study.config, T, study.device, study.dtype)
        study.measure_once(f"{T}, training", measure_training, *arguments)
        study.measure_once(f"{T}, memory", measure_memory, *arguments)
        study.measure_once(f"{T}, decoding", measure_decoding, *arguments)
    study.finish(draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
