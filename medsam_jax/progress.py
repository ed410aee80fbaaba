"""Progress of long loops: what is being done, how fast, and how long it will take."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], desc: str, total: int | None = None) -> Iterator[T]:
    """Yields the items of `iterable`, drawing a bar with rate and time left on stderr.

    Without a terminal (a job's log file) it prints a line every ten seconds instead of redrawing.
    """
    interval = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(iterable, desc=desc, total=total, mininterval=interval, dynamic_ncols=True)
