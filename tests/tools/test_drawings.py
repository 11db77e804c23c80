"""experiments/drawings.py: what it draws is what the models compute, and what two ranks do."""

import dataclasses
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from ranks import command, fork

import model
import model_swa
from experiments import drawing_data, drawing_panels, drawings, look

ROOT = Path(__file__).parents[2]
MOVING = [name for name, drawing in drawings.DRAWINGS.items() if drawing.frames]
DOCUMENTS = ("README.md", "docs/REPORT.md", "docs/DISTRIBUTED.md")
CHUNKS = [  # window, tokens of each forward pass
    (4, (3, 1, 1, 1, 3, 1, 1)),
    (4, (1, 1, 1, 9)),
    (3, (7, 1, 2, 1)),
    (1, (2, 1, 1)),
    (5, (3,)),
]

# The files ------------------------------------------------------------------------------------


def file_of(name):
    """Return the path of a drawing below the root."""
    return Path("docs/drawings", f"{name}.gif" if name in MOVING else f"{name}.png")


def check_frames(path, count):
    """Check that a GIF file has a picture, `count` frames of which it is the last, and no end."""
    times, pictures = [], []
    with Image.open(path) as image:
        assert image.format == "GIF"
        assert image.info["loop"] == 0  # forever
        for frame in range(image.n_frames):
            image.seek(frame)
            times.append(image.info["duration"])
            pictures.append(image.convert("RGB").tobytes())
    assert len(pictures) == count + 1
    assert pictures[0] == pictures[-1]
    assert len(set(pictures)) == count
    assert min(times) >= 400  # milliseconds
    assert times[-1] >= 4000


def test_main_writes_each_drawing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in MOVING:  # two frames of each
        drawing = dataclasses.replace(drawings.DRAWINGS[name], frames=2)
        monkeypatch.setitem(drawings.DRAWINGS, name, drawing)
    drawings.main([])
    files = [file_of(name) for name in drawings.DRAWINGS]
    assert len(files) == 6
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file in files:
        if file.suffix == ".gif":
            check_frames(file, 2)
        else:
            assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_in_the_repository_and_small(name):
    limit = 200_000 if name in MOVING else 80_000
    assert 10_000 < (ROOT / file_of(name)).stat().st_size < limit


def test_the_repository_has_no_other_drawings():
    found = sorted(path.relative_to(ROOT) for path in (ROOT / "docs/drawings").iterdir())
    assert found == sorted(map(file_of, drawings.DRAWINGS))


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_in_a_document_with_a_text_that_describes_it(name):
    texts = {document: (ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS}
    alternatives = []
    for document, text in texts.items():
        path = file_of(name)
        link = path if document == "README.md" else path.relative_to("docs")
        alternatives += re.findall(rf"!\[([^]]*)\]\({link.as_posix()}\)", text)
    assert alternatives
    assert all(len(alternative) > 80 for alternative in alternatives)


@pytest.mark.parametrize("name", MOVING)
def test_a_moving_drawing_begins_and_ends_with_the_finished_picture_and_repeats(name):
    check_frames(ROOT / file_of(name), drawings.DRAWINGS[name].frames)


# The models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, window", [(1, 1), (12, 1), (12, 4), (12, 12), (5, 20)])
def test_the_mask_lets_a_query_attend_to_the_last_window_positions(tokens, window):
    mask = drawing_data.window_mask(tokens, window)
    for i, row in enumerate(mask.tolist()):
        attended = range(max(0, i - window + 1), i + 1)
        assert [j for j in range(tokens) if row[j]] == list(attended)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_reach_of_two_layers_is_that_of_a_model_with_two_layers(window):
    torch.manual_seed(0)
    config = model_swa.GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=5, window=window)
    field = look.receptive_field(model_swa.GPT(config), 12)
    reached = drawing_data.reach_of_two_layers(drawing_data.window_mask(12, window))
    assert torch.equal(reached, field)


@pytest.mark.parametrize("window, chunks", CHUNKS)
@torch.inference_mode()
def test_the_slots_hold_the_keys_of_a_model_at_these_positions(window, chunks):
    torch.manual_seed(0)
    tokens = sum(chunks)
    config = model_swa.GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=50, window=window)
    model = model_swa.GPT(config)
    idx = torch.randint(50, (1, tokens))
    projections = []  # of all tokens at once, without a cache: (1, T, 3C)
    c_attn = model.transformer.h[0].attn.c_attn
    hook = c_attn.register_forward_hook(lambda module, inputs, output: projections.append(output))
    model(idx)
    hook.remove()
    keys = projections[0][0, :, 8:16]
    cache = model.make_cache(1, tokens)
    held, _ = drawing_data.ring_steps(window, chunks)
    for chunk, positions in zip(idx.split(chunks, dim=1), held, strict=True):
        model(chunk, cache=cache)
        for slot, position in enumerate(positions):
            expected = torch.zeros(8) if position is None else keys[position]
            torch.testing.assert_close(cache.k[0, 0, 0, slot], expected)


