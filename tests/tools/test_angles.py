"""experiments/angles.py: other angles for RoPE, beside those of transformers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model_rope
from experiments import angles

T = 256
POSITIONS = torch.arange(4 * T)


def make_model(D):
    torch.manual_seed(0)
    shape = {"block_size": T, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 2 * D}
    return model_rope.GPT(model_rope.GPTConfig(**shape))


def of_transformers(kind, D, seq_len=None, **parameters):
    """Return cos and sin (4 T, D/2) that transformers' Llama has for a kind of scaling."""
    config = LlamaConfig(
        hidden_size=2 * D,
        num_attention_heads=2,
        max_position_embeddings=T,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **parameters},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, device=None, seq_len=seq_len)
    product = POSITIONS[:, None] * frequencies
    return factor * product.cos(), factor * product.sin()


def assert_equal(cos_and_sin, expected):
    for ours, theirs in zip(cos_and_sin, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # angles of up to 1024 radians


@pytest.mark.parametrize("D", [16, 64])
def test_interpolated_angles_are_those_of_transformers(D):
    assert_equal(angles.interpolated(make_model(D), POSITIONS), of_transformers("linear", D))


@pytest.mark.parametrize("D", [16, 64])
def test_ntk_aware_angles_are_those_of_transformers(D):
    # its dynamic scaling by a factor of 1 takes the length of the sequence over T, which is 4
    expected = of_transformers("dynamic", D, seq_len=4 * T, factor=1.0)
    assert_equal(angles.ntk_aware(make_model(D), POSITIONS), expected)


def test_ntk_aware_angles_keep_the_highest_frequency_and_divide_the_lowest_by_four():
    def frequencies(function):
        cos, sin = function(make_model(16), torch.tensor([1]))
        return torch.atan2(sin, cos)[0]

    ratios = frequencies(angles.ntk_aware) / frequencies(angles.PLAIN)
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(1 / 4, rel=1e-4)


@pytest.mark.parametrize("D", [16, 64])
def test_yarn_has_the_angles_and_the_temperature_of_transformers_outside_of_the_ramp(D):
    # In the ramp, transformers goes by the number of the pair, the paper by its number of turns.
    frequencies = 10000.0 ** (-torch.arange(0, D, 2) / D)
    turns = T * frequencies / (2 * math.pi)
    outside = (turns >= 32) | (turns < 0.5)
    assert 0 < outside.sum() < D // 2
    ours = angles.yarn(make_model(D), POSITIONS, T)
    theirs = of_transformers("yarn", D, original_max_position_embeddings=T)
    assert_equal([x[:, outside] for x in ours], [x[:, outside] for x in theirs])


def test_yarn_divides_a_frequency_by_less_the_more_turns_it_makes():
    cos, sin = angles.yarn(make_model(64), torch.tensor([1]), T)
    plain_cos, plain_sin = angles.PLAIN(make_model(64), torch.tensor([1]))
    ratios = torch.atan2(sin, cos) / torch.atan2(plain_sin, plain_cos)
    ratios = [round(ratio, 5) for ratio in ratios[0].tolist()]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(1 / 4, rel=1e-4)
    of_turns = [T * 10000.0 ** (-2 * i / 64) / (2 * math.pi) for i in range(32)]
    middle = min(range(32), key=lambda i: abs(of_turns[i] - 16.5))  # half of the ramp
    kept = (of_turns[middle] - 1) / 31
    assert ratios[middle] == pytest.approx(kept + (1 - kept) / 4, rel=1e-4)


@pytest.mark.parametrize("fraction, pairs", [(0.5, 4), (0.25, 2)])
def test_a_part_of_the_channels_rotates_like_a_head_of_that_size(fraction, pairs):
    cos, sin = angles.partly_rotated(make_model(16), POSITIONS, fraction)
    small_cos, small_sin = angles.PLAIN(make_model(2 * pairs), POSITIONS)
    assert cos.shape == sin.shape == (len(POSITIONS), 8)
    assert torch.equal(cos[:, :pairs], small_cos) and torch.equal(sin[:, :pairs], small_sin)
    assert (cos[:, pairs:] == 1).all() and (sin[:, pairs:] == 0).all()


def test_models_use_other_angles_inside_of_the_block_only():
    model = make_model(16)
    x = torch.arange(8)[None]
    plain = model(x)
    with angles.replaced_angles(angles.interpolated):
        interpolated = model(x)
    assert not torch.equal(interpolated, plain)
    assert torch.equal(model(x), plain)


def test_an_error_inside_of_the_block_restores_the_angles():
    with pytest.raises(KeyError), angles.replaced_angles(angles.yarn, T=T):
        raise KeyError
    assert model_rope.GPT.rope_angles is angles.PLAIN


def test_the_bytes_of_code_are_those_of_a_function_without_its_texts():
    assert angles.bytes_of_code(short_function) == len("def short_function(x):\n    return x + 1")


def short_function(x):
    """Text."""
    return x + 1  # text
