"""Prints and draws the data card of a built data set.

Example:
  python -m datasets.inspect --data_dir data --output card
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from medsam_jax.cli import run

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "--data_dir of datasets.build, or a version folder.", required=True
)
_OUTPUT = flags.DEFINE_string("output", "data_card", "Folder for README.md and the figures.")


def main(argv: Sequence[str]) -> None:
    """Flags, then one call."""
    del argv
    from datasets.medical_slices import card
    from medsam_jax.data.datasets import find_dataset

    info = find_dataset(_DATA_DIR.value)
    output = pathlib.Path(_OUTPUT.value)
    print(card.text(info.record))
    card.draw(info, output / "figures")
    (output / "README.md").write_text(card.text(info.record), encoding="utf-8")
    print(f"wrote {output / 'README.md'} and {output / 'figures'}")


if __name__ == "__main__":
    run(main)
