"""UserError ends a program with one line for the person at the terminal, not a traceback."""

import contextlib
import functools
import os
import signal
import sys


class UserError(Exception):
    """A problem that the user can fix; the message says what is wrong and what to do."""


class DamagedError(UserError):
    """A file does not hold what was once written to it."""


@contextlib.contextmanager
def prefix_errors(path):
    """Let the message of a UserError in a `with` block begin with the file that is at fault."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error


def program(main):
    """Decorate a main(): a UserError or OSError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        # Before this, while Python imports, a program leaves SIGINT to the system.
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            _prepare_output()
            return main(*args, **kwargs)
        except UserError as error:
            _exit(error, 2)
        except BrokenPipeError:  # stdout is a closed pipe (for example "| head")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:  # no space, no permission, a file where a folder should be
            _exit(error, 2)
        except KeyboardInterrupt:
            _exit("interrupted", 130)

    return run


def _prepare_output():
    """Let stdout and stderr accept any text; in Python they are None if they were closed (>&-)."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # nobody can read an error, but there is an exit status
    if sys.stdout is None:
        raise UserError("stdout is closed: send it to a file, or to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not what a notebook or a test puts in their place
            stream.reconfigure(errors="backslashreplace")


def _exit(message, status):
    line = " ".join(str(message).splitlines())
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)
