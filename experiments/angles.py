"""Other angles for RoPE: functions that take the place of GPT.rope_angles in model_rope.py.

    with replaced_angles(yarn, T=256):
        ...  # models of model_rope.py rotate by these angles here

Each returns cos and sin (T, D/2), as rope_angles does. Three are for sequences of up to LENGTHS
times the T tokens of training:

    interpolated    Position interpolation (Chen et al. 2023, section 2.2, equation 4)
    ntk_aware       "NTK-aware" scaling (YaRN, Peng et al. 2023, section 3.1)
    yarn            "NTK-by-parts" and a temperature (the same paper, sections 3.2 and 3.3)
"""

import ast
import inspect
import math
import textwrap
from contextlib import contextmanager

import torch

from common.models import model_module

LENGTHS = 4  # the sequence length at which a model is used, over that of training
GPT = model_module("model_rope").GPT
PLAIN = GPT.rope_angles


def interpolated(model, positions):
    """Divide the positions: those up to 4 T lie between the positions of training."""
    D = model.config.n_embd // model.config.n_head
    pair = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
    frequencies = model.config.rope_theta ** (-2 * pair / D)  # (D/2,)
    angles = positions[:, None] / LENGTHS * frequencies  # (T, D/2)
    return angles.cos(), angles.sin()


def ntk_aware(model, positions):
    """Take a larger theta: the lowest frequency is divided by 4, the highest stays as it is."""
    D = model.config.n_embd // model.config.n_head
    pair = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
    theta = model.config.rope_theta * LENGTHS ** (D / (D - 2))
    frequencies = theta ** (-2 * pair / D)  # (D/2,)
    angles = positions[:, None] * frequencies  # (T, D/2)
    return angles.cos(), angles.sin()


def yarn(model, positions, T):
    """Divide the frequencies of slow pairs by 4 and keep those of fast ones.

    Slow pairs turned at most once in the T positions of training, fast ones at least 32 times; in
    between, the two frequencies are mixed by the number of turns. The factor of cos and sin
    multiplies all scores by its square, which is 1 / temperature in the paper.
    """
    D = model.config.n_embd // model.config.n_head
    pair = torch.arange(D // 2, device=positions.device, dtype=torch.float32)
    frequencies = model.config.rope_theta ** (-2 * pair / D)  # (D/2,)
    turns = T * frequencies / (2 * math.pi)
    kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
    frequencies = kept * frequencies + (1 - kept) * frequencies / LENGTHS
    angles = positions[:, None] * frequencies  # (T, D/2)
    factor = 0.1 * math.log(LENGTHS) + 1
    return factor * angles.cos(), factor * angles.sin()


def partly_rotated(model, positions, fraction):
    """Rotate a fraction of the channels only: the angles of all other pairs are 0.

    The rotated channels have the frequencies of a head that has no others, as in GPT-NeoX (Black
    et al. 2022, section 2.1). (There they are the first channels of a head, here the first of each
    half: the same model up to the order of the channels.)
    """
    D = model.config.n_embd // model.config.n_head
    rotated = int(fraction * D)
    pair = torch.arange(rotated // 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.zeros(D // 2, device=positions.device)
    frequencies[: rotated // 2] = model.config.rope_theta ** (-2 * pair / rotated)
    angles = positions[:, None] * frequencies  # (T, D/2)
    return angles.cos(), angles.sin()


@contextmanager
def replaced_angles(function, **arguments):
    """Let models of model_rope.py use these angles inside a `with` block."""
    GPT.rope_angles = lambda model, positions: function(model, positions, **arguments)
    try:
        yield
    finally:
        GPT.rope_angles = PLAIN


def bytes_of_code(function):
    """Return the number of bytes of a function's code, without docstring and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    [definition] = tree.body
    if ast.get_docstring(definition):
        del definition.body[0]
    return len(ast.unparse(definition).encode())
