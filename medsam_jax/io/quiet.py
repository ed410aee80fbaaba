"""Silences libraries that print while they read a damaged file; our errors name the file."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator

_LOCK = threading.RLock()  # two threads must not restore each other's file


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drops what C libraries (MetaIO, libtiff, libpng) print to stderr, and the named loggers.

    Other threads' lines to stderr are lost for that time: use it around short calls only.
    """
    with _LOCK:
        named = [logging.getLogger(name) for name in loggers]
        before = [logger.disabled for logger in named]
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed
            kept = None
        try:
            for logger in named:
                logger.disabled = True
            if kept is not None:
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            for logger, was_disabled in zip(named, before, strict=True):
                logger.disabled = was_disabled
            if kept is not None:
                os.dup2(kept, 2)
                os.close(kept)
