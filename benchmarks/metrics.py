"""Rows that compare the surface metrics with surface-distance and MONAI on the same masks."""

from collections.abc import Sequence

import numpy as np

from benchmarks.harness import Contender, Row, Work

TOLERANCE = 2.0


def ellipsoids(
    shape: Sequence[int], semi_axes: Sequence[float], count: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pairs [count, *shape] of an ellipsoid and its copy, moved by three pixels."""
    centres = np.random.default_rng(0).uniform(-4, 4, (count, len(shape))) + np.array(shape) / 2
    grids = np.ogrid[tuple(slice(n) for n in shape)]
    masks = [
        sum(((g - c) / a) ** 2 for g, c, a in zip(grids, centre, semi_axes, strict=True)) <= 1
        for centre in centres
    ]
    target = np.stack(masks)
    return np.roll(target, 3, axis=-1), target


def numpy_nsd(shape, semi_axes, spacing, repeats=1) -> Work:
    """Runs our NSD in NumPy."""
    from medsam_jax.metrics import normalized_surface_dice

    (pred,), (target,) = ellipsoids(shape, semi_axes)

    def run(index):
        for _ in range(repeats):
            score = normalized_surface_dice(pred, target, spacing, TOLERANCE)
        return np.array([score])

    return Work(run, bytes=2 * repeats * pred.nbytes)


def surface_distance_nsd(shape, semi_axes, spacing, repeats=1) -> Work:
    """Runs DeepMind's package, with the aliases that NumPy and SciPy have removed."""
    metrics = _surface_distance()
    (pred,), (target,) = ellipsoids(shape, semi_axes)

    def run(index):
        for _ in range(repeats):
            distances = metrics.compute_surface_distances(target, pred, spacing)
            score = metrics.compute_surface_dice_at_tolerance(distances, TOLERANCE)
        return np.array([score])

    return Work(run)


def numpy_dice(shape, semi_axes) -> Work:
    """Runs our Dice in NumPy."""
    from medsam_jax.metrics import dice

    (pred,), (target,) = ellipsoids(shape, semi_axes)
    return Work(lambda index: np.array([dice(pred, target)]), bytes=2 * pred.nbytes)


def surface_distance_dice(shape, semi_axes) -> Work:
    metrics = _surface_distance()
    (pred,), (target,) = ellipsoids(shape, semi_axes)
    return Work(lambda index: np.array([metrics.compute_dice_coefficient(target, pred)]))


def monai_dice(shape, semi_axes, count=1) -> Work:
    """Runs MONAI's `compute_dice` on one or several pairs."""
    import torch
    from monai.metrics import compute_dice

    pred, target = (torch.from_numpy(m)[:, None] for m in ellipsoids(shape, semi_axes, count))
    return Work(lambda index: compute_dice(pred, target)[:, 0].numpy(), items=count)


def jitted_dice(shape, semi_axes, count) -> Work:
    """Runs our jitted Dice on masks that are on the device."""
    import jax.numpy as jnp

    from medsam_jax.metrics import dice_batch

    pred, target = map(jnp.asarray, ellipsoids(shape, semi_axes, count))
    return Work(
        lambda index: dice_batch(pred, target).block_until_ready(),
        bytes=2 * pred.nbytes,
        items=count,
    )


def numpy_distances(shape, semi_axes, spacing) -> Work:
    """Runs our HD95."""
    from medsam_jax.metrics import hausdorff_distance

    (pred,), (target,) = ellipsoids(shape, semi_axes)
    return Work(
        lambda index: np.array([hausdorff_distance(pred, target, spacing)]), bytes=2 * pred.nbytes
    )


def surface_distance_distances(shape, semi_axes, spacing) -> Work:
    """Runs DeepMind's robust Hausdorff distance."""
    metrics = _surface_distance()
    (pred,), (target,) = ellipsoids(shape, semi_axes)

    def run(index):
        distances = metrics.compute_surface_distances(target, pred, spacing)
        return np.array([metrics.compute_robust_hausdorff(distances, 95)])

    return Work(run)


def jitted_batch(size, radius, count) -> Work:
    """Runs our jitted NSD on masks that are on the device."""
    import jax.numpy as jnp

    from medsam_jax.metrics import nsd_batch

    pred, target = map(jnp.asarray, ellipsoids((size, size), (radius, radius), count))
    return Work(
        lambda index: nsd_batch(pred, target, (1.0, 1.0), TOLERANCE).block_until_ready(),
        bytes=2 * pred.nbytes,
        items=count,
    )


def surface_distance_batch(size, radius, count) -> Work:
    metrics = _surface_distance()
    pairs = list(zip(*ellipsoids((size, size), (radius, radius), count), strict=True))

    def run(index):
        scores = []
        for pred, target in pairs:
            distances = metrics.compute_surface_distances(target, pred, (1, 1))
            scores.append(metrics.compute_surface_dice_at_tolerance(distances, TOLERANCE))
        return np.array(scores)

    return Work(run, items=count)


def monai_batch(size, radius, count) -> Work:
    """Runs MONAI's `compute_surface_dice` with sub-voxel elements: the same definition."""
    import torch
    from monai.metrics import compute_surface_dice

    pred, target = (
        torch.from_numpy(masks)[:, None].float()
        for masks in ellipsoids((size, size), (radius, radius), count)
    )

    def run(index):
        scores = compute_surface_dice(
            pred,
            target,
            [TOLERANCE],
            include_background=True,
            spacing=(1.0, 1.0),
            use_subvoxels=True,
        )
        return scores[:, 0].numpy()

    return Work(run, items=count)


def _surface_distance():
    from scipy import ndimage

    np.NaN, np.Inf = np.nan, np.inf
    ndimage.filters = ndimage.morphology = ndimage
    from surface_distance import metrics

    return metrics


def _pair(ours: str, theirs: str, arguments: dict) -> tuple[Contender, Contender]:
    return (
        Contender("medsam_jax", f"benchmarks.metrics:{ours}", arguments),
        Contender("surface-distance", f"benchmarks.metrics:{theirs}", arguments),
    )


def _object(shape, semi_axes, spacing, target: float, repeats: int = 1) -> Row:
    arguments = {"shape": shape, "semi_axes": semi_axes, "spacing": spacing, "repeats": repeats}
    name = f"NSD, one object in {' x '.join(map(str, shape))}"
    name += f", {repeats} times" if repeats > 1 else ""
    contenders = _pair("numpy_nsd", "surface_distance_nsd", arguments)
    return Row(name, "cpu", contenders, {"surface-distance": target}, tolerance=1e-6)


def _batch(suite: str) -> Row:
    arguments = {"size": 256, "radius": 60, "count": 64}
    contenders = (
        Contender("medsam_jax", "benchmarks.metrics:jitted_batch", arguments),
        Contender("surface-distance", "benchmarks.metrics:surface_distance_batch", arguments),
        Contender("MONAI", "benchmarks.metrics:monai_batch", arguments),
    )
    targets = {"surface-distance": 0.1, "MONAI": 0.1}
    return Row("NSD, 64 masks of 256 x 256, jitted", suite, contenders, targets, tolerance=1e-5)


def _dice(name: str, ours: str, arguments: dict, theirs: tuple[str, ...], **options) -> Row:
    names = {"surface_distance_dice": "surface-distance", "monai_dice": "MONAI"}
    contenders = [Contender("medsam_jax", f"benchmarks.metrics:{ours}", arguments)]
    contenders += [Contender(names[f], f"benchmarks.metrics:{f}", arguments) for f in theirs]
    return Row(name, "cpu", tuple(contenders), tolerance=1e-6, **options)


VOLUME = {"shape": (64, 512, 512), "semi_axes": (20, 80, 80), "spacing": (3.0, 0.7, 0.7)}
ROWS = (
    _object(**VOLUME, target=0.2),
    _object((64, 256, 256), (20, 60, 60), (1.0, 1.0, 1.0), 0.2),
    _object((1024, 1024), (300, 300), (1.0, 1.0), 0.2),
    _object((256, 256), (60, 60), (1.0, 1.0), 1.0, repeats=20),
    _object((16, 16, 16), (5, 5, 5), (1.0, 1.0, 1.0), 1.0, repeats=50),
    _object((16, 16), (5, 5), (1.0, 1.0), 1.0, repeats=200),
    Row(
        "HD95, one object in 64 x 512 x 512",
        "cpu",
        _pair("numpy_distances", "surface_distance_distances", VOLUME),
        {"surface-distance": 1.0},
        tolerance=1e-6,
    ),
    _batch("cpu"),
    _dice(
        "DSC, one object in 64 x 512 x 512",
        "numpy_dice",
        {"shape": VOLUME["shape"], "semi_axes": VOLUME["semi_axes"]},
        ("surface_distance_dice", "monai_dice"),
    ),
    _dice(
        "DSC, 64 masks of 256 x 256, jitted",
        "jitted_dice",
        {"shape": (256, 256), "semi_axes": (60, 60), "count": 64},
        ("monai_dice",),
    ),
    _batch("gpu"),
)
