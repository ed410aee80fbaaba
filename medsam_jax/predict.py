"""Masks of pictures, slices and volumes, written beside overlays and a record of each object.

Examples:
  python -m medsam_jax.predict --checkpoint lite_medsam --image photo.png --box 20,30,180,160 \\
      --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image ct.nii.gz --modality CT \\
      --slice 40 --box 160,120,260,210 --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image scans --prompts prompts.json \\
      --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image dicom_series \\
      --prompt_mask rough.nii.gz --follow off --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image photo.png --auto --output results

Every --box is an object; all --point together are one. In a volume these lie on --slice and the
object is followed to both sides (--follow). A JSON file names images and holds prompts for each:
{"ct.nii.gz": [{"label": 5, "name": "liver", "slice": 40, "box": [160, 120, 260, 210]}]}, or
{"modality": "CT", "window": "lung", "prompts": [...]} for an image.

Writes NAME_mask in the format and on the grid of the input (a DICOM SEG for a DICOM series),
NAME_overlay.png, NAME_montage.png for volumes, NAME.json with scores, sizes and diameters, and
coco.json for pictures. A folder run goes on where it stopped and ends with a list of what failed.
Several processes (--multihost, see docs/training.md) share a folder, each image once.
"""

from pathlib import Path

from absl import flags, logging

from medsam_jax import cli, errors
from medsam_jax.distributed import define_flags
from medsam_jax.io.files import keep_compiled_programs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Checkpoint directory or name of known weights.", required=True
)
_IMAGE = flags.DEFINE_string(
    "image", None, "Image file, DICOM series folder, or a folder of these.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
_BOX = flags.DEFINE_multi_string("box", [], "x0,y0,x1,y1 in pixels of the slice; one per object.")
_POINT = flags.DEFINE_multi_string("point", [], "x,y,label; label 1 is the object, 0 is not.")
_PROMPTS = flags.DEFINE_string("prompts", None, "JSON file of prompts by image; see above.")
_PROMPT_MASK = flags.DEFINE_string(
    "prompt_mask",
    None,
    "Mask whose labels are prompted by their boxes, slice by slice; for a folder of images, a "
    "folder of masks named as the images.",
)
_LABELS = flags.DEFINE_list(
    "labels",
    [],
    "Names of the labels of --prompt_mask, e.g. 1=liver,2=tumour; by default those of a DICOM SEG.",
)
_AUTO = flags.DEFINE_bool("auto", False, "Find all objects of a picture or slice, without prompts.")
_AUTO_SETTINGS = {
    name: define(name, None, f"--auto: {text}; by default the checkpoint's own.")
    for name, define, text in (
        ("points_per_side", flags.DEFINE_integer, "side of the grid of points"),
        ("pred_iou_thresh", flags.DEFINE_float, "least predicted IoU, 0 to 1"),
        ("stability_score_thresh", flags.DEFINE_float, "least stability, 0 to 1"),
        ("box_nms_thresh", flags.DEFINE_float, "box IoU above which the worse mask is dropped"),
        ("crop_n_layers", flags.DEFINE_integer, "layers of crops, layer i has 4 ** i"),
        ("min_mask_region_area", flags.DEFINE_integer, "smaller holes and islands go, pixels"),
    )
}
_MODALITY = flags.DEFINE_string(
    "modality", None, "CT means Hounsfield units; else MR, US, ... DICOM files say it themselves."
)
_WINDOW = flags.DEFINE_string(
    "window", None, "CT window, e.g. lung; by default the one the checkpoint was trained on."
)
_SLICE = flags.DEFINE_integer("slice", None, "Slice of a volume that the prompts lie on, from 0.")
_FOLLOW = flags.DEFINE_string(
    "follow",
    "propagate",
    "Slices without prompts: propagate from others, interpolate boxes, or off.",
)
_LARGEST = flags.DEFINE_bool(
    "largest_component", False, "Keep the largest connected part of each object."
)
_HOLES = flags.DEFINE_bool("fill_holes", False, "Fill what an object encloses.")
_FORMAT = flags.DEFINE_string(
    "mask_format", None, "Instead of the input's own: nii.gz, nii, nrrd, mha, png, tif or dcm."
)
_GIF = flags.DEFINE_bool("gif", False, "Also write a GIF of a volume's slices.")
_JOIN_PROCESSES = define_flags()


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    with cli.loading():
        keep_compiled_programs()
        from medsam_jax.inference.predict_file import Request
        from medsam_jax.inference.predict_folder import predict_path

    _JOIN_PROCESSES()
    predict_path(
        Request(
            checkpoint=_CHECKPOINT.value,
            image=_IMAGE.value,
            output=Path(_OUTPUT.value),
            boxes=[_numbers("--box", text, "x0,y0,x1,y1") for text in _BOX.value],
            points=[_numbers("--point", text, "x,y,label") for text in _POINT.value],
            prompts=_PROMPTS.value,
            prompt_mask=_PROMPT_MASK.value,
            label_names=_LABELS.value,
            auto=_AUTO.value,
            auto_settings={
                name: flag.value for name, flag in _AUTO_SETTINGS.items() if flag.value is not None
            },
            modality=_MODALITY.value,
            window=_WINDOW.value,
            slice_index=_SLICE.value,
            follow=_FOLLOW.value,
            largest_component=_LARGEST.value,
            fill_holes=_HOLES.value,
            mask_format=_FORMAT.value,
            gif=_GIF.value,
        )
    )


def _numbers(flag: str, text: str, form: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(form.split(",")):
        raise errors.UserError(f"{flag}: {text!r}; give {form}, numbers with commas between")
    return numbers


if __name__ == "__main__":
    cli.run(main)
