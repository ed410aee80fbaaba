"""Fine-tunes a model on a data set; the same command resumes an interrupted run.

Example:
  python -m medsam_jax.train --config configs/demo.py --workdir runs/demo \\
      --config.data_dir=data/demo
"""

import logging

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from medsam_jax import errors
from medsam_jax.cache import keep_compiled_programs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, numbers and pictures go.")
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "One of several processes, as the cluster's environment says (SLURM, TPU)."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, without such an environment."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Beside --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Beside --coordinator, from 0.")


def main(_) -> None:
    logging.getLogger("medsam_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every array it writes
    keep_compiled_programs()
    from medsam_jax.training.distributed import join_processes
    from medsam_jax.training.loop import train_and_evaluate

    join_processes(_MULTIHOST.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)

    train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    errors.run(main)
