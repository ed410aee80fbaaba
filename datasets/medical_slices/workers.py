"""Runs functions over many cases in worker processes, in order and with bounded memory."""

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from medsam_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Item], Result], Iterable[Item]], Iterator[Result]]


@contextlib.contextmanager
def workers(count: int) -> Iterator[OrderedMap]:
    """Gives a `map` that runs in `count` processes, or in this one for 0 and 1.

    Results come in the order of the items. At most one result more than there are processes is
    held, which bounds the memory. Processes are spawned, not forked: JAX starts threads.

    Raises:
      UserError: a process was killed, usually because memory ran out.
    """
    if count <= 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        count, mp_context=context, initializer=_one_thread
    ) as pool:

        def ordered_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator:
            remaining, waiting = iter(items), collections.deque()
            while True:
                for item in itertools.islice(remaining, count + 1 - len(waiting)):
                    waiting.append(pool.submit(function, item))
                if not waiting:
                    return
                yield waiting.popleft().result()

        try:
            yield ordered_map
        except BrokenProcessPool:
            raise UserError(
                "--num_workers: a worker process was killed, usually because memory ran out; "
                f"use fewer than {count}"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _one_thread() -> None:
    """Limits each process to one thread: the processes already use all cores."""
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
