"""Runs a function over many cases in worker processes, in order and with bounded memory."""

import collections
import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from medsam_jax.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Iterator[Result]:
    """`map` in `num_workers` processes; at most one result more than workers is held.

    With 0 or 1 workers it runs here. Workers are spawned, not forked: JAX starts threads.

    Raises:
      UserError: a worker was killed, as a rule for want of memory.
    """
    if num_workers <= 1:
        yield from map(function, items)
        return
    remaining = iter(items)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        waiting: collections.deque = collections.deque()
        ahead = num_workers + 1
        try:
            while True:
                for item in itertools.islice(remaining, ahead - len(waiting)):
                    waiting.append(pool.submit(function, item))
                if not waiting:
                    return
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "--num_workers: a worker process was killed, as a rule for want of memory; "
                f"use fewer than {num_workers}"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
