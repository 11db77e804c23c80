"""Typed options from Python config files and the command line.

The options of a program are the fields of its dataclass:

    python train.py config/gpt2.py config/small_gpu.py --batch_size=8

Every argument that ends in .py is a config file: plain Python that is run, and whose names are
options, except imported modules, functions and names that begin with _. Every --key=value is an
option too. Later arguments win. --help prints each option with its type, default and comment.

A wrong type, an unknown name or a missing file raises UserError.
"""

import contextlib
import dataclasses
import difflib
import inspect
import math
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path

from common.errors import UserError, one_line

PATHS = ("init_from", "input", "import_nanogpt", "out", "out_dir")  # ~ is the home directory
BOOLS = {"true": True, "1": True, "false": False, "0": False}  # on the command line, in lowercase
BENCH = "python -m tools.bench train does what bench.py does"
# Option names of nanoGPT and a few others, and what does the same here. An answer that names
# options with -- is given by the programs that have one of them.
OTHER_NAMES = {
    # nanoGPT's train.py
    "max_iters": "use --max_steps, in optimizer steps",
    "gradient_accumulation_steps": (
        "use --total_batch_size, in tokens: batch_size x block_size x gradient_accumulation_steps"
    ),
    "decay_lr": "use --lr_schedule; for a constant rate, --min_lr equal to --learning_rate",
    "lr_decay_iters": "leave it out: the schedule ends at --max_steps",
    "warmup_iters": "use --warmup_steps, in optimizer steps",
    "eval_iters": "use --eval_tokens, in tokens: eval_iters x batch_size x block_size",
    "always_save_checkpoint": "leave it out: the best is kept, and --keep_checkpoints more",
    "backend": "leave it out: ranks use nccl on GPUs and gloo on CPUs",
    "wandb_log": "use --tracker=wandb, or leave it out",
    "wandb_project": "use --tracker=wandb and the variable WANDB_PROJECT",
    "wandb_run_name": "use --tracker=wandb, which takes the name of out_dir",
    # its sample.py
    "start": 'use --prompt; for the text of a file, --prompt="$(cat FILE)"',
    "out_dir": "use --init_from, which takes the directory of a run",
    "compile": "leave it out: torch.compile is for training only",
    # its bench.py
    "real_data": BENCH,
    "profile": BENCH,
    # others
    "data_dir": "use --dataset, the name of a folder in data/",
    "lr": "use --learning_rate",
    "epochs": "use --max_steps, in optimizer steps",
    "max_grad_norm": "use --grad_clip",
    "n_kv_heads": "n_kv_head is an option of model_gqa and model_rope_gqa_swa (--model)",
    "sliding_window": "window is an option of model_swa and model_rope_gqa_swa (--model)",
}
# Values of nanoGPT's options that the option of this name does not have.
OTHER_VALUES = {
    ("init_from", "resume"): (
        "init_from=resume is not needed: the same command resumes a run, and sample.py takes the "
        "run's directory, --init_from=out/NAME"
    ),
}


def configure(options, argv, doc, positional=None):
    """Fill the dataclass `options` from argv and return it.

    argv         the arguments without the program's name
    doc          text that --help prints before the options
    positional   the option that takes arguments which are neither options nor config files; if its
                 type is list[str] it takes all of them, else one

    --help prints the options and raises SystemExit(0), also if a main() is called from Python; so
    does argparse.
    """
    config, _ = configure_with_model(options, argv, doc, lambda config: None, None, positional)
    return config


def configure_with_model(options, argv, doc, model_config, hint, positional=None):
    """Fill the dataclass `options`, and collect the options of a model that one of them chooses.

    model_config   function from the filled `options` to a second dataclass, the model's GPTConfig,
                   or to None
    hint           function from an unknown name to a sentence about it, or ""; or None

    Returns the filled `options` and a dict of the model options that were given.
    """
    given = _given_options(argv, options, positional)
    known = typing.get_type_hints(options)
    config = options(**_convert_all(given, known))
    model_options = model_config(config)
    model_types = typing.get_type_hints(model_options) if model_options else {}
    if "--help" in argv or "-h" in argv:
        _print_help(doc, options, model_options)
    for (name, value), answer in OTHER_VALUES.items():
        if given.get(name) == value:
            raise UserError(answer)
    known |= model_types
    unknown = [name for name in given if name not in known]
    if unknown:
        answers = [f"unknown option {name}: {_suggest(name, known, hint)}" for name in unknown]
        raise UserError("; ".join(answers))
    return config, _convert_all(given, model_types)


def check_minimum(config, low, *names):
    """Raise UserError if one of these options is below `low`, not finite, or beyond 64 bits."""
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} must be finite")
        if value < low:
            raise UserError(f"{name}={value} must be at least {low}")
        if value >= 2**63:
            raise UserError(f"{name}={value} must be below 2**63")


