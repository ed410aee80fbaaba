"""Intensity rules by modality: which two intensities of a scan become grey levels 0 and 255.

A modality is one function and one row of `RULES`. A modality without a row is stretched between
percentiles. MedSAM's code differs in one point: it stretches a CT window to what the scan fills of
it. Here a window maps to [0, 255] as it is, so one HU is one grey level in every scan.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from medsam_jax.errors import UserError

CT_WINDOWS = {
    "wide": (-500.0, 1000.0),  # lower, upper HU: MedSAM v1 and LiteMedSAM
    "soft_tissue": (-160.0, 240.0),  # level 40, width 400
    "lung": (-1350.0, 150.0),  # level -600, width 1500: MedSAM's repository; the paper prints -160
    "brain": (0.0, 80.0),  # level 40, width 80
}

Limits = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntensitySettings:
    """The part of a recipe that intensity rules read."""

    name: str
    ct_windows: tuple[str, ...]  # names in CT_WINDOWS; the first is the default
    percentiles: Limits  # of every modality without a rule of its own, percent
    percentile_voxels: Literal["all", "positive"]  # "positive": voxels > 0; zeros stay zero
    clip_8bit: bool  # percentiles for 8-bit images too, or stored as they are


@dataclasses.dataclass(frozen=True)
class IntensityRule:
    """Rule by which a modality's intensities become grey levels.

    limits: (volume, settings, CT window or None) -> the intensities that become 0 and 255.
    physical: whether intensities have a unit, such as HU. An 8-bit file cannot hold those, so it
      was windowed before and is stored as it is; 0 is an intensity like any other. Without a unit,
      `clip_8bit` and `percentile_voxels` of the recipe decide both.
    """

    limits: Callable[[np.ndarray, IntensitySettings, str | None], Limits]
    physical: bool


def window_limits(volume: np.ndarray, settings: IntensitySettings, window: str | None) -> Limits:
    """Returns the CT window of that name, by default the recipe's first. Raises UserError."""
    del volume
    name = window or settings.ct_windows[0]
    if name not in settings.ct_windows:
        raise UserError(
            f"window: {name!r} is not one of recipe {settings.name}'s: "
            f"{', '.join(settings.ct_windows)}"
        )
    return CT_WINDOWS[name]


def percentile_limits(
    volume: np.ndarray, settings: IntensitySettings, window: str | None
) -> Limits:
    """Returns percentiles of the whole scan. Raises UserError for an image without contrast."""
    del window
    voxels = volume[volume > 0] if settings.percentile_voxels == "positive" else volume
    if voxels.size == 0:
        raise UserError("image: no voxel is above 0; shift the intensities or use recipe v1")
    lower, upper = np.percentile(voxels, settings.percentiles)
    if not upper > lower:
        low, high = settings.percentiles
        raise UserError(
            f"image: constant, its {low} and {high} percentiles are both {lower:g}; leave it out "
            "or crop it to what was scanned"
        )
    return float(lower), float(upper)


RULES = {"CT": IntensityRule(window_limits, physical=True)}
OTHER = IntensityRule(percentile_limits, physical=False)


def rule_of(modality: str | None) -> IntensityRule:
    """Returns the rule of a modality, in upper or lower case; None is of no known modality."""
    return RULES.get((modality or "").upper(), OTHER)


def is_ct(modality: str | None) -> bool:
    """Returns whether a modality is CT: intensities in HU, shown in a window."""
    return (modality or "").upper() == "CT"
