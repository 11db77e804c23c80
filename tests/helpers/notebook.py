"""Streams like those of a notebook: they have write() and flush() and nothing else."""

import contextlib


class NotebookStream:
    """Has what print() needs, and no reconfigure, fileno, buffer, encoding or isatty."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@contextlib.contextmanager
def streams_of_a_notebook():
    """Put streams like a notebook's in the place of stdout and stderr; yield the two."""
    # Not in a fixture: pytest captures again between a fixture and its test.
    out, err = NotebookStream(), NotebookStream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err
