"""Keeps C libraries from printing about damaged files, which our errors name."""

import contextlib
import os
import threading
from collections.abc import Iterator

_LOCK = threading.Lock()  # two threads must not restore each other's file


@contextlib.contextmanager
def no_prints() -> Iterator[None]:
    """Sends what is written to file descriptor 2 to nowhere while the block runs.

    Other threads' lines to stderr are lost for that time: use it around short calls only.
    """
    with _LOCK:
        try:
            saved = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            os.close(null)
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
