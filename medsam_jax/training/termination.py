"""SIGTERM, a cluster's notice some minutes before the kill, as something a loop can ask about."""

import signal

import jax


class Termination:
    """Turns SIGTERM into an answer that is the same in every process of a run at every step.

    With several processes jax's own handler, installed with `jax.distributed`, passes the notice on
    to all of them, and they agree on a step that none has passed: saving is a joint act, and a
    cluster may signal one host alone or all at slightly different times.
    """

    def __enter__(self) -> "Termination":
        self._notified = False
        self._alone = jax.process_count() == 1
        if self._alone:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._alone:
            signal.signal(signal.SIGTERM, self._previous)

    def due(self, step: int) -> bool:
        """Whether to save and stop after this step; to be asked once a step, by all processes."""
        if self._alone:
            return self._notified
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def _on_signal(self, *_) -> None:
        self._notified = True
