"""UserError ends a program with one line for the person at the terminal, not a traceback."""

import functools
import os
import sys


class UserError(Exception):
    """A problem that the user can fix; the message says what is wrong and what to do."""


def program(main):
    """Decorate a main(): a UserError or OSError becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
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


def _exit(message, status):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
