"""Puts the notes of scans into the log and into summaries; `Scan.notes` says what notes are."""

import collections
import functools
import logging
from collections.abc import Iterable

from medsam_jax.io.geometry import Scan

log = logging.getLogger(__name__)


def log_notes(scan: Scan) -> None:
    """Logs each note of a scan as a warning with its path, once in a process."""
    for note in scan.notes:
        _log_once(scan.path, note)


@functools.lru_cache(maxsize=4096)
def _log_once(path: str, note: str) -> None:
    log.warning("%s: %s", path, note)


def notes_of_pair(scan: Scan, mask: Scan) -> tuple[str, ...]:
    """Returns the notes of an image and of its mask, which are marked so."""
    return scan.notes + tuple(f"mask: {note}" for note in mask.notes)


def summarise_notes(
    noted: Iterable[tuple[str, Iterable[str]]], names: int = 3, lines: int = 20
) -> list[str]:
    """Returns one line a note with the scans that have it; the most frequent notes first.

    Args:
      noted: (name of the scan, its notes).
      names: that a line lists; the rest is counted.
      lines: of notes; a further line counts the rest.
    """
    scans = collections.defaultdict(dict)
    for name, notes in noted:
        for note in notes:
            scans[note][name] = None  # a name may come twice
    ordered = sorted(scans.items(), key=lambda item: -len(item[1]))
    summary = []
    for note, found in ordered[:lines]:
        more = f" and {len(found) - names} more" if len(found) > names else ""
        summary.append(f"{', '.join(list(found)[:names])}{more}: {note}")
    if len(ordered) > lines:
        summary.append(f"{len(ordered) - lines} further notes")
    return summary