def test_a_position_is_in_the_slot_that_the_title_says():
    held, _ = drawing_data.ring_steps(drawing_panels.RING_WINDOW, drawing_panels.RING_CHUNKS)
    for positions in held:
        for slot, position in enumerate(positions):
            assert position is None or position % drawing_panels.RING_WINDOW == slot


@pytest.mark.parametrize("window, chunks", CHUNKS)
def test_a_query_behind_the_ring_buffer_attends_to_the_last_window_positions(window, chunks):
    _, attended = drawing_data.ring_steps(window, chunks)
    assert [len(queries) for queries in attended] == list(chunks)
    for query, positions in enumerate(itertools.chain.from_iterable(attended)):
        assert positions == list(range(max(0, query - window + 1), query + 1))


def test_a_chunk_of_the_drawing_wraps_around_the_end_of_the_ring_buffer():
    held, _ = drawing_data.ring_steps(drawing_panels.RING_WINDOW, drawing_panels.RING_CHUNKS)
    assert held[3] == [4, 5, 2, 3]
    assert held[4] == [8, 5, 6, 7]


@pytest.mark.parametrize("frame, old", [(6, "3, 4, 5"), (7, "4, 5"), (8, "5")])
def test_the_drawing_of_a_chunk_says_which_keys_come_from_the_slots(frame, old):
    keys, slots = Figure().subplots(1, 2)
    drawing_panels.draw_ring(frame, keys, slots)
    assert slots.get_xlabel().splitlines()[0].endswith(f"keys {frame - 3} to {frame}:")
    assert slots.get_xlabel().splitlines()[1].startswith(f"{old} from the slots")


@pytest.mark.parametrize("tokens, window", [(1024, 16), (1024, 256), (1024, 400), (333, 70)])
def test_the_blocks_compute_each_allowed_score_once(tokens, window):
    computed = torch.zeros(tokens, tokens, dtype=torch.long)
    for queries, keys in drawing_data.computed_blocks(tokens, window):
        computed[queries[0] : queries[-1] + 1, keys[0] : keys[-1] + 1] += 1
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert computed.max() == 1
    assert computed[(i >= j) & (i - j < window)].min() == 1


