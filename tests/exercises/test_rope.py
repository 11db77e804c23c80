"""The idea of the exercise rope: pairs of channels are rotated by position times frequency."""

import math

import pytest
import torch
from checks import check_device, check_equal, check_pair, check_shape, name_of, with_shapes
from exercises import missing, version_fixture
from starcoder2 import loaded, starcoder2
from variants import feed, last_logits, make_vivid, tokens

module = version_fixture("rope")
D = 8  # channels of a head: pairs (0, 4), (1, 5), (2, 6) and (3, 7)


# rotate ---------------------------------------------------------------------------------------


def tables(degrees):
    """Return cos and sin (1, D/2) of angles in degrees, one for each pair."""
    angles = torch.tensor([degrees], dtype=torch.float64).deg2rad()
    return angles.cos().float(), angles.sin().float()


def one_channel(channel):
    """Return x (1, 1, 1, D) that is 1 in a channel and 0 elsewhere."""
    return torch.eye(D)[channel].view(1, 1, 1, D)


def rotate(module, x, cos, sin):
    """Return the result of rotate; fail with a sentence unless it has the shape of x."""
    rotated = with_shapes(module.rotate)(x, cos, sin)
    check_shape("the result of rotate", rotated, "(B, H, T, D)", tuple(x.shape), dtype=None)
    return rotated


def test_the_result_has_the_shape_of_x(module):
    rotate(module, torch.ones(2, 3, 1, D), *tables([0, 0, 0, 0]))


@pytest.mark.parametrize("channel", range(D))
def test_a_pair_is_channels_i_and_i_plus_half(module, channel):
    rotated = rotate(module, one_channel(channel), *tables([90, 90, 90, 90])).flatten()
    partner, sign = (channel + 4, 1) if channel < 4 else (channel - 4, -1)
    to = int(rotated.abs().argmax())
    rule = f"channels i and i + D/2 are a pair (a, b), here {channel % 4} and {channel % 4 + 4}"
    if to != partner:
        missing(f"90 degrees must move channel {channel} to {partner}, but move it to {to}: {rule}")
    if rotated[to] * sign < 0:
        missing(
            f"90 degrees must make channel {partner} {sign:+d} times channel {channel}, but make "
            f"it {-sign:+d} times that: a becomes a cos - b sin, and b becomes a sin + b cos"
        )


def test_an_angle_of_zero_changes_nothing(module):
    x = torch.arange(2.0 * 3 * 1 * D).view(2, 3, 1, D)
    rotated = rotate(module, x, *tables([0, 0, 0, 0]))
    check_equal("with angles of 0, rotate's result [row, head, token, channel]", rotated, x)


def test_every_pair_is_rotated_by_its_own_angle(module):
    degrees = [10, 20, 30, 40]
    x = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]).view(1, 1, 1, D)
    rotated = rotate(module, x, *tables(degrees))
    a, b = rotated.flatten().chunk(2)
    came = torch.atan2(b, a).rad2deg()
    for pair, (angle, expected) in enumerate(zip(came.tolist(), degrees, strict=True)):
        if not abs(angle - expected) < 1e-3:
            missing(f"pair {pair} must be rotated by {expected} degrees, but is by {angle:.1f}")


def test_every_position_is_rotated_by_its_own_angles(module):
    angles = torch.tensor([[0.0], [30.0], [60.0]]).deg2rad().expand(3, 4)  # (T, D/2)
    x = one_channel(0).expand(2, 3, 3, D)  # as many heads as positions
    rotated = rotate(module, x, angles.cos(), angles.sin())
    came = torch.atan2(rotated[..., 4], rotated[..., 0]).rad2deg()  # (B, H, T)
    for head in range(3):
        for t, expected in enumerate((0, 30, 60)):
            if not abs(came[1, head, t] - expected) < 1e-3:
                missing(
                    f"token {t} of head {head} must be rotated by {expected} degrees, row {t} of "
                    f"cos and sin, but is by {came[1, head, t]:.1f}"
                )


def test_rotate_returns_the_dtype_of_its_input(module):
    rotated = rotate(module, one_channel(0).bfloat16(), *tables([10, 20, 30, 40]))
    if rotated.dtype != torch.bfloat16:
        missing(
            f"rotate's result for a bfloat16 x must be bfloat16, but is {name_of(rotated.dtype)}, "
            f"the dtype of cos and sin"
        )


