"""From a scan to the encoder's input, and from logits back to the scan's pixels.

Data sets, training, evaluation and inference call these functions, so a model gets the same input
at inference as in training. Protocols: MedSAM v1 and v2 (github.com/bowang-lab/MedSAM), LiteMedSAM
and SAM; `recipes.py` holds their settings, `modality.py` the intensity rules. Differences from
MedSAM's code: HU 0 is not painted black and the last slice is kept.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from medsam_jax.data.modality import Limits, rule_of
from medsam_jax.data.recipes import Preprocessing, Recipe, get_recipe
from medsam_jax.errors import UserError


def intensity_limits(
    volume: np.ndarray, modality: str | None, recipe: Recipe, window: str | None = None
) -> Limits | None:
    """Returns the intensities that become 0 and 255, or None where 8-bit values stay as they are.

    Args:
      volume: the whole scan, any shape: percentiles are of the scan, not of a slice.
      modality: selects the rule in `modality.RULES`; None and unknown ones use percentiles.
      recipe: the settings of the rules.
      window: a name in `recipe.ct_windows`; None is its first.

    Raises:
      UserError: an unknown window, or an image without contrast between the limits.
    """
    rule = rule_of(modality)
    if volume.dtype == np.uint8 and (rule.physical or not recipe.clip_8bit):
        return None
    found = rule.limits(volume, recipe, window)
    if isinstance(found, Limits):
        return found
    keeps_zero = recipe.percentile_voxels == "positive" and not rule.physical
    return Limits(*found, 0.0 if keeps_zero else None)


def normalise_intensity(
    volume: np.ndarray,
    modality: str | None,
    recipe: Recipe,
    window: str | None = None,
    limits: Limits | None = None,
) -> UInt8[np.ndarray, "..."]:
    """Clips to the recipe's limits and rescales to [0, 255], truncated as in the group's code.

    Args:
      volume: [H, W], [H, W, 3], [Z, H, W] or [Z, H, W, 3], HU or scanner units.
      modality, recipe, window: see `intensity_limits`.
      limits: `intensity_limits` of the whole scan, where `volume` is a part of it.

    Returns:
      uint8 of the same shape.
    """
    if limits is None:
        limits = intensity_limits(volume, modality, recipe, window)
    if limits is None:
        return volume
    lower, upper, background = limits
    grey = np.clip(volume.astype(np.float64), lower, upper)
    grey -= lower
    grey /= upper - lower
    grey *= 255.0
    if background is not None:
        grey[volume == background] = 0.0
    # 1e-6: a whole grey level stays one where rounding puts its float64 value just below it
    return (grey + 1e-6).astype(np.uint8)


def resized_shape(shape: Sequence[int], recipe: Recipe) -> tuple[int, int]:
    """Returns the height and width of an image of `shape` (H, W) on the stored grid."""
    if recipe.geometry == "squash":
        return recipe.size, recipe.size
    scale = recipe.size / max(shape)
    return max(int(shape[0] * scale + 0.5), 1), max(int(shape[1] * scale + 0.5), 1)


def resize_image(
    image: UInt8[np.ndarray, "h w *c"], recipe: Recipe
) -> tuple[UInt8[np.ndarray, "s s 3"], tuple[int, int]]:
    """Resizes a slice to the stored grid and pads it with zeros at the bottom and right.

    Returns it with its `valid_shape` (h, w), the part that is not padding.
    """
    import cv2

    height, width = resized_shape(image.shape[:2], recipe)
    if recipe.interpolation == "spline":
        resized = _resize_spline(image, height, width)
    elif recipe.interpolation == "area":
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    else:
        from PIL import Image

        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        resized = np.asarray(picture)
    if resized.ndim == 2:
        resized = cv2.merge([resized] * 3)
    padding = 0, recipe.size - height, 0, recipe.size - width  # top, bottom, left, right
    return cv2.copyMakeBorder(resized, *padding, cv2.BORDER_CONSTANT), (height, width)


def resize_mask(labels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Resizes a label map [H, W] to the stored grid [S, S] by nearest pixel; padding is 0."""
    height, width = resized_shape(labels.shape, recipe)
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.intp)
    stored = np.zeros((recipe.size, recipe.size), labels.dtype)
    stored[:height, :width] = labels[np.ix_(rows, columns)]
    return stored


