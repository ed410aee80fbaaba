"""Joins the processes of a run over several hosts; must run before anything uses a device.

Every process keeps a connection with process 0. Where one ends without a word (a kill, a lost
host), all others end at once with one line and status 143, upon which the launchers restart the
run. A host that vanishes from the network is noticed after `LOST_AFTER` seconds. Without this a
process waits for an answer of the lost one, until jax aborts it after minutes.
"""

import atexit
import contextlib
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

from absl import flags

from medsam_jax import cli
from medsam_jax.errors import UserError

LOST_AFTER = 60  # seconds
_JOIN_SECONDS = 300
_SETTLE = 3  # seconds in which the loss of a process, which makes others fail, becomes known
_KEY = "medsam_jax/watch"  # of the port, in jax's key-value store


def define_flags() -> Callable[[], None]:
    """Defines the flags that place a process among others; returns a function that joins them."""
    names = ("multihost", "coordinator", "num_processes", "process_id")
    if names[0] not in flags.FLAGS:  # two commands may be imported together
        flags.DEFINE_bool(
            "multihost",
            False,
            "Run as one of several processes, named by the cluster's environment (SLURM, Open MPI, "
            "Cloud TPU, Kubernetes).",
        )
        flags.DEFINE_string(
            "coordinator", None, "HOST:PORT of process 0, where no such environment exists."
        )
        flags.DEFINE_integer("num_processes", None, "With --coordinator.")
        flags.DEFINE_integer("process_id", None, "With --coordinator, from 0.")
    return lambda: join_processes(*(flags.FLAGS[name].value for name in names))


def join_processes(
    multihost: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process with the others of the run; does nothing for a run of one.

    Args:
      multihost: read the cluster's environment with `jax.distributed.initialize`. Under SLURM and
        Open MPI each process gets one device of its host, elsewhere all.
      coordinator: HOST:PORT of process 0, where no such environment exists; needs the other two.

    Raises:
      UserError: an incomplete address, or an environment that names no processes.
    """
    import jax

    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --num_processes and --process_id: give all or none")
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id: {process_id} of --num_processes={num_processes}; count from 0"
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif multihost:
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--multihost: no cluster environment found ({reason}); give --coordinator, "
                "--num_processes and --process_id"
            ) from None
    if jax.distributed.is_initialized():
        _Watch()


def wait_for_all(what: str) -> None:
    """Waits until every process of the run has called it; returns at once in a run of one."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


class _Watch:
    """Ends this process when another one is lost or has failed, and tells the others how it ends.

    Messages are lines: "done", "failed ID" or "lost ID". Process 0 passes on what it learns.
    """

    def __init__(self):
        # No public name of jax holds the address of process 0 or the key-value store.
        from jax._src.distributed import global_state as state

        self._process, self._count = state.process_id, state.num_processes
        self._others: dict[socket.socket, int] = {}  # their processes
        self._failing = False  # all may fail alike, and each says why
        try:
            if self._process == 0:
                self._accept(state.client)
            else:
                port = state.client.blocking_key_value_get(_KEY, 1000 * _JOIN_SECONDS)
                host = state.coordinator_address.rpartition(":")[0].strip("[]")
                connection = socket.create_connection((host, int(port)), timeout=_JOIN_SECONDS)
                connection.sendall(f"{self._process}\n".encode())
                self._others[connection] = 0
        except OSError as error:
            raise UserError(
                f"process {self._process} of {self._count}: no connection between it and process 0 "
                f"({error}); open the network's ports among the hosts"
            ) from None
        for connection in self._others:
            _keep_alive(connection)
        atexit.register(self._tell, "done")  # not where `cli.leave_at_once` ends the process
        if self._others:
            cli.before_failure.append(self._failed)
        threading.Thread(target=self._run, daemon=True, name="lost processes").start()

    def _accept(self, store) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as server:
            server.settimeout(_JOIN_SECONDS)
            store.key_value_set(_KEY, str(server.getsockname()[1]))
            while len(self._others) < self._count - 1:
                connection, _ = server.accept()
                connection.settimeout(_SETTLE)
                try:
                    process = int(connection.recv(100))
                except (OSError, ValueError):
                    process = -1  # a stranger on the network
                if 0 < process < self._count:
                    self._others[connection] = process
                else:
                    connection.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._others:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    if self._read(key.fileobj):
                        selector.unregister(key.fileobj)

    def _read(self, connection: socket.socket) -> bool:
        """Reads a message; returns whether it is the last one to follow, or ends this process."""
        try:
            words = connection.recv(100).decode().split()[:2]
        except OSError:
            words = []
        if words[:1] == ["done"]:
            return True
        kind, process = words or ("lost", str(self._others[connection]))
        if kind == "failed" and self._failing:
            return True
        self._tell(f"{kind} {process}", besides=connection)
        name = f"process {process} of {self._count}"
        if kind == "lost":
            told, status = f"{name} is lost; the same command goes on from what is saved", 143
        else:
            told, status = f"{name} has failed, see its messages", 1
        print(f"error: {told}", file=sys.stderr)
        cli.leave_at_once(status)

    def _failed(self) -> None:
        self._failing = True
        time.sleep(_SETTLE)
        self._tell(f"failed {self._process}")

    def _tell(self, message: str, besides: socket.socket | None = None) -> None:
        for connection in self._others:
            if connection is not besides:
                with contextlib.suppress(OSError):  # it has ended
                    connection.sendall(f"{message}\n".encode())


def _keep_alive(connection: socket.socket) -> None:
    """Has the kernel ask an idle connection's other end for life, whatever this process does."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {"TCP_KEEPIDLE": LOST_AFTER // 2, "TCP_KEEPINTVL": LOST_AFTER // 6, "TCP_KEEPCNT": 3}
    for name, value in times.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
