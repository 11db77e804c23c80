"""What do long sequences cost? Training and decoding from 1k to 32k tokens: time, memory, KV cache.

python -m experiments.long_sequences --preset=cpu
"""

import sys
from dataclasses import dataclass

from common.errors import run_program
from configurator import configure
from experiments.steps import measure_step_memory, time_decoding, time_steps
from experiments.study import Study, StudyConfig
from tools.results.plot import COLORS, draw_line, label_points
from tools.results.table import markdown_table
from tools.results.turns import run_in_new_process


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
LINE_COLORS = (COLORS[0], COLORS[1], COLORS[2], COLORS[5])


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
    both = {"n_kv_head": n_kv_head, "window": window}
    return {
        "base": {**shape, "model": "model"},
        "GQA 1/4": {**shape, "model": "model_gqa", "n_kv_head": n_kv_head},
        "SWA": {**shape, "model": "model_swa", "window": window},
        "all three": {**shape, "model": "model_rope_gqa_swa", **both},
    }


# Measurements, by name of the model -----------------------------------------------------------


def measure_training(config, T, device, dtype):
    """Return {name: seconds of a training step on one sequence of T tokens}."""
    return time_steps(model_shapes(config, T), 1, config.rounds, device, dtype)


def measure_memory(config, T, device, dtype):
    """Return {name: peak GB of training on one sequence of T tokens}."""
    memory = {}
    for name, shape in model_shapes(config, T).items():
        memory[name] = run_in_new_process(measure_step_memory, shape, 1, device, dtype)
    return memory


def measure_decoding(config, T, device, dtype):
    """Return {name: seconds of decoding the token at position T - 1, bytes of the KV cache}."""
    shapes, rounds = model_shapes(config, T), 10 * config.rounds
    seconds, cache_bytes = time_decoding(shapes, 1, T - 1, rounds, device, dtype)
    return {name: {"seconds": seconds[name], "cache_bytes": cache_bytes[name]} for name in shapes}


# Table and plot -------------------------------------------------------------------------------


def measured_lengths(result):
    """Return the sequence lengths of which everything is measured."""
    lengths = result["config"]["lengths"]
    return [T for T in lengths if f"{T}, decoding" in result["values"]]


def costs(result):
    """Return a table of time and memory of a training step, and time of decoding a token."""
    rows = []
    for T in measured_lengths(result):
        training = result["values"][f"{T}, training"]
        memory = result["values"][f"{T}, memory"]
        decoding = result["values"][f"{T}, decoding"]
        row = [f"{T // 1024}k"]
        for name in NAMES:
            milliseconds = 1000 * decoding[name]["seconds"]
            row.append(f"{training[name]:.2f} s, {memory[name]:.2f} GB; {milliseconds:.2f} ms")
        row.append(f"{training['base'] / training['SWA']:.1f}x")
        rows.append(row)
    return markdown_table(["T", *NAMES, "base / SWA, training"], rows)


def draw(result, training, memory, decoding):
    """Plot the costs over the sequence length, a line for each model."""
    draw_costs(result, training, "training", "training step (s)")
    draw_costs(result, memory, "memory", "memory of training (GB)")
    draw_costs(result, decoding, "decoding", "decoding a token (ms)")


def draw_costs(result, panel, key, text):
    """Draw one kind of values into a panel."""
    lengths = measured_lengths(result)
    ends = []
    for name, color in zip(NAMES, LINE_COLORS, strict=True):
        values = [result["values"][f"{T}, {key}"][name] for T in lengths]
        if key == "decoding":
            values = [1000 * value["seconds"] for value in values]
        ends.append(draw_line(panel, name, lengths, values, color))
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
        study.add(str(T), f"{T}, training", measure_training, *arguments)
        study.add(str(T), f"{T}, memory", measure_memory, *arguments)
        study.add(str(T), f"{T}, decoding", measure_decoding, *arguments)
    study.run(costs, draw=draw)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
