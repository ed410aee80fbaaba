"""Reads MedSAM's `.npz` files."""

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.geometry import Scan
from medsam_jax.io.itk import reason


def read_npz(path: str, key: str) -> Scan:
    """Reads MedSAM's `.npz`: `imgs` and `gts` [Z, Y, X] or a picture, `spacing` as (x, y, z)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = sorted(file.files)
            array = file[key] if key in names else None
            spacing = file["spacing"] if "spacing" in names else None
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read as .npz ({reason(error)}); write it again"
        ) from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error share no base class
        raise UserError(f"{path}: damaged .npz ({reason(error)}); write it again") from None
    if array is None:
        raise UserError(f"{path}: has no array {key!r} (found {', '.join(names)})")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3 and spacing is None):
        array = array[None]
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        raise UserError(f"{path}: {key} has shape {array.shape}; expected [Z, Y, X] or [Y, X, 3]")
    if spacing is None or len(spacing) != 3:
        return Scan(array, (float("nan"),) * 3, None, path)
    xyz = tuple(float(value) for value in spacing)
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    return Scan(array, xyz[::-1], ((0.0, 0.0, 0.0), xyz, identity), path)
