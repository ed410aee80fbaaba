"""Silences libraries that print while they read a damaged file; our errors name the file."""

import contextlib
import os
import threading
from collections.abc import Iterator

_LOCK = threading.RLock()  # two threads must not restore each other's file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what C libraries (MetaIO, libtiff, libpng) print to stderr.

    Other threads' lines to stderr are lost for that time: use it around short calls only.
    """
    with _LOCK:
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