class _Text(str):
    """A value from the command line, not yet converted to its option's type."""


def _given_options(argv, options, positional):
    """Return {name: value} of all options in argv and its config files; later ones win."""
    given, positionals = {}, []
    for arg in argv:
        if arg in ("--help", "-h"):
            continue
        if arg.startswith("-"):
            name, equals, value = arg.removeprefix("--").partition("=")
            if not arg.startswith("--") or not equals:
                raise UserError(f"{arg}: write options as --key=value (--help lists them)")
            given[name] = _Text(value)
        elif arg.endswith(".py"):
            given |= _read_config_file(arg)
        elif positional is None:
            raise UserError(f"{arg} is neither a config file (*.py) nor an option (--key=value)")
        elif typing.get_type_hints(options)[positional] == list[str]:
            positionals.append(arg)
            given[positional] = positionals
        elif positionals:
            raise UserError(f"{arg}: {positional} is {positionals[0]} already; it takes one value")
        else:
            positionals.append(arg)
            given[positional] = _Text(arg)
    return given


def _read_config_file(path):
    if not Path(path).is_file():
        others = sorted(other.as_posix() for other in Path(path).parent.glob("[!_]*.py"))
        raise UserError(f"no config file {path}; its folder has {', '.join(others) or 'none'}")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(
            f"{_place(path, error)}: {type(error).__name__}: {one_line(error)}"
        ) from error
    return {name: value for name, value in names.items() if _is_option(name, value)}


def _is_option(name, value):
    return not (name.startswith("_") or inspect.ismodule(value) or callable(value))


def _place(path, error):
    """Return the path and the line number of a config file that an error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:  # not of a module that it imports
        lines = [error.lineno]
    return f"{path}, line {lines[-1]}" if lines else path


def _suggest(name, known, hint):
    """Return a sentence about the option that the user may mean."""
    answer = OTHER_NAMES.get(name, "")
    ours = re.findall(r"--(\w+)", answer)
    if answer and (not ours or any(option in known for option in ours)):
        return answer
    sentence = hint(name) if hint else ""
    if sentence:
        return sentence
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists the options"


def _convert_all(given, kinds):
    """Return the given values of the options in `kinds`, {name: type}, converted to their types."""
    return {name: _convert(name, kinds[name], given[name]) for name in kinds if name in given}


def _convert(name, annotation, value):
    """Return the value as the annotated type, or as one of its union; else raise UserError."""
    if isinstance(value, str) and name in PATHS and value.startswith("~"):
        value = type(value)(os.path.expanduser(value))  # the shell leaves --out_dir=~/x alone
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    for kind in kinds:
        if isinstance(value, _Text):
            with contextlib.suppress(ValueError, KeyError):
                return _parse(kind, value)
        elif type(value) is (typing.get_origin(kind) or kind):
            return kind(value)
        elif kind is float and type(value) is int:
            return float(value)
        elif kind is bool and type(value) is int and value in (0, 1):
            return bool(value)
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    shown = str(value) if isinstance(value, _Text) else repr(value)
    raise UserError(f"{name}={shown}: expected {expected}")


def _parse(kind, text):
    """Return the text of a command line as this type. Raises ValueError or KeyError for others."""
    if kind is bool:
        return BOOLS[text.lower()]
    if kind in (str, int, float):  # quotes in a str are the user's: the shell has removed its own
        return kind(text)
    raise ValueError(text)


def _print_help(doc, options, model_options):
    """Print the text and all options, and exit."""
    print(f"{(doc or '').strip()}\n\nOptions, as --key=value or in a config file:\n")
    print("\n".join(_describe_options(options)))
    if model_options:
        print(f"\n  Model ({model_options.__module__}.py):")
        print("\n".join(_describe_options(model_options)))
    sys.exit(0)


def _describe_options(options):
    """Return lines of help; the dataclass's source has the groups, the order and the comments."""
    kinds = typing.get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    # A field may continue on lines that are indented more, or that begin with its ")".
    field = r"(\w+): [^#\n]*(?:\n(?: {5,}|    \))[^#\n]*)*(?:# (.*))?"
    source = inspect.getsource(options)
    lines = []
    for group, name, comment in re.findall(rf"^    (?:# (.*)|{field})", source, re.M):
        if group:
            lines.append(f"  {group}:")
        elif name in kinds:
            kind = kinds[name]
            type_name = kind.__name__ if isinstance(kind, type) else kind
            head = f"--{name}: {type_name}"
            if defaults[name] is not dataclasses.MISSING:
                head += f" = {defaults[name]}"
            lines.append(f"    {head:<44} {comment}".rstrip())
    return lines
