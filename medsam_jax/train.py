"""Fine-tunes a model on a data set; the same command resumes an interrupted run.

Example:
  python -m medsam_jax.train --config configs/demo.py --workdir runs/demo \\
      --config.data_dir=data/demo

Where no file `demo` exists, `--config demo` names `configs/demo.py` from any folder.
"""

import logging
import shlex
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from medsam_jax import cli
from medsam_jax.distributed import define_flags
from medsam_jax.io.files import keep_compiled_programs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Training config: a file, or the name of one in configs/."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_EMBED_ONLY = flags.DEFINE_bool(
    "embed_only", False, "Fill config.embedding_cache and stop; needs no --workdir."
)
_JOIN_PROCESSES = define_flags()


class _ConfigParser(config_flags.ConfigFileFlagParser):
    """Loads a config from a file, or from the package by its name."""

    def parse(self, path: str) -> ConfigDict:
        return super().parse(cli.config_file(path))


flags.FLAGS["config"].parser = _ConfigParser("config")


def main(_) -> None:
    logging.getLogger("medsam_jax").setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports every array it writes
    with cli.loading():
        keep_compiled_programs()
        from medsam_jax.training.embeddings import fill_cache
        from medsam_jax.training.loop import train_and_evaluate

    _JOIN_PROCESSES()
    if _EMBED_ONLY.value:
        fill_cache(_CONFIG.value)
        return
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
    flags.mark_flags_as_required(["config"])
    flags.register_validator(
        "workdir",
        lambda workdir: workdir is not None or _EMBED_ONLY.value,
        "Flag --workdir must have a value other than None.",
    )
    cli.run(main)
