"""What do the three changes look like? Drawings for docs/REPORT.md.

    python -m experiments.drawings

Each function draw_NAME below draws docs/drawings/NAME.png. Nothing is measured. The masks follow
the rule 0 <= i - j < window; everything else is computed by the code of the model files.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle

from common.errors import run_program
from common.models import model_module
from configurator import configure
from tools.results.plot import COLORS

FOLDER = Path("docs/drawings")
BLACK, ORANGE, BLUE, _, LIGHT_BLUE, _, _, GRAY = COLORS
WHITE = "#FFFFFF"
PALE = "#E6E6E6"


@dataclass
class DrawingsConfig:
    """No options."""


# What is drawn --------------------------------------------------------------------------------


def window_mask(tokens, window):
    """Return a bool matrix (tokens, tokens): whether query i attends to key j."""
    i = torch.arange(tokens)[:, None]
    j = torch.arange(tokens)
    return (0 <= i - j) & (i - j < window)


def reach_of_two_layers(mask):
    """Return a bool matrix: whether output i of two layers depends on input j."""
    paths = mask.long() @ mask.long()  # from j to any position in one layer, from there to i
    return paths > 0


def ring_slots(window, prompt, steps):
    """Return the position in each slot of model_swa's KVCache, None in an empty slot.

    The first list is for the cache after the prefill of `prompt` tokens; one for each decode step
    follows.
    """
    swa = model_module("model_swa")
    config = swa.GPTConfig(n_layer=1, n_head=1, n_embd=1, window=window)
    cache = swa.KVCache(config, 1, prompt + steps, "cpu", torch.float32)
    held = []
    for tokens in [prompt] + [1] * steps:
        # The key of a token is its position + 1, because an empty slot holds 0.
        keys = 1.0 + torch.arange(cache.pos, cache.pos + tokens).view(1, 1, tokens, 1)
        cache.extend(0, keys, keys)
        cache.pos += tokens
        stored = cache.k.flatten().int().tolist()
        held.append([key - 1 if key else None for key in stored])
    return held


def computed_blocks(tokens, window):
    """Return, for each block of model_swa's attend_blocks, the positions of its queries and keys.

    In the order of the queries. Queries that are left over before the blocks count as one block.
    """
    swa = model_module("model_swa")
    blocks = []

    def record(q, k, v):
        """Take the place of attend_dense; q and k are (1, blocks, positions, 1)."""
        blocks.extend(zip(q[0, :, :, 0], k[0, :, :, 0], strict=True))
        return q

    positions = torch.arange(tokens).view(1, 1, tokens, 1)
    swa.attend_blocks(record, positions, positions, positions, window)
    return sorted(blocks, key=lambda block: block[0][0])


def rotate_vector(x, positions):
    """Return a query or key x (D,) as model_rope rotates it at these positions: (T, D)."""
    rope = model_module("model_rope")
    model = rope.GPT(rope.GPTConfig(n_layer=1, n_head=1, n_embd=len(x), vocab_size=1))
    cos, sin = model.rope_angles(positions)
    return rope.rotate(x.expand(1, 1, len(positions), -1), cos, sin)[0, 0]


def rope_scores(m, distances, head_dim):
    """Return the scores of a random query at position m and a random key at m + distance: (T,)."""
    q, k = torch.randn(2, head_dim, generator=torch.Generator().manual_seed(0))
    query = rotate_vector(q, torch.tensor([m]))[0]  # (D,)
    keys = rotate_vector(k, m + distances)  # (T, D)
    return keys @ query / head_dim**0.5


def group_heads(n_head, n_kv_head):
    """Return which KV head each query head of model_gqa uses, and the bytes of a cached token."""
    gqa = model_module("model_gqa")
    config = gqa.GPTConfig(n_layer=1, n_head=n_head, n_embd=n_head, n_kv_head=n_kv_head)
    T = 2  # with one token, attend would decode
    q = torch.zeros(1, n_head, T, 1)
    v = torch.arange(float(n_kv_head)).repeat_interleave(T).view(1, n_kv_head, T, 1)
    y = gqa.CausalSelfAttention(config, layer=0).attend(q, torch.zeros_like(v), v)
    cache = gqa.KVCache(config, 1, 1, "cpu", torch.float32)
    return y[0, :, 0, 0].int().tolist(), cache.nbytes


# The drawings, each of one or more panels (matplotlib Axes, side by side) ---------------------


def hide_axes(panel):
    """Remove the frame and the ticks of a panel; its labels stay."""
    panel.set_frame_on(False)
    panel.set(xticks=[], yticks=[])


def draw_box(panel, x, y, text, color):
    """Draw a box with a text in it around (x, y)."""
    corner = (x - 0.45, y - 0.45)
    panel.add_patch(Rectangle(corner, 0.9, 0.9, facecolor=color, edgecolor=GRAY))
    text_color = WHITE if color == BLUE else BLACK
    panel.text(x, y, text, color=text_color, ha="center", va="center")


def draw_matrix(panel, numbers, title):
    """Draw a matrix (queries, keys) of the numbers 0, 1 and 2: pale, light blue and blue."""
    colors = ListedColormap((PALE, LIGHT_BLUE, BLUE))
    # Smooth edges from mixed colors; mixed numbers would be another kind: (0 + 2) / 2 = 1.
    panel.imshow(numbers.numpy(), cmap=colors, vmin=0, vmax=2, interpolation_stage="rgba")
    panel.set(xlabel="key position", ylabel="query position", title=title)


def add_legend(panel, labels):
    """Explain the colors of a drawing, {text: color}, below its panels."""
    patches = [Patch(facecolor=c, edgecolor=GRAY, label=text) for text, c in labels.items()]
    panel.figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)


def draw_mask(causal, windowed, stacked):
    """Draw which keys a query attends to, without and with a window, and in two layers."""
    tokens, window = 12, 4
    mask = window_mask(tokens, window)
    draw_matrix(causal, 2 * window_mask(tokens, tokens), "causal mask")
    draw_matrix(windowed, 2 * mask, f"sliding window of {window}")
    draw_matrix(stacked, mask.long() + reach_of_two_layers(mask), f"two layers, window of {window}")
    for panel in (causal, windowed, stacked):
        panel.set(xticks=range(tokens), yticks=range(tokens))
        panel.tick_params(labelsize="small")
        for edge in range(1, tokens):
            panel.axhline(edge - 0.5, color=WHITE)
            panel.axvline(edge - 0.5, color=WHITE)
    labels = {"attends to": BLUE, "reached through two layers": LIGHT_BLUE, "not reached": PALE}
    add_legend(causal, labels)


def draw_ring(panel):
    """Draw the position in each slot of the ring buffer, step by step."""
    window, prompt, steps = 4, 3, 8
    held = ring_slots(window, prompt, steps)
    for x, positions in enumerate(held):
        for slot, position in enumerate(positions):
            if position is None:
                draw_box(panel, x, slot, "", WHITE)
            elif x > 0 and position == held[x - 1][slot]:
                draw_box(panel, x, slot, position, LIGHT_BLUE)
            else:
                draw_box(panel, x, slot, position, ORANGE)
    names = [f"decode\n{prompt + step}" for step in range(steps)]
    hide_axes(panel)
    panel.set_xticks(range(len(held)), [f"prefill\n0 to {prompt - 1}", *names])
    panel.set_yticks(range(window), [f"slot {slot}" for slot in range(window)])
    panel.tick_params(length=0)
    panel.set(xlim=(-0.5, len(held) - 0.5), ylim=(window - 0.5, -0.5))  # slot 0 at the top
    panel.set_xlabel("step, and the positions of its tokens")
    panel.set_title(f"positions in the slots: position p is in slot p % {window}")
    add_legend(panel, {"written in this step": ORANGE, "kept": LIGHT_BLUE, "empty": WHITE})


def draw_blocks(short, medium, long):
    """Draw the scores that blocks of queries compute, for windows of three lengths."""
    tokens = 1024
    for panel, window in ((short, 16), (medium, 256), (long, 400)):
        needed = window_mask(tokens, window)
        computed = torch.zeros(tokens, tokens, dtype=torch.long)
        for queries, keys in computed_blocks(tokens, window):
            computed[queries[:, None], keys] = 1
            corner = (keys[0] - 0.5, queries[0] - 0.5)
            panel.add_patch(Rectangle(corner, len(keys), len(queries), fill=False))
        percent = 100 * needed.sum() / computed.sum()
        title = f"window of {window},\nblocks of {len(queries)} queries,\n{percent:.0f} % needed"
        draw_matrix(panel, computed + needed, title)
        panel.set(xticks=(0, 512, 1024), yticks=(0, 512, 1024))
    labels = {"needed": BLUE, "computed, then masked": LIGHT_BLUE, "not computed": PALE}
    add_legend(short, labels)


def draw_rotation(high, low, scores):
    """Draw a pair of high and one of low frequency, and the scores of rotated vectors."""
    head_dim = 64
    positions = torch.arange(7)
    for panel, pair in ((high, 0), (low, 6)):
        x = torch.zeros(head_dim)
        x[pair] = 1
        arrows = rotate_vector(x, positions)[:, [pair, pair + head_dim // 2]]
        panel.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE))
        for position, (x, y) in enumerate(arrows.tolist()):
            style = {"arrowstyle": "->", "color": BLUE, "shrinkA": 0, "shrinkB": 0}
            panel.annotate("", (x, y), (0, 0), arrowprops=style)
            panel.text(1.15 * x, 1.15 * y, position, ha="center", va="center")
        radians = torch.atan2(arrows[1, 1], arrows[1, 0])
        hide_axes(panel)
        panel.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
        panel.set_title(f"pair {pair} of {head_dim // 2}:\n{radians:.2f} radians per position")
        panel.set_xlabel(f"at positions 0 to {positions[-1]}")
    distances = torch.arange(-40, 1)
    for m, style in ((40, {"color": ORANGE, "linewidth": 4}), (1000, {"color": BLACK})):
        scores.plot(distances, rope_scores(m, distances, head_dim), label=f"m = {m}", **style)
    scores.margins(y=0.25)  # room for the legend
    scores.set(xlabel="n - m (tokens)", title="score of a query at position m\nand a key at n")
    scores.legend(loc="lower center", ncols=2, frameon=False)


def draw_groups(mha, gqa, mqa):
    """Draw which query heads use the same KV head."""
    n_head = 8
    _, bytes_of_mha = group_heads(n_head, n_head)
    for panel, name, n_kv_head in ((mha, "MHA", 8), (gqa, "GQA", 2), (mqa, "MQA", 1)):
        used, cache_bytes = group_heads(n_head, n_kv_head)
        for kv_head in range(n_kv_head):
            group = [query_head for query_head in range(n_head) if used[query_head] == kv_head]
            center = sum(group) / len(group)
            for query_head in group:
                panel.plot((query_head, center), (0.45, 1.55), color=GRAY)
                draw_box(panel, query_head, 0, query_head, BLUE)
            draw_box(panel, center, 2, kv_head, ORANGE)
        hide_axes(panel)
        panel.set(xlim=(-0.7, n_head - 0.3), ylim=(2.5, -0.5), aspect="equal")
        percent = 100 * cache_bytes / bytes_of_mha
        panel.set_title(f"{name}, KV heads: {n_kv_head}\nKV cache: {percent:g} %")
    mha.set_yticks((0, 2), ("query\nheads", "KV\nheads"))
    mha.tick_params(length=0)


# {name: function, number of panels, height in inches}
DRAWINGS = {
    "mask": (draw_mask, 3, 3.3),
    "ring": (draw_ring, 1, 3.1),
    "blocks": (draw_blocks, 3, 3.4),
    "rotation": (draw_rotation, 3, 2.9),
    "groups": (draw_groups, 3, 1.5),
}


def main(argv):
    configure(DrawingsConfig, argv, __doc__)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (draw, panels, height) in DRAWINGS.items():
        figure = Figure(figsize=(8, height), layout="constrained")
        with matplotlib.rc_context({"axes.titlesize": "medium"}):
            draw(*figure.subplots(1, panels, squeeze=False)[0])
        path = FOLDER / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
