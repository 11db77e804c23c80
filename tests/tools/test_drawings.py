"""experiments/drawings.py: what it draws is what the models compute."""

import math
from pathlib import Path

import pytest
import torch

import model_swa
from experiments import drawings, look

ROOT = Path(__file__).parents[2]


def test_main_writes_each_drawing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawings.main([])
    files = [Path("docs/drawings", f"{name}.png") for name in drawings.DRAWINGS]
    assert len(files) == 5
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_in_the_repository_and_small(name):
    assert 10_000 < (ROOT / "docs" / "drawings" / f"{name}.png").stat().st_size < 80_000


@pytest.mark.parametrize("tokens, window", [(1, 1), (12, 1), (12, 4), (12, 12), (5, 20)])
def test_the_mask_lets_a_query_attend_to_the_last_window_positions(tokens, window):
    mask = drawings.window_mask(tokens, window)
    for i, row in enumerate(mask.tolist()):
        attended = range(max(0, i - window + 1), i + 1)
        assert [j for j in range(tokens) if row[j]] == list(attended)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_reach_of_two_layers_is_that_of_a_model_with_two_layers(window):
    torch.manual_seed(0)
    config = model_swa.GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=5, window=window)
    field = look.receptive_field(model_swa.GPT(config), 12)
    assert torch.equal(drawings.reach_of_two_layers(drawings.window_mask(12, window)), field)


@pytest.mark.parametrize("window, prompt, steps", [(4, 3, 8), (4, 1, 9), (3, 7, 4), (1, 2, 2)])
@torch.inference_mode()
def test_the_slots_hold_the_keys_of_a_model_at_these_positions(window, prompt, steps):
    torch.manual_seed(0)
    config = model_swa.GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=50, window=window)
    model = model_swa.GPT(config)
    tokens = torch.randint(50, (1, prompt + steps))
    projections = []  # of all tokens at once, without a cache: (1, T, 3C)
    c_attn = model.transformer.h[0].attn.c_attn
    hook = c_attn.register_forward_hook(lambda module, inputs, output: projections.append(output))
    model(tokens)
    hook.remove()
    keys = projections[0][0, :, 8:16]
    cache = model.make_cache(1, prompt + steps)
    chunks = tokens.split([prompt] + [1] * steps, dim=1)
    for chunk, held in zip(chunks, drawings.ring_slots(window, prompt, steps), strict=True):
        model(chunk, cache=cache)
        for slot, position in enumerate(held):
            expected = torch.zeros(8) if position is None else keys[position]
            torch.testing.assert_close(cache.k[0, 0, 0, slot], expected)


def test_a_position_is_in_the_slot_that_the_title_says():
    for held in drawings.ring_slots(4, 3, 8):
        for slot, position in enumerate(held):
            assert position is None or position % 4 == slot


@pytest.mark.parametrize("tokens, window", [(1024, 16), (1024, 256), (1024, 400), (333, 70)])
def test_the_blocks_compute_each_allowed_score_once(tokens, window):
    computed = torch.zeros(tokens, tokens, dtype=torch.long)
    for queries, keys in drawings.computed_blocks(tokens, window):
        computed[queries[0] : queries[-1] + 1, keys[0] : keys[-1] + 1] += 1
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert computed.max() == 1
    assert computed[(i >= j) & (i - j < window)].min() == 1


def test_the_blocks_compute_as_many_scores_as_model_swa_says():
    blocks = drawings.computed_blocks(1024, 256)
    assert sum(len(queries) * len(keys) for queries, keys in blocks) == 458_752
    assert "458,752" in (ROOT / "model_swa.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("pair", [0, 6, 31])
def test_an_arrow_has_the_angle_position_times_frequency(pair):
    x = torch.zeros(64)
    x[pair] = 1
    rotated = drawings.rotate_vector(x, torch.arange(7))
    for position, vector in enumerate(rotated):
        angle = position * 10000 ** (-2 * pair / 64)
        assert vector[pair].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert vector[pair + 32].item() == pytest.approx(math.sin(angle), abs=1e-5)


def test_the_scores_depend_on_the_distance_only():
    distances = torch.arange(-40, 1)
    scores = drawings.rope_scores(40, distances, 64)
    torch.testing.assert_close(drawings.rope_scores(1000, distances, 64), scores, atol=1e-3, rtol=0)
    assert scores.std() > 0.1  # they do depend on it


def test_the_scores_are_those_of_complex_numbers():
    distances = torch.arange(-40, 1)
    q, k = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    q, k = torch.complex(q[:32], q[32:]), torch.complex(k[:32], k[32:])  # (D/2,) each
    angles = distances[:, None] * 10000 ** (-torch.arange(32.0).double() / 32)
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = (q.conj() * k * turns).real.sum(1) / 8
    scores = drawings.rope_scores(1000, distances, 64)
    torch.testing.assert_close(scores.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("n_kv_head", [8, 2, 1])
def test_neighboring_query_heads_use_the_same_kv_head(n_kv_head):
    used, _ = drawings.group_heads(8, n_kv_head)
    assert used == [query_head * n_kv_head // 8 for query_head in range(8)]


@pytest.mark.parametrize("n_kv_head", [8, 2, 1])
def test_the_cache_of_a_token_is_a_key_and_a_value_of_each_kv_head(n_kv_head):
    _, cache_bytes = drawings.group_heads(8, n_kv_head)
    assert cache_bytes == 2 * n_kv_head * 4  # float32, head_dim = 1
