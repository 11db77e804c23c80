"""UserError: a problem that the person at the terminal can fix. It ends a program with one line, not a traceback."""

import functools
import os
import sys


class UserError(Exception):
    """A problem that the person at the terminal can fix; the message says what is wrong and what to do."""


def program(main):
    """Decorate a main(): print a UserError or an OSError as one line on stderr and exit with status 2."""

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
