"""Joins the processes of a run over several hosts; must run before anything uses a device."""

from collections.abc import Callable

from absl import flags

from medsam_jax.errors import UserError


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


def wait_for_all(what: str) -> None:
    """Waits until every process of the run has called it; returns at once in a run of one."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
