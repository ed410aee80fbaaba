"""Imports, exports or describes a SAM checkpoint.

python -m weights_converter.convert --input lite_medsam --output weights/lite_medsam
python -m weights_converter.convert --input sam_vit_b_01ec64.pth --output weights/sam_vit_b
python -m weights_converter.convert --input weights/tuned --output tuned.pth --format pth
python -m weights_converter.convert --input unknown.pth --inspect
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags, logging

from medsam_jax.cli import run
from medsam_jax.errors import UserError
from medsam_jax.io.files import check_writable, write_whole
from medsam_jax.io.safetensors import write_safetensors
from weights_converter import contract, conversion, names, readers
from weights_converter.architectures import ARCHITECTURES
from weights_converter.inspection import inspect
from weights_converter.opening import open_checkpoint
from weights_converter.pth_writer import write_pth
from weights_converter.registry import REGISTRY, by_sha256

_WRITERS: dict[str, Callable] = {"pth": write_pth, "safetensors": write_safetensors}

_INPUT = flags.DEFINE_string(
    "input",
    None,
    "a .pth or .safetensors file, a checkpoint directory, a folder of the hub, or known weights by "
    "name: " + ", ".join(REGISTRY),
)
_OUTPUT = flags.DEFINE_string("output", None, "directory (orbax) or file to write")
_MODEL = flags.DEFINE_enum(
    "model",
    "auto",
    ["auto", *REGISTRY, *(name for name in ARCHITECTURES if name not in REGISTRY)],
    "what a file holds, where its tensors do not tell: MedSAM's ViT-B looks like SAM's, but wants "
    "other preprocessing",
)
_FORMAT = flags.DEFINE_enum("format", "orbax", ["orbax", *_WRITERS], "what to write")
_NAMING = flags.DEFINE_enum(
    "naming", names.SEGMENT_ANYTHING, list(names.NAMINGS), "tensor names of a written file"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing output, when complete")
_INSPECT = flags.DEFINE_bool("inspect", False, "print what the input is; write nothing")


def convert(
    source: str,
    output: str,
    model: str = "auto",
    format: str = "orbax",
    naming: str = names.SEGMENT_ANYTHING,
    overwrite: bool = False,
) -> None:
    """Converts one checkpoint; the arguments are those of the command line.

    Raises:
      UserError: the input is invalid, or the output exists. No partial output remains, and an
        existing output is not changed.
    """
    _demand_free(output, format, overwrite)
    state = open_checkpoint(source, model)
    if state.source.get("prefix") and not os.path.isdir(source):
        print(f"{source}: took {state.source['prefix']!r} off the tensors' names", file=sys.stderr)
    if note := _assumed(source, model, state):
        print(note, file=sys.stderr)
    if format == "orbax":
        conversion.save_directory(state, output, overwrite)
        return
    tensors = conversion.in_naming(state, naming)

    def write(partial: Path) -> None:
        _WRITERS[format](str(partial), tensors)
        contract.write(Path(output), partial, state.config, state.metadata)

    write_whole(Path(output), write)


def _assumed(source: str, model: str, state: conversion.StateDict) -> str:
    """Returns a line that says what a file does not tell and is assumed, else ""."""
    path = readers.file_in(source)
    if model != "auto" or not os.path.isfile(path) or contract.beside(path).exists():
        return ""
    if by_sha256(state.source["sha256"]):
        return ""
    taken = contract.lines(state.config)
    names = "preprocessing", "mask threshold", "automatic prompts", "CT windows trained on"
    found = "; ".join(f"{name}: {taken[name]}" for name in names)
    return (
        f"note: {path}: no known file, and no {contract.beside(path).name} beside it with its "
        f"contract. Assumed: {found}; licence: unknown"
    )


def _demand_free(output: str, format: str, overwrite: bool) -> None:
    path = Path(output)
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists; choose another --output, or give --overwrite")
    note = contract.beside(path)
    if format != "orbax" and note.exists() and not overwrite:
        raise UserError(f"{note}: exists; choose another --output, or give --overwrite")
    if path.exists() and path.is_dir() != (format == "orbax"):
        kind = "a directory" if path.is_dir() else "a file"
        raise UserError(f"{path}: {kind}, which --format {format} cannot replace; remove it first")
    check_writable(path.parent)


def main(argv: Sequence[str]) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports each of its steps
    if not _INPUT.value:
        raise UserError("--input is missing: a file, a checkpoint directory or a known name")
    if _INSPECT.value:
        print(inspect(_INPUT.value, _MODEL.value))
        return
    if not _OUTPUT.value:
        raise UserError("--output is missing: where to write (or --inspect to only look)")
    print(f"converting {_INPUT.value} to {_OUTPUT.value}", file=sys.stderr, flush=True)
    convert(
        _INPUT.value,
        _OUTPUT.value,
        _MODEL.value,
        _FORMAT.value,
        _NAMING.value,
        _OVERWRITE.value,
    )
    also = "" if _FORMAT.value == "orbax" else f" and {contract.beside(_OUTPUT.value)}"
    print(f"wrote {_OUTPUT.value}{also}")


if __name__ == "__main__":
    run(main)
