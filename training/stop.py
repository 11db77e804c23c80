"""SIGTERM and Ctrl-C: remember the signal, so that the training loop can save and end."""

import contextlib
import os
import signal
import threading
import time


class StopSignal:
    """Remembers the first SIGTERM or SIGINT inside a `with` block; a second one exits at once.

    Does nothing outside the main thread, where Python cannot set signal handlers.
    """

    def __init__(self):
        self.received = False
        self._time = 0.0
        self._handlers = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self.received:
            self.received = True
            self._time = time.monotonic()
            with contextlib.suppress(OSError):  # stderr is a closed pipe
                os.write(2, b"\nstopping at the next micro-step; a second signal exits at once\n")
            return
        # Ctrl-C in a terminal reaches each rank twice: directly, and passed on by torchrun.
        is_repeated_by_torchrun = "RANK" in os.environ and time.monotonic() - self._time < 1
        if not is_repeated_by_torchrun:
            os._exit(128 + number)
