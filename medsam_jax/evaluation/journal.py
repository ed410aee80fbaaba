"""Results on disk as they come, so that a killed evaluation goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medsam_jax.io.files import disk_space

Row = dict[str, Any]


class Journal:
    """Rows of one checkpoint under fixed settings, one JSON line each, in `directory`.

    Every process appends to a file of its own and reads all of them. A line that a kill cut short
    is dropped. The files' name is a digest of everything that the rows depend on, so results of an
    older checkpoint or of other settings are never taken up.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], process: int = 0):
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(identity, sort_keys=True)
        self._directory = directory
        self._stem = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._path = directory / f"{self._stem}-{process}.jsonl"
        if self._path.exists():
            _drop_cut_line(self._path)

    def rows(self) -> list[Row]:
        """The rows of all processes so far, without order."""
        rows = []
        for path in sorted(self._directory.glob(f"{self._stem}-*.jsonl")):
            with path.open() as file:
                rows += [json.loads(line) for line in file if line.endswith("\n")]
        return rows

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows for good: they are on disk when this returns.

        Raises:
          UserError: the disk is full; what was written of the rows is dropped at the next start.
        """
        with disk_space(self._path), self._path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def checkpoint_identity(name_or_dir: str) -> list[Any]:
    """What changes when a checkpoint does: its description and the size and time of its files."""
    directory = Path(name_or_dir)
    if not directory.is_dir():
        return [name_or_dir]  # known weights are verified by hash
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    facts = [[str(p.relative_to(directory)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return [str(directory.resolve()), facts]
