"""Run lengths of masks: by rows, for results on disk, and by columns, as COCO's JSON wants them.

Counts are the lengths of the runs of 0 and 1 in turn, zeros first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


def encode_runs(mask: Bool[np.ndarray, "..."]) -> list[int]:
    """Returns the counts of a mask in array order; an array without elements has none."""
    flat = mask.ravel()
    return runs_between(np.flatnonzero(np.diff(flat, prepend=False)), flat.size).tolist()


def decode_runs(runs: Sequence[int], shape: Sequence[int]) -> Bool[np.ndarray, "..."]:
    """Inverts `encode_runs`."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)


def runs_between(edges: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " runs"]:
    """Returns the counts of `size` pixels whose value changes at each of the positions `edges`."""
    runs = np.diff(edges, prepend=0, append=size)
    return runs[:-1] if runs[-1] == 0 else runs


def encode_rle(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """Returns COCO's uncompressed form: `size` (H, W) and `counts` down the columns."""
    return {"size": list(mask.shape), "counts": encode_runs(mask.T)}


def decode_rle(rle: dict[str, Any]) -> Bool[np.ndarray, "h w"]:
    """Returns the mask of COCO's uncompressed form."""
    return decode_runs(rle["counts"], rle["size"][::-1]).T


def compress_rle(rle: dict[str, Any]) -> dict[str, Any]:
    """Returns COCO's compressed form: differences to the count before last, in base 32."""
    counts, text = rle["counts"], []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        more = True
        while more:
            digit, value = value & 31, value >> 5
            more = value != (-1 if digit & 16 else 0)
            text.append(chr(48 + digit + (32 if more else 0)))
    return {"size": rle["size"], "counts": "".join(text)}
