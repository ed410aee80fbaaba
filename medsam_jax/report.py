"""Writes a finished training run's report.html again; `medsam_jax.train` writes it at the end.

Example:
  python -m medsam_jax.report runs/demo
"""

from pathlib import Path

from absl import logging

from medsam_jax import cli
from medsam_jax.errors import UserError
from medsam_jax.io.files import keep_compiled_programs


def main(argv) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    if len(argv) != 2:
        raise UserError("no WORKDIR given; see --help")
    keep_compiled_programs()
    from medsam_jax.evaluation.training_report import write_report

    write_report(Path(argv[1]))


if __name__ == "__main__":
    cli.run(main, positional=1)
