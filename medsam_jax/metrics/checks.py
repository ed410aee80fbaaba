"""Argument checks shared by the metrics."""

from collections.abc import Sequence

import jax
import numpy as np

Spacing = Sequence[float] | np.ndarray | jax.Array  # one length per array axis


def is_jax(*arrays) -> bool:
    """Tells whether any argument is a jax array or tracer: then the jitted form is used."""
    return any(isinstance(array, jax.Array) for array in arrays)


def check_shapes(pred, target, ndims: tuple[int, ...]) -> None:
    """Raises ValueError unless both masks have one shape, of an allowed rank."""
    if np.shape(pred) != np.shape(target):
        raise ValueError(
            f"pred has shape {np.shape(pred)} and target {np.shape(target)}; they must be equal"
        )
    if np.ndim(pred) not in ndims:
        raise ValueError(f"masks have {np.ndim(pred)} dimensions; expected one of {ndims}")


def as_mask(name: str, array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Returns a bool array. Booleans, and numbers that are all 0 or 1, are masks.

    Raises ValueError for any other value, such as those of a label map or NaN, and for a traced
    array of numbers (under `jit` or `vmap`), whose values are not known.
    """
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
    if array.dtype == bool:
        return array
    if isinstance(array, jax.core.Tracer):
        raise ValueError(
            f"{name} is traced and of {array.dtype}; give a boolean mask, such as labels == 1"
        )
    mask = array != 0
    if not bool((mask == array).all()):
        odd = np.asarray(array)[np.asarray(mask & (array != 1))][0]
        raise ValueError(f"{name} holds {odd}; a mask is boolean, or 0 and 1 only")
    return mask


def check_spacing(spacing: Spacing, ndim: int) -> np.ndarray:
    """Returns spacing as float64 [ndim]; raises ValueError unless it is positive and finite."""
    spacing = np.asarray(spacing, dtype=np.float64)
    if spacing.shape != (ndim,):
        raise ValueError(
            f"spacing has shape {spacing.shape}; expected one length per array axis, ({ndim},)"
        )
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ValueError(f"spacing is {spacing.tolist()}; it must be positive and finite")
    return spacing


def check_tolerance(tolerance: float) -> float:
    """Returns tolerance as float; raises ValueError when negative or NaN."""
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be zero or more")
    return float(tolerance)