def test_rotate_computes_in_float32(module):
    x = torch.randn(1, 2, 1, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = tables([10, 20, 30, 40])
    once_rounded = rotate(module, x.float(), cos, sin).bfloat16()
    if not torch.equal(rotate(module, x, cos, sin), once_rounded):
        missing(
            "rotate of a bfloat16 x must compute with the float32 cos and sin, and round the "
            "result once, but rounds before: do not convert cos and sin"
        )


# rope_angles ----------------------------------------------------------------------------------


def make(module, **options):
    """Return a model with heads of 8 channels."""
    sizes = {"vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 2 * D}
    return module.GPT(module.GPTConfig(**sizes, **options))


def angles_of(model, positions):
    """Return cos and sin of rope_angles; fail with a sentence unless shape and dtype are right."""
    cos, sin = check_pair("rope_angles", model.rope_angles(positions))
    for name, x in (("cos", cos), ("sin", sin)):
        check_shape(f"{name} of rope_angles", x, "(T, D/2)", (len(positions), D // 2))
    return cos, sin


def test_position_zero_has_angles_of_zero(module):
    cos, sin = angles_of(make(module), torch.arange(3))
    if (cos[0] == 0).all() and (sin[0] == 1).all():
        missing("rope_angles must return cos, then sin")
    check_equal("cos of position 0 [pair]", cos[0], torch.ones(4))
    check_equal("sin of position 0 [pair]", sin[0], torch.zeros(4))


@pytest.mark.parametrize("theta", [10000.0, 100.0])
def test_the_frequency_of_pair_i_is_theta_to_the_minus_2i_by_d(module, theta):
    cos, sin = angles_of(make(module, rope_theta=theta), torch.arange(2))
    came = torch.atan2(sin[1], cos[1]).tolist()  # the angles of position 1
    for i in range(4):
        expected = theta ** (-2 * i / D)
        if not abs(came[i] - expected) < 1e-4 * expected:
            missing(
                f"from a position to the next, pair {i} must rotate by rope_theta^(-2i / D) = "
                f"{theta:g}^(-{2 * i}/{D}) = {expected:.4g} radians, but rotates by {came[i]:.4g}"
            )


def test_angles_are_those_of_the_given_positions(module):
    cos, sin = angles_of(make(module), torch.tensor([5, 6, 7]))
    angle = torch.atan2(sin[0, 3], cos[0, 3]).item() * 1000  # pair 3: 0.001 radians a position
    if abs(angle) < 1e-3:
        missing(
            "the angles of positions 5, 6 and 7 must go on from position 5, but begin at 0: "
            "behind a cache of 5 tokens the first new token is at position 5"
        )
    if not abs(angle - 5) < 1e-2:
        missing(f"the angles of positions 5, 6 and 7 begin with those of position {angle:.3g}")


@pytest.mark.parametrize("how", ["float32", "a bfloat16 model", "autocast to bfloat16"])
def test_angles_are_exact_at_far_positions_in_every_dtype(module, how):
    model = make(module)
    if how == "a bfloat16 model":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how.startswith("autocast")):
        cos, sin = check_pair("rope_angles", model.rope_angles(torch.arange(1001)))
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype != torch.float32:
            missing(f"{how}: {name} must be float32 in every dtype, but is {name_of(x.dtype)}")
    expected = torch.arange(1001.0).double()  # the angles of pair 0
    is_close = (cos[:, 0] - expected.cos()).abs() < 2e-4
    is_close &= (sin[:, 0] - expected.sin()).abs() < 2e-4
    if not is_close.all():
        position = int((~is_close).nonzero()[0])
        missing(
            f"{how}: the angles of position {position} are rounded: compute them in float32, "
            f"because bfloat16 has 8 significant bits, and 257 becomes 256"
        )


def test_angles_are_on_the_device_of_the_positions(module):
    cos, sin = check_device(make(module).to("meta").rope_angles, torch.arange(3))
    if not (cos.is_meta and sin.is_meta):
        missing(f"cos and sin must be on the device of positions, but are on {cos.device}")


def test_a_score_depends_on_the_distance_of_positions_only(module):
    model = make(module)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, D, generator=generator)

    def score(m, n):
        rotated_q = rotate(module, q, *model.rope_angles(torch.tensor([m])))
        rotated_k = rotate(module, k, *model.rope_angles(torch.tensor([n])))
        return (rotated_q * rotated_k).sum().item()

    if abs(score(7, 5) - score(102, 100)) > 1e-3:
        missing(
            f"a query at 7 and a key at 5 must have the score of a query at 102 and a key at 100, "
            f"but have {score(7, 5):.4f} and {score(102, 100):.4f}"
        )
    if abs(score(7, 5) - score(7, 6)) < 1e-3:
        missing("the scores of a query at 7 with keys at 5 and at 6 are equal: nothing is rotated")


# Independent computations ---------------------------------------------------------------------


def test_rotation_equals_a_loop_over_pairs(module):
    x = torch.randn(2, 3, 5, D, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 300, 1000])
    rotated = rotate(module, x, *make(module).rope_angles(positions))
    expected = torch.empty_like(x)
    for t, position in enumerate(positions.tolist()):
        for i in range(D // 2):
            angle = position * 10000.0 ** (-2 * i / D)
            a, b = x[:, :, t, i], x[:, :, t, i + D // 2]
            expected[:, :, t, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[:, :, t, i + D // 2] = a * math.sin(angle) + b * math.cos(angle)
    check_equal("rotate's result [row, head, token, channel]", rotated, expected, 1e-3)


def test_cached_logits_equal_those_without_cache(module):
    model, x = make_vivid(module), tokens(2, 16)
    cached = feed(model, model.make_cache(2), *x.split([5, 1, 1, 6, 3], dim=1))
    expected = last_logits(model, x)[:, [4, 5, 6, 12, 15]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)


def test_logits_equal_those_of_transformers(module):
    theirs, x = starcoder2(2, 3, 30, 61), tokens(2, 41)
    ours = loaded(module, theirs)
    with torch.no_grad():
        logits, expected = ours(x), theirs(x).logits
    check_equal("against transformers, logits [row, position, token id]", logits, expected)
    cached = feed(ours, ours.make_cache(2), *x.split([6, 1, 20, 13, 1], dim=1))
    expected = expected[:, [5, 6, 26, 39, 40]]
    check_equal("with a cache, logits [row, chunk, token id]", cached, expected)
