"""Writes small synthetic scans, masks and manifests."""

import csv

import numpy as np
import SimpleITK as sitk
from PIL import Image

SIDE = 40


def write_volume(path, array, spacing=(0.8, 0.9, 3.0)):
    """[Z, Y, X] with spacing in (x, y, z) order."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def write_manifest(path, rows, header="case_id,image,mask,modality,task,split"):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def ball(depth, centre, radius):
    z, y, x = np.mgrid[:depth, :SIDE, :SIDE]
    away = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
    return away <= radius**2


def make_ct(folder, name, depth=8, seed=0):
    """Two organs: label 1 from slice 2 to the last, label 300 in slices 3 to 5."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((depth, SIDE, SIDE), np.uint16)
    labels[2:, 5:17, 6:20] = 1
    labels[3:6, 22:34, 22:34] = 300
    array = rng.normal(0, 30, labels.shape) - 900 * (labels == 0) + 200 * (labels == 300)
    write_volume(folder / f"{name}.nii.gz", array.astype(np.int16))
    write_volume(folder / f"{name}_mask.nii.gz", labels)


def make_mr(folder, name, seed=0):
    """Acquired sagittally: thick slices along the x axis of the array."""
    rng = np.random.default_rng(seed)
    labels = np.moveaxis(ball(9, (4, 20, 20), 9), 0, 2).astype(np.uint8)
    array = (rng.gamma(2, 60, labels.shape) + 300.0 * labels).astype(np.float32)
    write_volume(folder / f"{name}.nrrd", array, (4.0, 1.1, 0.7))
    write_volume(folder / f"{name}_mask.nrrd", labels, (4.0, 1.1, 0.7))


def make_picture(folder, name, colour, seed=0):
    rng = np.random.default_rng(seed)
    shape = (60, 90, 3) if colour else (60, 90)
    labels = np.zeros((60, 90), np.uint8)
    labels[10:30, 20:50] = 1
    labels[40:52, 60:85] = 1
    Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(labels).save(folder / f"{name}_mask.png")
