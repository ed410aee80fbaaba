"""The one thread that runs the model: prompts first, slices in the background between them."""

import collections
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

log = logging.getLogger(__name__)


class Worker:
    """Runs submitted functions one after another, and `background` while there are none.

    Args:
      background: does one small piece of work; False where none is left.
    """

    def __init__(self, background: Callable[[], bool]):
        self._background = background
        self._tasks: collections.deque[tuple[Future, Callable[[], Any]]] = collections.deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Any]) -> Future:
        """Returns the future of `function()`, which waits for one background piece at most."""
        future: Future = Future()
        with self._changed:
            self._tasks.append((future, function))
            self._changed.notify()
        return future

    def stop(self) -> None:
        """Ends the thread after the work in hand; what still waits is cancelled."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        for future, _ in self._tasks:
            future.cancel()

    def _run(self) -> None:
        idle = False
        while True:
            with self._changed:
                while idle and not self._tasks and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                task = self._tasks.popleft() if self._tasks else None
            if task is None:
                idle = not self._background()
                continue
            idle = False
            future, function = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:  # of one session; it is raised where the answer is awaited
                future.set_exception(error)
