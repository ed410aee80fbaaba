"""Fine-tunes a model on a data set; the same command resumes an interrupted run.

Example:
  python -m medsam_jax.train --config configs/demo.py --workdir runs/demo \\
      --config.data_dir=data/demo
"""

import logging

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from medsam_jax import cli
from medsam_jax.distributed import define_flags
from medsam_jax.io.files import keep_compiled_programs

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_EMBED_ONLY = flags.DEFINE_bool(
    "embed_only", False, "Fill config.embedding_cache and stop; needs no --workdir."
)
_JOIN_PROCESSES = define_flags()


def main(_) -> None:
    logging.getLogger("medsam_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every array it writes
    keep_compiled_programs()
    from medsam_jax.training.embeddings import fill_cache
    from medsam_jax.training.loop import train_and_evaluate

    _JOIN_PROCESSES()
    if _EMBED_ONLY.value:
        fill_cache(_CONFIG.value)
    else:
        train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    flags.register_validator(
        "workdir",
        lambda workdir: workdir is not None or _EMBED_ONLY.value,
        "Flag --workdir must have a value other than None.",
    )
    cli.run(main)
