"""Fine-tunes a model on a data set; the same command resumes an interrupted run.

Example:
  python -m medsam_jax.train --config configs/demo.py --workdir runs/demo \\
      --config.data_dir=data/demo
"""

import logging
import shlex
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from medsam_jax import cli
from medsam_jax.distributed import define_flags
from medsam_jax.io.files import keep_compiled_programs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_JOIN_PROCESSES = define_flags()


def main(_) -> None:
    logging.getLogger("medsam_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every array it writes
    keep_compiled_programs()
    from medsam_jax.training.loop import train_and_evaluate

    _JOIN_PROCESSES()
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    train_and_evaluate(config, workdir)
    import jax

    if jax.process_index() == 0:
        curves = shlex.join(["tensorboard", "--logdir", str(workdir / "tensorboard")])
        print(f"curves: {curves} (pip install tensorboard)", flush=True)
    if config.report:
        from medsam_jax.evaluation.training_report import write_report

        write_report(workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
