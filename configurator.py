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

from common.errors import UserError

# Options in which ~ is the home directory.
PATHS = ("init_from", "input", "import_nanogpt", "out", "out_dir")
FREE_TEXT = ("prompt", "stop")  # options that may hold any characters
MAX_BITS = 1000  # of an integer; a float holds 1023
KV_HEADS = "use --n_kv_head, of model_gqa and model_rope_gqa_swa"
WINDOW = "use --window, of model_swa and model_rope_gqa_swa"
STEP_TOKENS = "use --total_batch_size, in tokens; the number of micro-steps follows from it"
MUON_RATE = "use --muon_learning_rate, with --optimizer=muon"
SCHEDULE_END = "the schedule ends at --max_steps"
LOG = "out_dir/log.jsonl has all metrics; docs/RECIPES.md sends them to a logging service"
# Option names of earlier versions, nanoGPT, transformers and others, and what does the same here.
OTHER_NAMES = {
    # earlier versions
    "shard_size": "use --shard_degree",
    "timeout": "use --dist_timeout",
    "to": "use --out, or --out_dir in tools.export",
    # nanoGPT
    "max_iters": "use --max_steps, in optimizer steps",
    "gradient_accumulation_steps": STEP_TOKENS,
    "decay_lr": "use --lr_schedule; for a constant rate, --min_lr equal to --learning_rate",
    "lr_decay_iters": SCHEDULE_END,
    "warmup_iters": "use --warmup_steps, in optimizer steps",
    "eval_iters": "use --eval_tokens, the validation tokens of an evaluation",
    "always_save_checkpoint": "use --checkpoint_interval and --keep_checkpoints",
    "backend": "ranks use nccl on GPUs and gloo on CPUs",
    "wandb_log": LOG,
    "wandb_project": LOG,
    "wandb_run_name": LOG,
    "start": "use --prompt, of sample.py",
    # transformers and other trainers
    "lr": "use --learning_rate",
    "adam_lr": "use --learning_rate, which is AdamW's",
    "embedding_lr": "use --learning_rate, which is AdamW's",
    "muon_lr": MUON_RATE,
    "matrix_lr": MUON_RATE,
    "optim": "use --optimizer: adamw or muon",
    "use_muon": "use --optimizer=muon",
    "max_grad_norm": "use --grad_clip",
    "adam_beta1": "use --beta1",
    "adam_beta2": "use --beta2",
    "lr_scheduler_type": "use --lr_schedule: cosine or wsd",
    "num_train_epochs": "use --max_steps, in optimizer steps",
    "epochs": "use --max_steps, in optimizer steps",
    "max_epochs": "use --max_steps, in optimizer steps",
    "per_device_train_batch_size": "use --batch_size",
    "micro_batch_size": "use --batch_size",
    "device_batch_size": "use --batch_size",
    "global_batch_size": STEP_TOKENS,
    "save_interval": "use --checkpoint_interval, in optimizer steps",
    "save_steps": "use --checkpoint_interval, in optimizer steps",
    "save_total_limit": "use --keep_checkpoints",
    "logging_steps": "use --log_interval, in optimizer steps",
    "eval_steps": "use --eval_interval, in optimizer steps",
    "output_dir": "use --out_dir",
    "resume": "the same command resumes the run",
    "resume_from_checkpoint": "the same command resumes the run",
    "gradient_checkpointing": "use --activation_checkpointing",
    "torch_compile": "use --compile",
    "bf16": "use --dtype=bfloat16",
    "fp16": "use --dtype=float16",
    "precision": "use --dtype",
    "report_to": LOG,
    "max_length": "use --max_new_tokens, of sample.py",
    "n_samples": "use --num_samples, of sample.py",
    "n_layers": "use --n_layer",
    "num_layers": "use --n_layer",
    "num_hidden_layers": "use --n_layer",
    "depth": "use --n_layer",
    "n_heads": "use --n_head",
    "num_heads": "use --n_head",
    "num_attention_heads": "use --n_head",
    "n_embed": "use --n_embd",
    "d_model": "use --n_embd",
    "hidden_size": "use --n_embd",
    "n_ctx": "use --block_size",
    "n_positions": "use --block_size",
    "max_position_embeddings": "use --block_size",
    "context_length": "use --block_size",
    "seq_len": "use --block_size",
    "sequence_len": "use --block_size",
    "max_seq_len": "use --block_size",
    "max_seq_length": "use --block_size",
    "n_kv_heads": KV_HEADS,
    "num_kv_heads": KV_HEADS,
    "num_key_value_heads": KV_HEADS,
    "n_query_groups": KV_HEADS,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "rope_base": "use --rope_theta, of model_rope and model_rope_gqa_swa",
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
    given = _given_options(argv, options, positional)
    config = _fill(options, given)
    if _wants_help(argv):
        _print_help(doc, _describe_options(options))
    _check_known(given, _types(options))
    return config


def configure_with_model(
    options, argv, doc, model_config, hint, positional=None, ignored_in_files=()
):
    """Fill the dataclass `options`, and collect the options of a model that one of them chooses.

    model_config       function from the filled `options` to a second dataclass, the model's
                       GPTConfig
    hint               function from an unknown name to a sentence about it, or ""
    ignored_in_files   names that config files may set although this program has no such option

    Returns the filled `options` and a dict of the model options that were given.
    """
    given = _given_options(argv, options, positional)
    config = _fill(options, given)
    model_options = model_config(config)
    if _wants_help(argv):
        title = f"Model ({model_options.__module__}.py)"
        _print_help(doc, _describe_options(options) + _describe_options(model_options, title))
    model_types = _types(model_options)
    needed = {
        name: value
        for name, value in given.items()
        if isinstance(value, _Text) or name not in ignored_in_files
    }
    _check_known(needed, _types(options) | model_types, hint)
    chosen = {
        name: _convert(name, model_types[name], given[name])
        for name in model_types
        if name in given
    }
    return config, chosen


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


def _types(options):
    return typing.get_type_hints(options)


def _fill(options, given):
    values = {
        name: _convert(name, kind, given[name])
        for name, kind in _types(options).items()
        if name in given
    }
    return options(**values)


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
        elif _types(options)[positional] == list[str]:
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
        others = sorted(p.as_posix() for p in Path(path).parent.glob("*.py"))
        raise UserError(f"no config file {path}; its folder has {', '.join(others) or 'none'}")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        raise UserError(
            f"{_place(path, error)}: {type(error).__name__}: {_one_line(error)}"
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


def _one_line(error):
    return " ".join(str(error).split())


def _check_known(given, known, hint=None):
    """Raise UserError for a name that is no option, with the option that the user may mean."""
    for name in given:
        if name not in known:
            raise UserError(f"unknown option {name}: {_suggest(name, known, hint)}")


def _suggest(name, known, hint):
    answer = OTHER_NAMES.get(name, "")
    ours = re.findall(r"--(\w+)", answer)
    is_for_this_program = not ours or ", of " in answer or not set(ours).isdisjoint(known)
    if answer and is_for_this_program:
        return answer
    sentence = hint(name) if hint else ""
    if sentence:
        return sentence
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else "--help lists the options"


def _convert(name, kind, value):
    """Return the value as one of the types of `kind`, or raise UserError."""
    for text in value if isinstance(value, list) else [value]:
        is_text = isinstance(text, str) and name not in FREE_TEXT
        # Python reads undecodable bytes as surrogates.
        if is_text and re.search("[\0\ud800-\udfff]", text):
            raise UserError(f"{name}={text!r} has a NUL character or bytes that are not UTF-8")
    if type(value) is int and value.bit_length() > MAX_BITS:  # Python would not print it
        raise UserError(f"{name} is an integer of {value.bit_length()} bits, more than {MAX_BITS}")
    if isinstance(value, str) and name in PATHS and value.startswith("~"):
        value = type(value)(os.path.expanduser(value))  # the shell leaves --out_dir=~/x alone
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    for k in kinds:
        if isinstance(value, _Text):
            with contextlib.suppress(ValueError):
                return _parse(k, value)
        elif type(value) is (typing.get_origin(k) or k) or (k is float and type(value) is int):
            return k(value)
        elif k is bool and type(value) is int and value in (0, 1):
            return bool(value)
    expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
    shown = str(value) if isinstance(value, _Text) else repr(value)
    raise UserError(f"{name}={shown}: expected {expected}")


def _parse(kind, text):
    """Return the text of a command line as a bool, int, float or str; raise ValueError."""
    if kind is bool:
        if text.lower() in ("true", "1"):
            return True
        if text.lower() in ("false", "0"):
            return False
        raise ValueError(text)
    if kind is str:
        quoted = re.fullmatch(r"'[^']*'|\"[^\"]*\"", text)
        return str(text[1:-1] if quoted else text)
    if kind in (int, float):
        return kind(text)
    raise ValueError(text)


def _wants_help(argv):
    return "--help" in argv or "-h" in argv


def _print_help(doc, lines):
    print(doc.strip() + "\n\nOptions, as --key=value or in a config file:")
    print("\n".join(lines))
    sys.exit(0)


def _describe_options(options, title=None):
    """Return lines of help; the dataclass's source has the groups, the order and the comments."""
    kinds = _types(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    lines = ["", f"  {title}:"] if title else [""]
    for line in inspect.getsource(options).splitlines():
        group = re.fullmatch(r"    # (.*)", line)
        field = re.fullmatch(r"    (\w+): [^#]*(?:# (.*))?", line)
        if group:
            lines.append(f"  {group[1]}:")
        elif field and field[1] in kinds:
            kind = kinds[field[1]]
            type_name = kind.__name__ if isinstance(kind, type) else kind
            head = f"--{field[1]}: {type_name}"
            if defaults[field[1]] is not dataclasses.MISSING:
                head += f" = {defaults[field[1]]}"
            lines.append(f"    {head:<44} {field[2] or ''}".rstrip())
    return lines