def _resize_spline(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Does as MedSAM's `skimage.transform.resize(order=3, anti_aliasing=True, mode="constant")`.

    Smoothing, spline filter and interpolation are linear and separable, so each axis is one
    sparse matrix, made once per size, and the result equals SciPy's to rounding. Grey levels are
    truncated.
    """
    import cv2

    rows = _spline_matrix(image.shape[0], height)
    columns = _spline_matrix(image.shape[1], width)
    low, high = float(image.min()), float(image.max())
    channels = []
    for channel in np.atleast_3d(image).transpose(2, 0, 1):
        half = rows @ channel.astype(np.float32)
        grey = columns @ cv2.transpose(half)  # [width, height]
        grey += 1e-3  # float32 rounding below a whole grey level
        grey = np.clip(grey, low, high, out=grey).astype(np.uint8)
        channels.append(cv2.transpose(grey))
    return channels[0] if image.ndim == 2 else cv2.merge(channels)


@functools.lru_cache(maxsize=64)
def _spline_matrix(size_in: int, size_out: int) -> Any:
    """Returns anti-aliasing and cubic spline interpolation along one axis: [size_out, size_in].

    Column i is SciPy's response to a unit impulse at i. The spline filter decays by a factor of 3.7
    a pixel, so responses under 1e-7 are dropped and about 20 entries a row remain.
    """
    from scipy import ndimage, sparse

    sigma = max(0.0, (size_in / size_out - 1) / 2)
    matrix = np.empty((size_out, size_in), np.float32)
    for index in range(size_in):
        impulse = np.zeros(size_in)
        impulse[index] = 1.0
        if sigma > 0:
            impulse = ndimage.gaussian_filter1d(impulse, sigma, mode="constant")
        matrix[:, index] = ndimage.zoom(
            impulse, size_out / size_in, order=3, mode="grid-constant", grid_mode=True
        )
    return sparse.csr_array(np.where(np.abs(matrix) > 1e-7, matrix, 0))


def valid_pixels(valid_shape: Int[Array | np.ndarray, "b 2"], size: int) -> Bool[Array, "b s s"]:
    """True for the pixels that are not padding, from heights and widths of slices; jit-able."""
    position = jnp.arange(size)
    rows = position < valid_shape[:, 0, None]
    columns = position < valid_shape[:, 1, None]
    return rows[:, :, None] & columns[:, None, :]


def encoder_input(
    images: UInt8[Array | np.ndarray, "b s s 3"],
    valid_shape: Int[Array | np.ndarray, "b 2"],
    preprocessing: Preprocessing,
) -> Float[Array, "b n n 3"]:
    """Normalises a batch of stored slices for the encoder; jit-able, `preprocessing` static.

    Padding is zero after the normalisation, as in SAM. Where the stored slice is smaller than the
    input (v1: 256 and 1024) it is enlarged bilinearly and rounded to grey levels, as SAM does.

    Args:
      images: S is that of the recipe, N of the result is `preprocessing.image_size`.
      valid_shape: height and width of the part without padding, in stored pixels.
    """
    stored, size = images.shape[1], preprocessing.image_size
    pixels = images.astype(jnp.float32)
    if stored != size:
        shape = (images.shape[0], size, size, 3)
        pixels = jnp.round(jax.image.resize(pixels, shape, "bilinear", antialias=False))
        valid_shape = (valid_shape * size) // stored
    valid = valid_pixels(valid_shape, size)[..., None]  # [B, N, N, 1]
    if preprocessing.normalisation == "min_max":
        low = jnp.min(jnp.where(valid, pixels, jnp.inf), axis=(1, 2, 3), keepdims=True)
        high = jnp.max(jnp.where(valid, pixels, -jnp.inf), axis=(1, 2, 3), keepdims=True)
        pixels = (pixels - low) / jnp.maximum(high - low, 1e-8)
    elif preprocessing.normalisation == "mean_std":
        mean, std = jnp.array(preprocessing.pixel_mean), jnp.array(preprocessing.pixel_std)
        pixels = (pixels - mean) / std
    else:
        pixels = pixels / 255.0
    return jnp.where(valid, pixels, 0.0)


def prompts_to_input(
    coords: Float[Array | np.ndarray, "... c"],
    original_shape: Sequence[int],
    preprocessing: Preprocessing,
) -> Float[Array | np.ndarray, "... c"]:
    """Converts points [..., 2] or boxes [..., 4] to pixels of the encoder input.

    They are in pixels (x, y) of the original image [H, W]. LiteMedSAM scales both axes by
    256 / max(H, W), SAM and MedSAM by the exact ratio of each axis.
    """
    recipe = get_recipe(preprocessing.recipe)
    height, width = original_shape
    if recipe.coordinate_scale == "longest":
        scales = [recipe.size / max(original_shape)] * 2
    else:
        new_height, new_width = resized_shape(original_shape, recipe)
        scales = [new_width / width, new_height / height]
    scales = np.multiply(scales, preprocessing.image_size / recipe.size)
    return coords * np.tile(np.float32(scales), coords.shape[-1] // 2)


def stored_to_input(
    coords: Float[Array | np.ndarray, "..."], preprocessing: Preprocessing
) -> Float[Array | np.ndarray, "..."]:
    """Converts points or boxes on a data set's stored grid to pixels of the encoder input."""
    return coords * (preprocessing.image_size / get_recipe(preprocessing.recipe).size)


def _resize_bilinear(
    maps: jax.Array | np.ndarray, height: int, width: int
) -> jax.Array | np.ndarray:
    """Does as `F.interpolate(mode="bilinear", align_corners=False)` over the last two axes.

    OpenCV resizes NumPy arrays on the host, equal to 2e-5 of the largest value, without a
    compilation for every image size.
    """
    if maps.shape[-2:] == (height, width):
        return maps
    shape = (*maps.shape[:-2], height, width)
    if isinstance(maps, jax.Array):
        return jax.image.resize(maps, shape, "bilinear", antialias=False)
    import cv2

    resized = np.empty(shape, maps.dtype)
    for index in np.ndindex(*maps.shape[:-2]):
        cv2.resize(maps[index], (width, height), resized[index], interpolation=cv2.INTER_LINEAR)
    return resized


def stored_grid_logits(
    low_res_logits: Float[Array | np.ndarray, "... h w"], preprocessing: Preprocessing
) -> Float[Array | np.ndarray, "... s s"]:
    """Resizes low-res logits to the stored grid, padding included; jit-able, for losses, scores."""
    size = get_recipe(preprocessing.recipe).size
    return _resize_bilinear(low_res_logits, size, size)


def restore_masks(
    low_res_logits: Float[Array | np.ndarray, "... h w"],
    valid_shape: Sequence[int],
    original_shape: Sequence[int],
    preprocessing: Preprocessing,
    return_logits: bool = False,
) -> Bool[Array | np.ndarray, "... h2 w2"] | Float[Array | np.ndarray, "... h2 w2"]:
    """Returns masks on the pixels of the original image.

    Padding recipes cut the logits to the valid part and enlarge it, SAM by way of the encoder's
    grid. MedSAM v2 interpolates probabilities, all others logits.

    Args:
      low_res_logits: [..., h, w] of one image; a NumPy array gives NumPy arrays.
      valid_shape: (h, w) of the image on the stored grid, from `resize_image`.
      original_shape: (H, W) of the image.
      return_logits: return the interpolated logits, float32 [..., H, W], instead of the mask; where
        probabilities are interpolated, the logits of those.
    """
    recipe = get_recipe(preprocessing.recipe)
    maps = low_res_logits
    xp = jnp if isinstance(maps, jax.Array) else np
    if preprocessing.upsample == "probabilities":
        maps = (xp.tanh(maps / 2) + 1) / 2  # the sigmoid, without overflow
    if recipe.geometry == "pad":
        maps = _resize_bilinear(maps, recipe.size, recipe.size)
        maps = maps[..., : int(valid_shape[0]), : int(valid_shape[1])]
    maps = _resize_bilinear(maps, int(original_shape[0]), int(original_shape[1]))
    if preprocessing.upsample == "probabilities":
        maps = xp.clip(maps, 1e-7, 1 - 1e-7)
        maps = xp.log(maps / (1 - maps))
    return maps if return_logits else maps > preprocessing.mask_threshold


def check_compatible(dataset_info: Any, preprocessing: Preprocessing) -> None:
    """Raises UserError for a data set, which has a `.recipe`, of another one than the model's."""
    if dataset_info.recipe != preprocessing.recipe:
        raise UserError(
            f"recipe: the data set was built with {dataset_info.recipe!r}, the checkpoint's "
            f"preprocessing is {preprocessing.recipe!r}; build the data again with "
            f"medsam-jax build --recipe {preprocessing.recipe}"
        )
