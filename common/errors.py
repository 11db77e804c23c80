"""UserError, and run_program, which prints it as one line instead of a traceback."""

import contextlib
import os
import sys


class UserError(Exception):
    """A problem that the user can fix; the message says what is wrong and what to do."""


class DamagedError(UserError):
    """A file does not hold what was once written to it."""


class OtherRankError(UserError):
    """A UserError on another rank than 0. run_program prints nothing for it: rank 0 prints it."""


@contextlib.contextmanager
def prefix_errors(path):
    """Let the message of a UserError in a `with` block begin with the file that is at fault."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


@contextlib.contextmanager
def explain_malformed(path):
    """Raise DamagedError for what Python raises at a missing key or a value of another type.

    The `with` block reads the content of the file that the message names.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DamagedError(f"{path} is damaged ({reason})") from error


def one_line(error):
    """Return the message of an exception without its line breaks."""
    return " ".join(str(error).split())


def run_program(main, argv, encoding=None, errors="backslashreplace"):
    """Call main(argv) as a program: an error becomes one line on stderr and an exit status.

    encoding, errors   how stdout writes text; encoding None: as it does already

    For `if __name__ == "__main__":` only. Called from Python, as in a notebook, a main() raises its
    errors, and leaves stdout and stderr as they were.

    Exit status 2 is a UserError or an OSError, 1 a closed pipe, 130 Ctrl-C. Any other exception is
    a bug and keeps its traceback.
    """
    try:
        _prepare_output(encoding, errors)
        try:
            main(argv)
        finally:
            sys.stdout.flush()  # an error of buffered output belongs here, not to Python's exit
    except OtherRankError:
        sys.exit(2)
    except UserError as error:
        _exit(error, 2)
    except BrokenPipeError:  # stdout is a closed pipe (for example "| head")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # no space, no permission, a file where a folder should be
        _exit(error, 2)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _prepare_output(encoding, errors):
    """Let stdout and stderr accept any text; in Python they are None if they were closed (>&-)."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # nobody can read an error, but there is an exit status
    if sys.stdout is None:
        raise UserError("stdout is closed: send it to a file, or to /dev/null")
    if hasattr(sys.stdout, "reconfigure"):  # not what IPython's %run puts in its place
        sys.stdout.reconfigure(encoding=encoding, errors=errors)
    if hasattr(sys.stderr, "reconfigure"):
        sys.stderr.reconfigure(errors="backslashreplace")


def _exit(message, status):
    line = " ".join(str(message).splitlines())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
