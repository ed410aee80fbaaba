"""How fast a run is, and what it waits for."""

import contextlib
import time
from collections.abc import Iterator


class StepClock:
    """Images per second and the share of the time that is spent waiting for data."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start = time.perf_counter()
        self._steps, self._waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def scalars(self, batch_size: int) -> dict[str, float]:
        """Rates since the last call."""
        seconds = time.perf_counter() - self._start
        rates = {
            "speed/images_per_second": self._steps * batch_size / seconds,
            "speed/data_wait_share": self._waited / seconds,
        }
        self.restart()
        return rates
