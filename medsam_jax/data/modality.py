"""Intensity rules by modality: which two intensities of a scan become grey levels 0 and 255.

A modality is one function and one row of `RULES`. A modality without a row is stretched between
percentiles. MedSAM's code differs in one point: it stretches a CT window to what the scan fills of
it. Here a window maps to [0, 255] as it is, so one HU is one grey level in every scan.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from medsam_jax.errors import UserError

CT_WINDOWS = {
    "wide": (-500.0, 1000.0),  # lower, upper HU: MedSAM v1 and LiteMedSAM
    "soft_tissue": (-160.0, 240.0),  # level 40, width 400
    "lung": (-1350.0, 150.0),  # level -600, width 1500: MedSAM's repository; the paper prints -160
    "brain": (0.0, 80.0),  # level 40, width 80
}

_SAMPLE = 1 << 20  # voxels that are looked at for doubts
_MOST_HU = 800.0  # of four fifths of the voxels; denser is bone and metal only
_PADDING = -1100.0  # HU below are outside the scanner's field of view
_LEAST_SHARE = 0.05  # of the voxels: the background


class Limits(NamedTuple):
    """Intensities that become grey levels 0 and 255."""

    lower: float
    upper: float
    background: float | None = None  # the intensity that stays grey level 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntensitySettings:
    """The part of a recipe that intensity rules read."""

    name: str
    ct_windows: tuple[str, ...]  # names in CT_WINDOWS; the first is the default
    percentiles: tuple[float, float]  # of every modality without a rule of its own, percent
    # "positive": voxels > 0, zeros stay zero; see `foreground` for scans with negative values
    percentile_voxels: Literal["all", "positive"]
    clip_8bit: bool  # percentiles for 8-bit images too, or stored as they are


@dataclasses.dataclass(frozen=True)
class IntensityRule:
    """Rule by which a modality's intensities become grey levels.

    limits: (volume, settings, CT window or None) -> the intensities that become 0 and 255, as
      `Limits` or a plain pair.
    physical: whether intensities have a unit, such as HU. An 8-bit file cannot hold those, so it
      was windowed before and is stored as it is; 0 is an intensity like any other. Without a unit,
      `clip_8bit` and `percentile_voxels` of the recipe decide both.
    """

    limits: Callable[[np.ndarray, IntensitySettings, str | None], tuple[float, ...]]
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
    return Limits(*CT_WINDOWS[name])


def percentile_limits(
    volume: np.ndarray, settings: IntensitySettings, window: str | None
) -> Limits:
    """Returns percentiles of the whole scan. Raises UserError for an image without contrast."""
    del window
    voxels, background = volume, None
    if settings.percentile_voxels == "positive":
        voxels, background = foreground(volume)
    if voxels.size == 0:
        raise UserError("image: no voxel is above 0; shift the intensities or use recipe v1")
    lower, upper = np.percentile(voxels, settings.percentiles)
    if not upper > lower:
        low, high = settings.percentiles
        raise UserError(
            f"image: constant, its {low} and {high} percentiles are both {lower:g}; leave it out "
            "or crop it to what was scanned"
        )
    return Limits(float(lower), float(upper), background)


def foreground(volume: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Returns the voxels of what was scanned, and the intensity of the background if it has one.

    They are the voxels above 0. Where negative values are more than the ringing of an interpolation
    (z-scored or shifted scans), the background is 0 or the minimum, whichever more voxels have, if
    they are at least 5 %; without such a background all voxels count.
    """
    if not _has_real_negatives(volume):
        return volume[volume > 0], 0.0
    low = float(volume.min())
    shares = {value: float(np.mean(volume == value)) for value in (0.0, low)}
    background = max(shares, key=lambda value: shares[value])
    if shares[background] < _LEAST_SHARE:
        return volume.ravel(), None
    return volume[volume != background], background


def _has_real_negatives(volume: np.ndarray) -> bool:
    """Returns whether negative values are many, and not tiny beside the positive ones."""
    if volume.dtype.kind == "u" or not volume.min() < 0:
        return False
    negative, positive = volume[volume < 0], volume[volume > 0]
    if negative.size < _LEAST_SHARE * (negative.size + positive.size):
        return False
    high = np.percentile(positive, 99.5) if positive.size else 0.0
    return bool(-np.median(negative) > 0.02 * high)


def doubts(volume: np.ndarray, modality: str | None, settings: IntensitySettings) -> list[str]:
    """Returns sentences on a scan's values that may not be those its modality has.

    Build, prediction and evaluation show them. Padding outside the field of view (-2000, -32768)
    is no reason for one.
    """
    if not volume.size:
        return []
    if is_ct(modality):
        return _ct_doubts(volume)
    rule = rule_of(modality)
    stretched = volume.dtype != np.uint8 and rule.limits is percentile_limits
    if not stretched or settings.percentile_voxels == "all" or not _has_real_negatives(volume):
        return []
    _, background = foreground(volume)
    named = "all voxels" if background is None else f"voxels other than {background:g}"
    return [
        f"{np.mean(volume < 0):.0%} of the values are negative ({volume.min():g} to "
        f"{volume.max():g}); the grey levels are percentiles of {named}"
    ]


def _ct_doubts(volume: np.ndarray) -> list[str]:
    low, high = float(volume.min()), float(volume.max())
    if volume.dtype == np.uint8:
        return [
            f"a CT in 8 bits ({low:g} to {high:g}) is not in HU; it is taken as windowed before"
        ]
    flat = volume.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)]
    inside = sample[sample >= _PADDING]
    if low >= 0 or (low < _PADDING and inside.size and np.percentile(inside, 1) > -50):
        found = "a CT without a negative value"
        found += "" if low >= 0 else " but padding"
    elif high <= 0:
        found = "a CT without a value above 0"
    elif high - low < 100:
        found = "a CT of a range below 100"
    elif inside.size and np.percentile(inside, 80) > _MOST_HU:
        found = f"a CT with a fifth of its values above {_MOST_HU:g}"
    else:
        return []
    return [f"{found} ({low:g} to {high:g}) is probably not in HU"]


RULES = {"CT": IntensityRule(window_limits, physical=True)}
OTHER = IntensityRule(percentile_limits, physical=False)


def rule_of(modality: str | None) -> IntensityRule:
    """Returns the rule of a modality, in upper or lower case; None is of no known modality."""
    return RULES.get((modality or "").upper(), OTHER)


def is_ct(modality: str | None) -> bool:
    """Returns whether a modality is CT: intensities in HU, shown in a window."""
    return (modality or "").upper() == "CT"
