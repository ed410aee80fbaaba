"""Masks for prompts on a picture, a slice or a volume, written beside an overlay and their scores.

Examples:
  python -m medsam_jax.predict --checkpoint lite_medsam --image photo.png --box 20,30,180,160 \\
      --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image ct.nii.gz --modality CT \\
      --slice 40 --box 160,120,260,210 --output results
  python -m medsam_jax.predict --checkpoint lite_medsam --image photo.png --auto --output results

Every --box is an object; all --point together are one. In a volume the prompts lie on --slice and
objects are followed to both sides. Writes NAME_mask (label i is the i-th object) in the format and
on the grid of the input, NAME_overlay.png and NAME.json.
"""

from pathlib import Path

from absl import flags, logging

from medsam_jax import errors
from medsam_jax.cache import keep_compiled_programs

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Checkpoint directory or name of known weights.", required=True
)
_IMAGE = flags.DEFINE_string(
    "image", None, "Image file of any known format, or a DICOM series folder.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write to.", required=True)
_BOX = flags.DEFINE_multi_string("box", [], "x0,y0,x1,y1 in pixels of the slice; one per object.")
_POINT = flags.DEFINE_multi_string("point", [], "x,y,label; label 1 is the object, 0 is not.")
_AUTO = flags.DEFINE_bool("auto", False, "Find all objects of a picture or slice, without prompts.")
_MODALITY = flags.DEFINE_string("modality", None, "CT means Hounsfield units; else MR, US, ...")
_WINDOW = flags.DEFINE_string("window", None, "CT window of the checkpoint's recipe, e.g. lung.")
_SLICE = flags.DEFINE_integer("slice", None, "Slice of a volume that the prompts lie on, from 0.")
_PROPAGATE = flags.DEFINE_bool("propagate", True, "Follow objects through the volume.")


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    keep_compiled_programs()
    from medsam_jax.inference.files import Request, predict_file

    predict_file(
        Request(
            checkpoint=_CHECKPOINT.value,
            image=_IMAGE.value,
            output=Path(_OUTPUT.value),
            boxes=[_numbers("--box", text, 4) for text in _BOX.value],
            points=[_numbers("--point", text, 3) for text in _POINT.value],
            auto=_AUTO.value,
            modality=_MODALITY.value,
            window=_WINDOW.value,
            slice_index=_SLICE.value,
            propagate=_PROPAGATE.value,
        )
    )


def _numbers(flag: str, text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise errors.UserError(f"{flag}: {text!r}; give {count} numbers with commas between")
    return numbers


if __name__ == "__main__":
    errors.run(main)
