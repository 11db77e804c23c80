"""Typed options from Python config files and the command line.

The options of a program are the fields of its dataclass:

    python train.py config/gpt2.py config/small_gpu.py --batch_size=8

Every argument that ends in .py is a config file, plain Python whose names are options (imported modules, functions and
names that begin with _ aside; arithmetic is welcome; it is your own code and is run), and every --key=value is an
option. Later wins. --help prints each option with its type, default and comment.

What the person at the terminal can mend is a UserError: one line on stderr and exit status 2, no traceback.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import runpy
import sys
import traceback
import types
import typing
from pathlib import Path


class UserError(Exception):
    """Something that the person at the terminal can mend; the message says what, with which numbers, and how."""


def program(main):
    """Decorate a main() so that a UserError ends it with one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            sys.exit(_complain(error, 2))
        except BrokenPipeError:  # who read our output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # no space, no permission, a file where a folder should be
            sys.exit(_complain(error, 2))
        except KeyboardInterrupt:
            sys.exit(_complain("interrupted", 130))

    return run


def _complain(message, status):
    print(f"error: {message}", file=sys.stderr)
    return status


def configure(options, argv, doc, positional=None, more=None, elsewhere=None):
    """Fill the dataclass `options` from argv, the arguments without the program's name.

    doc          text that --help prints before the options
    positional   the option that takes the arguments which are neither options nor config files; a list takes all
    more         function of the filled `options`: a second dataclass, whose fields are options too
    elsewhere    function of an unknown option's name: where it is known, or ""

    Returns the filled `options`; with `more` also the dict of the second dataclass's options that were given.
    """
    kinds, given, listed = typing.get_type_hints(options), {}, []
    for arg in argv:
        if arg in ("--help", "-h"):
            continue
        if arg.startswith("-"):
            name, equals, value = arg.removeprefix("--").partition("=")
            if not arg.startswith("--") or not equals:
                raise UserError(f"{arg}: write options as --key=value (--help lists them)")
            given[name] = _Typed(value)
        elif arg.endswith(".py"):
            given |= _config_file(arg)
        elif positional is None:
            raise UserError(f"{arg}: neither a config file (*.py) nor an option (--key=value)")
        elif kinds[positional] == list[str]:
            listed.append(arg)
            given[positional] = listed
        elif positional in given:
            raise UserError(f"{arg}: {positional} is {given[positional]} already, and there can be one only")
        else:
            given[positional] = _Typed(arg)
    filled = options(**{name: _convert(name, kinds[name], given[name]) for name in kinds if name in given})
    second = more(filled) if more else None
    if "--help" in argv or "-h" in argv:
        print(doc.strip() + "\n\nOptions, as --key=value or in a config file:")
        print("\n".join(_help(options) + (_help(second, f"Model ({second.__module__}.py)") if second else [])))
        sys.exit(0)
    more_kinds = typing.get_type_hints(second) if second else {}
    for name in given:
        if name not in kinds and name not in more_kinds:
            raise UserError(f"unknown option {name}: " + _hint(name, [*kinds, *more_kinds], elsewhere))
    rest = {name: _convert(name, more_kinds[name], given[name]) for name in more_kinds if name in given}
    return (filled, rest) if more else filled


def at_least(low, config, *names):
    """UserError where one of these options of a filled dataclass is below `low`, or above what 64 bits hold."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < 2**63:
            raise UserError(f"{name}={value} must be at least {low}, and finite")


class _Typed(str):
    """A value as it was typed on the command line, still to be read as its option's type says."""


def _config_file(path):
    if not Path(path).is_file():
        there = sorted(p.as_posix() for p in Path(path).parent.glob("*.py"))
        raise UserError(f"no config file {path}; in that folder: {', '.join(there) or 'none'}")
    try:
        names = runpy.run_path(path)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:  # rather than a module that it imports
            lines = [error.lineno]
        place = f"{path}, line {lines[-1]}" if lines else path
        raise UserError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return {
        name: value
        for name, value in names.items()
        if not (name.startswith("_") or inspect.ismodule(value) or callable(value))
    }


def _hint(name, known, elsewhere):
    place = elsewhere(name) if elsewhere else ""
    close = difflib.get_close_matches(name, known, n=1)
    return place or (f"did you mean {close[0]}?" if close else "--help lists them")


def _convert(name, kind, value):
    """The value as one of the types of `kind` (bool, int, float, str, None); UserError where it is none of them."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and (value is None or value == "None"):
        return None
    for k in kinds:
        if isinstance(value, _Typed):
            with contextlib.suppress(ValueError):
                return _read(k, value)
        elif type(value) is (typing.get_origin(k) or k) or (k is float and type(value) is int):
            return k(value)
        elif k is bool and type(value) is int and value in (0, 1):
            return bool(value)
    expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
    raise UserError(f"{name}={str(value) if isinstance(value, _Typed) else repr(value)}: expected {expected}")


def _read(kind, text):
    if kind is bool:
        if text.lower() not in ("true", "1", "false", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind not in (int, float, str):
        raise ValueError(text)
    if kind is str:
        quoted = re.fullmatch(r"'[^']*'|\"[^\"]*\"", text)
        return str(text[1:-1] if quoted else text)
    return kind(text)


def _help(options, title=None):
    """Lines of help: the dataclass's source has the order, the titles of its groups and the comments."""
    kinds = typing.get_type_hints(options)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    lines = ["", f"  {title}:"] if title else [""]
    for line in inspect.getsource(options).splitlines():
        title = re.fullmatch(r"    # (.*)", line)
        field = re.fullmatch(r"    (\w+): [^#]*(?:# (.*))?", line)
        if title:
            lines.append(f"  {title[1]}:")
        elif field and field[1] in kinds:
            kind = kinds[field[1]]
            default = "" if defaults[field[1]] is dataclasses.MISSING else f" = {defaults[field[1]]}"
            head = f"--{field[1]}: {kind.__name__ if isinstance(kind, type) else kind}{default}"
            lines.append(f"    {head:<44} {field[2] or ''}".rstrip())
    return lines
