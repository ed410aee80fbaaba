"""Joining the processes of a run over several hosts, before anything else touches a device."""

import jax

from medsam_jax.errors import UserError


def join_processes(
    multihost: bool,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects this process with the others of the run; does nothing for a run of one.

    Args:
      multihost: take everything from the cluster's environment (SLURM, Open MPI, Cloud TPU,
        Kubernetes with jax's variables), as `jax.distributed.initialize` knows it.
      coordinator: HOST:PORT of process 0, where there is no such environment.
      num_processes, process_id: beside `coordinator`.

    Raises:
      UserError: a half-given address, or an environment that names no processes.
    """
    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise UserError("--coordinator, --num_processes and --process_id: give all or none")
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