def test_the_blocks_compute_as_many_scores_as_model_swa_says():
    blocks = drawing_data.computed_blocks(1024, 256)
    assert sum(len(queries) * len(keys) for queries, keys in blocks) == 458_752
    assert "458,752" in (ROOT / "model_swa.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("frame", [0, 3, 4, 7, 8, 15])
def test_a_frame_counts_the_scores_of_the_blocks_that_have_begun(frame):
    panels = Figure().subplots(1, 4)
    drawing_panels.draw_blocks(frame, *panels)
    titles = [panel.get_title().replace(",", "") for panel in panels]
    in_blocks_of_256 = 256 * 256 * (1 + 2 * (frame // 4))  # the first one has no block before it
    in_blocks_of_400 = 512 * 512 + 256 * 768 * max(0, frame // 4 - 1)
    in_blocks_of_16 = 64 * 64 * (1 + 2 * frame)
    expected = [64 * 1024 * (frame + 1), in_blocks_of_256, in_blocks_of_400, in_blocks_of_16]
    assert [int(re.search(r"(\d+) scores", title)[1]) for title in titles] == expected


@pytest.mark.parametrize("pair", [0, 6, 12, 31])
def test_a_hand_has_the_angle_position_times_frequency(pair):
    for position, (x, y) in enumerate(drawing_data.rotate_pair(pair, torch.arange(34), 64)):
        angle = position * 10000 ** (-2 * pair / 64)
        assert x.item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert y.item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_the_score_stays_if_both_positions_advance_but_not_if_the_query_alone_does():
    queries = torch.arange(3, 34)
    together = drawing_data.rope_scores(queries, queries - 3, 64)
    torch.testing.assert_close(together, together[:1].expand(31), atol=1e-4, rtol=0)
    alone = drawing_data.rope_scores(queries, torch.zeros_like(queries), 64)
    assert alone.std() > 0.1


def test_the_scores_are_those_of_complex_numbers():
    queries, keys = torch.tensor([1000, 1000, 7, 40]), torch.tensor([960, 1000, 5, 1])
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    q, k = torch.complex(q[:32], q[32:]), torch.complex(k[:32], k[32:])  # (D/2,) each
    angles = (keys - queries)[:, None] * 10000 ** (-torch.arange(32.0).double() / 32)
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = (q.conj() * k * turns).real.sum(1) / 8
    scores = drawing_data.rope_scores(queries, keys, 64)
    torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n_kv_head", [8, 2, 1])
def test_neighboring_query_heads_use_the_same_kv_head(n_kv_head):
    used, _ = drawing_data.group_heads(8, n_kv_head)
    assert used == [query_head * n_kv_head // 8 for query_head in range(8)]


@pytest.mark.parametrize("n_kv_head", [8, 2, 1])
def test_the_cache_of_a_token_is_a_key_and_a_value_of_each_kv_head(n_kv_head):
    _, cache_bytes = drawing_data.group_heads(8, n_kv_head)
    assert cache_bytes == 2 * n_kv_head * 4  # float32, head_dim = 1


# A training step ------------------------------------------------------------------------------

SHAPE = {"n_layer": 2, "n_embd": 128}


def record_steps(tests):
    """Return what ranks 0 and 1 compute and send in a step: {mode: [events, events]}."""
    runs = []
    for mode, fsdp in (("ddp", False), ("fsdp", True)):
        runs.append({"argv": command(mode, 2, **SHAPE, fsdp=fsdp, max_steps=2), "events": True})
    records, _ = fork({2: runs})
    first, second = records[2]
    return {
        "ddp": [first[0]["events"], second[0]["events"]],
        "fsdp": [first[1]["events"], second[1]["events"]],
    }


BACKGROUND = {"steps": record_steps}


@pytest.fixture(scope="module")
def steps(background):
    with background.result("steps") as result:
        yield result


def elements_of_parts(shards):
    """Return {part: number of elements of its parameters}, each padded to equal shards."""
    config = model.GPTConfig(**SHAPE, n_head=4, vocab_size=257, block_size=16)
    elements = dict.fromkeys(drawing_data.PARTS, 0)
    for name, p in model.GPT(config).named_parameters():
        block = re.search(r"\.h\.(\d)\.", name)
        part = f"block {block[1]}" if block else drawing_data.ROOT
        elements[part] += shards * math.ceil(p.size(0) / shards) * p[0].numel()
    return elements


def drawn_events(fsdp):
    """Return the events of the drawing in the form of tests/helpers/collectives.py.

    Without the backward pass of the embeddings, which is not recorded.
    """
    names = {"embeddings": "model", "norm, head and loss": "norm"}
    elements = elements_of_parts(shards=2 if fsdp else 1)
    elements |= {"stop?": 1, "loss": 1, "norm": 28}  # one for each parameter
    events = []
    for moment in drawing_data.training_step(fsdp):
        events += [[collective, elements[what]] for collective, what in moment.before]
        _, _, direction = moment.phase.partition(", ")
        if moment.computes and (direction, moment.computes) != ("backward", "embeddings"):
            arriving = {what for _, what in moment.before if what != moment.part}
            full = moment.gathered - arriving if fsdp else set(drawing_data.PARTS)
            parts = [part for part in drawing_data.PARTS if part in full]
            gathered = ["model" if part == drawing_data.ROOT else part for part in parts]
            events.append([direction, names.get(moment.computes, moment.computes), gathered])
        events += [[collective, elements[what]] for collective, what in moment.after]
    return events


def test_both_modes_have_as_many_moments_that_compute_the_same():
    ddp, fsdp = drawing_data.training_step(False), drawing_data.training_step(True)
    assert [(moment.phase, moment.computes) for moment in ddp] == [
        (moment.phase, moment.computes) for moment in fsdp
    ]


def test_two_ranks_send_the_same(steps):
    for events, events_of_rank_1 in steps.values():
        assert events == events_of_rank_1


def test_fsdp_gathers_and_sends_what_is_drawn_and_in_this_order(steps):
    assert steps["fsdp"][0] == drawn_events(fsdp=True)


def test_ddp_sends_what_is_drawn_except_for_the_size_of_its_buckets(steps):
    others = []
    for events in (steps["ddp"][0], drawn_events(fsdp=False)):
        buckets = [event for event in events if event[0] == "all-reduce" and event[1] > 1]
        others.append([event for event in events if event not in buckets])
        assert sum(elements for _, elements in buckets) == sum(elements_of_parts(1).values())
        # The first one is sent in the last backward pass, as soon as it has left block 1.
        before, after = events[: events.index(buckets[0])], events[events.index(buckets[0]) :]
        assert before[-1][:2] == ["backward", "block 1"]
        assert [event for event in after if event[0] == "forward"] == []
    recorded, drawn = others
    assert recorded == drawn
