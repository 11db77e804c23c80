"""The panels of experiments/drawings.py: each function draw_NAME draws one drawing or one frame.

A panel is a matplotlib Axes. Where a drawing moves, its function gets the number of the frame, too.
"""

import math

import torch
from matplotlib.colors import ListedColormap
from matplotlib.patches import Circle, Patch, Rectangle

from experiments.drawing_data import (
    PARTS,
    ROOT,
    computed_blocks,
    group_heads,
    reach_of_two_layers,
    ring_steps,
    rope_scores,
    rotate_pair,
    training_step,
    window_mask,
)
from tools.results.plot import COLORS

BLACK, ORANGE, BLUE, VERMILION, LIGHT_BLUE, GREEN, PINK, GRAY = COLORS
WHITE = "#FFFFFF"
PALE = "#E6E6E6"
# In a training step, as in docs/explorer.html; pale: not what the rank keeps.
PALE_GREEN = "#8CD2BC"
PALE_PINK = "#F0CFE0"

# Pieces ---------------------------------------------------------------------------------------


def hide_axes(panel):
    """Remove the frame and the ticks of a panel; its labels stay."""
    panel.set_frame_on(False)
    panel.set(xticks=[], yticks=[])


def draw_box(panel, x, y, text, color, width=0.9, height=0.9, fontsize="medium", edge=GRAY):
    """Draw a box with a text in it around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    panel.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor=edge))
    text_color = WHITE if color == BLUE else BLACK
    panel.text(x, y, text, color=text_color, fontsize=fontsize, ha="center", va="center")


def draw_outline(panel, x, y, width, height):
    """Draw a frame around what the present frame of a moving drawing is about."""
    style = {"fill": False, "edgecolor": BLACK, "linewidth": 2, "clip_on": False, "zorder": 3}
    panel.add_patch(Rectangle((x, y), width, height, **style))


def draw_matrix(panel, numbers, title):
    """Draw a matrix (queries, keys) of the numbers 0, 1 and 2: pale, light blue and blue."""
    colors = ListedColormap((PALE, LIGHT_BLUE, BLUE))
    # Smooth edges from mixed colors; mixed numbers would be another kind: (0 + 2) / 2 = 1.
    panel.imshow(numbers.numpy(), cmap=colors, vmin=0, vmax=2, interpolation_stage="rgba")
    panel.set(xlabel="key position", ylabel="query position", title=title)


def draw_grid(panel, tokens):
    """Draw lines between the cells of a small matrix, and label each row and column."""
    panel.set(xticks=range(tokens), yticks=range(tokens))
    panel.tick_params(labelsize="small")
    for edge in range(1, tokens):
        panel.axhline(edge - 0.5, color=WHITE)
        panel.axvline(edge - 0.5, color=WHITE)


def add_legend(panel, labels, columns=3, fontsize="medium"):
    """Explain the colors of a drawing, {text: color}, below its panels."""
    patches = [Patch(facecolor=c, edgecolor=GRAY, label=text) for text, c in labels.items()]
    style = {"loc": "outside lower center", "frameon": False, "fontsize": fontsize}
    panel.figure.legend(handles=patches, ncols=columns, **style)


# Still drawings -------------------------------------------------------------------------------


def draw_mask(causal, windowed, stacked):
    """Draw which keys a query attends to, without and with a window, and in two layers."""
    tokens, window = 12, 4
    mask = window_mask(tokens, window)
    draw_matrix(causal, 2 * window_mask(tokens, tokens), "causal mask")
    draw_matrix(windowed, 2 * mask, f"sliding window of {window}")
    draw_matrix(stacked, mask.long() + reach_of_two_layers(mask), f"two layers, window of {window}")
    for panel in (causal, windowed, stacked):
        draw_grid(panel, tokens)
    labels = {"attends to": BLUE, "reached through two layers": LIGHT_BLUE, "not reached": PALE}
    add_legend(causal, labels)


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


# Moving drawings ------------------------------------------------------------------------------

RING_WINDOW = 4
RING_CHUNKS = (3, 1, 1, 1, 3, 1, 1)  # tokens of each forward pass: 11 in all


def draw_ring(frame, keys, slots):
    """Draw what the query at position `frame` attends to, and the ring buffer up to its pass."""
    held, attended = ring_steps(RING_WINDOW, RING_CHUNKS)
    tokens = sum(RING_CHUNKS)
    queries = [positions for chunk in attended for positions in chunk]
    mask = torch.zeros(tokens, tokens, dtype=torch.long)
    for query, positions in enumerate(queries[: frame + 1]):
        mask[query, positions] = 2
    draw_matrix(keys, mask, "keys that a query attends to")
    draw_grid(keys, tokens)
    draw_outline(keys, -0.5, frame - 0.5, tokens, 1)

    ends = torch.tensor(RING_CHUNKS).cumsum(0).tolist()
    names = []
    for x, T in enumerate(RING_CHUNKS):
        first, last = ends[x] - T, ends[x] - 1
        names.append(name_pass(first, last))
        before = held[x - 1] if x > 0 else [None] * RING_WINDOW
        if first <= frame:
            draw_slots(slots, x, held[x], before)
        if first <= frame <= last:
            draw_outline(slots, x - 0.5, -0.5, 1, RING_WINDOW)
            slots.set_xlabel(describe_query(frame, first, T, queries[frame]))
    hide_axes(slots)
    slots.set_xticks(range(len(held)), names, fontsize="small")
    slots.set_yticks(range(RING_WINDOW), [f"slot {slot}" for slot in range(RING_WINDOW)])
    slots.tick_params(length=0)
    slots.set(xlim=(-0.5, len(held) - 0.5), ylim=(RING_WINDOW - 0.5, -0.5))  # slot 0 at the top
    slots.set_title(f"positions in the slots: position p is in slot p % {RING_WINDOW}")
    labels = {"attends to": BLUE, "written in this pass": ORANGE, "kept": LIGHT_BLUE}
    add_legend(keys, labels | {"empty": WHITE}, columns=4)


def draw_slots(panel, x, positions, before):
    """Draw the positions in the slots after a pass; `before` has those before it."""
    for slot, position in enumerate(positions):
        if position is None:
            draw_box(panel, x, slot, "", WHITE)
        elif position == before[slot]:
            draw_box(panel, x, slot, position, LIGHT_BLUE)
        else:
            draw_box(panel, x, slot, position, ORANGE)


def name_pass(first, last):
    """Return the name of a forward pass over the positions first .. last, in two lines."""
    if first == last:
        return f"decode\n{first}"
    kind = "prefill" if first == 0 else "chunk"
    return f"{kind}\n{first} to {last}"


def describe_query(query, first, T, positions):
    """Return two lines about a query in a forward pass of T tokens from position `first` on."""
    keys = f"keys {positions[0]} to {query}" if len(positions) > 1 else f"key {query}"
    attends = f"query {query} attends to {keys}"
    if T == 1:
        return f"{attends}:\nall of them in slots, its own included"
    if first == 0:
        return f"{attends}:\nnew in this pass, not from the slots"
    old = ", ".join(str(position) for position in positions if position < first)
    return f"{attends}:\n{old} from the slots, read before the chunk is stored"


TOKENS = 1024
ROWS = 64  # queries of a frame


def draw_blocks(frame, dense, *blocked):
    """Draw the scores computed for the queries of the first frames: with a mask, and in blocks."""
    end = (frame + 1) * ROWS
    positions = torch.arange(TOKENS)
    rows = [(queries, positions) for queries in positions.split(ROWS)]
    draw_scores(dense, "mask", 256, rows, end)
    for panel, window in zip(blocked, (256, 400, 16), strict=True):
        blocks = computed_blocks(TOKENS, window)
        draw_scores(panel, "blocks", window, blocks, end)
        for queries, keys in blocks:
            if queries[0] < end:
                corner = (keys[0] - 0.5, queries[0] - 0.5)
                panel.add_patch(Rectangle(corner, len(keys), len(queries), fill=False))
        panel.set(ylabel="", yticklabels=())
    add_legend(dense, {"needed": BLUE, "computed, then masked": LIGHT_BLUE, "not computed": PALE})


def draw_scores(panel, name, window, blocks, end):
    """Draw and count the scores of the blocks that begin before the query `end`."""
    scores = torch.zeros(TOKENS, TOKENS, dtype=torch.long)
    for queries, keys in blocks:
        if queries[0] < end:
            scores[queries[:, None], keys] = 1
    count = int(scores.sum())
    scores *= 1 + window_mask(TOKENS, window).long()
    percent = 100 * (scores == 2).sum() / count
    title = f"{name}, window of {window}:\n{count:,} scores,\n{percent:.0f} % of them needed"
    draw_matrix(panel, scores, title)
    panel.set(xticks=(0, 512, 1024), yticks=(0, 512, 1024))


HEAD_DIM = 64
DISTANCE = 3  # the key is so many positions before the query
LAST_POSITION = 33  # of the query


def draw_rotation(frame, *panels):
    """Draw three pairs of a query and a key that advance together, and the score of all pairs."""
    position = DISTANCE + frame  # of the query
    *circles, scores = panels
    for panel, pair in zip(circles, (0, 6, 12), strict=True):
        hands = rotate_pair(pair, torch.arange(position + 1), HEAD_DIM)
        panel.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE))
        panel.scatter(hands[:, 0], hands[:, 1], s=9, color=GRAY)
        for hand, color in ((hands[position - DISTANCE], ORANGE), (hands[position], BLUE)):
            style = {"arrowstyle": "->", "color": color, "shrinkA": 0, "shrinkB": 0, "linewidth": 2}
            panel.annotate("", hand.tolist(), (0, 0), arrowprops=style)
        radians = math.atan2(hands[1, 1], hands[1, 0])
        hide_axes(panel)
        panel.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        panel.set_title(f"pair {pair} of {HEAD_DIM // 2}:\n{radians:.2f} rad per position")
        turns = position * radians / math.tau
        panel.set_xlabel(f"at position {position}:\n{turns:.1f} turns")
    queries = torch.arange(DISTANCE, LAST_POSITION + 1)
    for keys, color, label in (
        (torch.zeros_like(queries), LIGHT_BLUE, "key stays at position 0"),
        (queries - DISTANCE, BLACK, f"key stays {DISTANCE} behind the query"),
    ):
        values = rope_scores(queries, keys, HEAD_DIM)
        scores.plot(queries, values, color=color, alpha=0)  # sets the limits for all frames
        scores.plot(queries[: frame + 1], values[: frame + 1], color=color, label=label)
        scores.plot(queries[frame], values[frame], "o", color=color)
    bottom, top = scores.get_ylim()
    scores.set_ylim(bottom, top + 0.4 * (top - bottom))  # room for the legend
    scores.set(xlabel="position of the query", title="score of query and key, all pairs")
    scores.legend(loc="upper center", frameon=False, fontsize="small")
    add_legend(scores, {"query": BLUE, f"key, {DISTANCE} positions behind": ORANGE})


RANK_ROWS = ("parameters", "gradients", "AdamW's state")
RANK_1 = 4.2  # where the rows of rank 1 begin


def draw_step(frame, ddp, fsdp, timeline):
    """Draw what two ranks hold and send in a moment of a training step, and all until then."""
    steps = {"DDP": training_step(fsdp=False), "FSDP": training_step(fsdp=True)}
    for panel, (name, moments) in zip((ddp, fsdp), steps.items(), strict=True):
        moment = moments[frame]
        draw_rank(panel, moment, 0, shards=name == "FSDP")
        draw_rank(panel, moment, 1, shards=name == "FSDP")
        for collective, what in moment.before + moment.after:
            if what in PARTS:
                draw_collective(panel, PARTS.index(what), collective, VERMILION)
            else:
                draw_collective(panel, 1, f"{collective}: {what}", ORANGE)
        hide_axes(panel)
        panel.set(xlim=(-0.55, 2.55), ylim=(RANK_1 + 2.6, -0.6), title=name)
        panel.set_xticks(range(3), (f"E: {ROOT}", *PARTS[1:]), fontsize="small")
        panel.xaxis.tick_top()
        panel.tick_params(length=0)
    ticks = [*range(3), *(RANK_1 + row for row in range(3))]
    labels = [f"rank {rank}: {row}" for rank in (0, 1) for row in RANK_ROWS]
    ddp.set_yticks(ticks, labels, fontsize="small")
    draw_timeline(timeline, steps, frame)
    add_legend(
        ddp,
        {
            "parameters that the rank keeps": GREEN,
            "parameters, gathered": PALE_GREEN,
            "AdamW's state": GRAY,
            "gradient of the rank's sequences": PALE_PINK,
            "mean gradient of the ranks": PINK,
            "gradient, zeros": PALE,
        },
        fontsize="small",
    )


def draw_rank(panel, moment, rank, shards):
    """Draw the parameters, gradients and optimizer state that a rank holds."""
    top = RANK_1 * rank
    for x, part in enumerate(PARTS):
        full = [WHITE, WHITE, WHITE]  # colors of the full tensors of the three rows
        kept = [GREEN, WHITE, GRAY]  # colors of what the rank keeps: under FSDP a half of them
        if part in moment.gathered:
            full[0] = PALE_GREEN
        if part in moment.own:
            full[1] = kept[1] = PALE_PINK
        elif part in moment.mean:
            kept[1] = PINK
        elif not shards:
            kept[1] = PALE
        for row in range(3):
            y = top + row
            draw_box(panel, x, y, "", full[row], height=0.8)
            if not shards:
                draw_box(panel, x, y, "", kept[row], height=0.8)
            elif kept[row] != full[row]:
                draw_box(panel, x - 0.225 + 0.45 * rank, y, "", kept[row], 0.45, 0.8)
        if part == moment.part:
            draw_outline(panel, x - 0.49, top - 0.52, 0.98, 3.04)


def draw_collective(panel, x, text, color):
    """Draw a collective as an arrow between the two ranks."""
    style = {"arrowstyle": "<->", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
    panel.annotate("", (x, 2.55), (x, RANK_1 - 0.55), arrowprops=style)
    box = {"facecolor": WHITE, "edgecolor": "none", "pad": 1}
    panel.text(x, (RANK_1 + 2) / 2, text, ha="center", va="center", fontsize="small", bbox=box)


def draw_timeline(panel, steps, frame):
    """Draw the parts that have computed, and the collectives, up to a moment."""
    rows = ["computes", "DDP: all-reduce"]
    rows += [f"FSDP: {name}" for name in ("all-gather", "reduce-scatter", "all-reduce")]
    short = {part: part[-1] for part in PARTS} | {ROOT: "E"}
    for name, moments in steps.items():
        for x, moment in enumerate(moments[: frame + 1]):
            if moment.part and name == "DDP":  # FSDP computes the same
                draw_box(panel, x, 0, short[moment.part], PALE, fontsize="small")
            for collective, what in moment.before + moment.after:
                y = rows.index(f"{name}: {collective}")
                color = VERMILION if what in PARTS else ORANGE
                draw_box(panel, x, y, short.get(what, what), color, fontsize="x-small")
    draw_outline(panel, frame - 0.5, -0.5, 1, len(rows))
    moments = steps["DDP"]
    computes = f": {moments[frame].computes}" if moments[frame].computes else ""
    panel.set_title(f"{moments[frame].phase}{computes}")
    phases = {}
    for x, moment in enumerate(moments):
        if moment.part:
            phases.setdefault(moment.phase.replace(", ", "\n"), []).append(x)
    hide_axes(panel)
    centers = [sum(columns) / len(columns) for columns in phases.values()]
    panel.set_xticks(centers, phases, fontsize="small")
    panel.set_yticks(range(len(rows)), rows, fontsize="small")
    panel.tick_params(length=0)
    panel.set(xlim=(-0.5, len(moments) - 0.5), ylim=(len(rows) - 0.5, -0.5))
