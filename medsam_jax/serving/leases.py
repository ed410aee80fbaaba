"""Who uses the server: leases with time-outs, and a limit of their number."""

import dataclasses
import secrets
import time
from collections.abc import Callable

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.serving.volume_session import VolumeSession


class GoneError(UserError):
    """The lease has ended, or the server was started again since."""


class FullError(UserError):
    """Every session is in use."""


@dataclasses.dataclass(eq=False)
class Lease:
    """A user of the server."""

    token: str
    acted: float  # last time of a request other than a heartbeat, s
    alive: float  # last time of any request, s
    volume: VolumeSession | None = None
    buffer_type: np.dtype = np.dtype(np.uint8)
    sent: np.ndarray | None = None  # the mask that the client has
    failed: bool = False  # encoding its slices in the background


class Leases:
    """Gives out leases and ends those that are not used.

    Args:
      most: leases at a time.
      idle_seconds: a lease without a request of its user ends after that; heartbeats do not count.
      yield_seconds: where all are in use, a new one replaces that which has been idle longest, if
        for longer than this.
      liveness_seconds: a lease without any request ends after that.
      clock: seconds, for tests.
    """

    def __init__(
        self,
        most: int = 8,
        idle_seconds: float = 600.0,
        liveness_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        yield_seconds: float = 120.0,
    ):
        self.yield_seconds = yield_seconds
        self.most, self.idle_seconds, self.liveness_seconds = most, idle_seconds, liveness_seconds
        self._clock = clock
        self._by_token: dict[str, Lease] = {}

    def claim(self) -> Lease:
        """Returns a new lease. Raises FullError where `most` are in use and none is idle."""
        self.expire()
        oldest = self.all()[-1:]
        is_full = len(self._by_token) >= self.most
        if is_full and self._clock() - oldest[0].acted > self.yield_seconds:
            self.release(oldest[0].token)
        if len(self._by_token) >= self.most:
            raise FullError(f"all {self.most} sessions are in use; try again later")
        now = self._clock()
        lease = Lease(secrets.token_urlsafe(24), now, now)
        self._by_token[lease.token] = lease
        return lease

    def get(self, token: str | None, is_action: bool = True) -> Lease:
        """Returns a lease and notes that it is used. Raises GoneError."""
        self.expire()
        lease = self._by_token.get(token or "")
        if lease is None:
            raise GoneError("the session has ended; connect again")
        lease.alive = self._clock()
        if is_action:
            lease.acted = lease.alive
        return lease

    def release(self, token: str | None) -> bool:
        """Ends a lease; False where there was none."""
        return self._by_token.pop(token or "", None) is not None

    def expire(self) -> None:
        """Ends the leases whose time is over."""
        now = self._clock()
        for lease in self.all():
            idle, silent = now - lease.acted, now - lease.alive
            if idle > self.idle_seconds or silent > self.liveness_seconds:
                self.release(lease.token)

    def remaining(self, lease: Lease) -> float:
        """Seconds until the lease ends without a request of its user."""
        return max(lease.acted + self.idle_seconds - self._clock(), 0.0)

    def all(self) -> list[Lease]:
        """The leases, that used last first."""
        return sorted(self._by_token.copy().values(), key=lambda lease: -lease.acted)
