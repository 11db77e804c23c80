"""Find the model files (model*.py in the repository root) and import one by its name."""

import contextlib
import dataclasses
import importlib
import math
import os
import typing
from pathlib import Path

import torch

from common.errors import UserError

ROOT = Path(__file__).parent.parent
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def model_names():
    """Return the names of all model files, sorted, without .py."""
    return sorted(path.stem for path in ROOT.glob("model*.py"))


def model_module(name):
    """Import the model file `name`.py. Raises UserError if there is none, or no model in it."""
    if name not in model_names():
        raise UserError(f"model={name} has no {name}.py; the models are {', '.join(model_names())}")
    try:
        module = importlib.import_module(name)
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise UserError(f"{name}.py needs GPT and GPTConfig, see docs/YOUR_OWN_VARIANT.md")
    return module


def make_config(module, fields):
    """Return the GPTConfig of a model file with these fields. Raises UserError for bad values."""
    _check_compiler_cache()
    kinds = typing.get_type_hints(module.GPTConfig)
    for field, value in fields.items():
        kind = kinds.get(field, object)  # GPTConfig refuses an unknown field
        is_number = kind is float and type(value) is int
        is_bool_for_int = kind is int and type(value) is bool
        if is_bool_for_int or not (isinstance(value, kind) or is_number):
            raise UserError(f"{field}={value!r}: expected {getattr(kind, '__name__', kind)}")
    try:
        return module.GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{module.__name__}.py: {error}") from error


def _check_compiler_cache():
    """Raise OSError if torch cannot make the directory of its compiler's cache.

    Building a model on the meta device, or an optimizer, imports the compiler, which makes it.
    """
    path = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    try:
        os.makedirs(path or ".", exist_ok=True)
    except OSError as error:  # not UserError, whose message would begin with a file of the model
        problem = f"TORCHINDUCTOR_CACHE_DIR={path} cannot be made ({error.strerror})"
        raise OSError(f"{problem}, and torch needs it: name another, or unset it") from error


def check_shapes(source, name, weights, expected):
    """Raise UserError unless names and shapes are those that the model expects."""
    for key in sorted(expected.keys() | weights.keys()):
        ours = tuple(expected[key].shape) if key in expected else "nothing"
        theirs = tuple(weights[key].shape) if key in weights else "nothing"
        if ours != theirs:
            raise UserError(f"{source}: {key} is {theirs} there, {ours} in {name}.py")


def to_float32(path, key, w):
    """Return a weight, named `key` in the file or checkpoint `path`, in float32.

    Raises UserError for other types than FLOATS, sparse tensors, those without data, NaN, infinity.
    """
    if w.is_meta or w.is_nested or w.layout != torch.strided:
        raise UserError(f"{path}: {key} is {w.layout} on {w.device}: save it dense and with data")
    if w.dtype not in FLOATS:
        raise UserError(
            f"{path}: {key} is {w.dtype}, as in quantized weights: use the model in float32, "
            "bfloat16 or float16"
        )
    w = w.float()
    # One fast pass: NaN and infinity survive the sum. Finite values may overflow it: look at each.
    if not math.isfinite(w.sum()) and not w.isfinite().all():
        raise UserError(
            f"{path}: {key} has values that are not finite (NaN or infinity in float32): get the "
            "weights again, or use those of an earlier step"
        )
    return w


def config_fields(name):
    """Return the names of the options (the fields of GPTConfig) of a model file."""
    return [field.name for field in dataclasses.fields(model_module(name).GPTConfig)]


def models_with_option(option):
    """Return a sentence that names the models which have this option, or "" if none has it."""
    names = []
    for name in model_names():
        with contextlib.suppress(Exception):  # of a model file that is not the chosen one
            if option in config_fields(name):
                names.append(name)
    return f"it is an option of {', '.join(names)} (--model)" if names else ""
