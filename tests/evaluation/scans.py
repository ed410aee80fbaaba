"""Writes small scans with known objects, and manifests of them."""

import csv

import numpy as np
import SimpleITK as sitk

SPACING = (3.0, 0.8, 0.9)  # z, y, x


def ball(shape, centre, radius):
    grids = np.ogrid[tuple(slice(n) for n in shape)]
    parts = zip(grids, centre, SPACING, strict=True)
    return sum(((grid - c) * s) ** 2 for grid, c, s in parts) <= radius**2


def write(path, array, spacing=SPACING):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))


def write_manifest(path, rows, extra=()):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["case_id", "image", "mask", "modality", "task", *extra], *rows]
        )
    return path
