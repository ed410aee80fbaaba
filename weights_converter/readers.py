"""Opens a checkpoint file, or that in a folder of the hub; first bytes identify the format."""

import dataclasses
import json
import os
from pathlib import Path

from medsam_jax.errors import UserError
from medsam_jax.io.safetensors import read_safetensors
from medsam_jax.io.tensors import TensorFile
from weights_converter import names
from weights_converter.pth_reader import read_pth

_INDEX = ".index.json"  # of a checkpoint in several files, as transformers writes it
_HUB_FILES = ("model.safetensors", f"model.safetensors{_INDEX}", "pytorch_model.bin")
_HUB_FILES += (f"pytorch_model.bin{_INDEX}",)
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")


def read_file(path: str) -> TensorFile:
    """Reads names, shapes and types of a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    Also reads the files that a `.index.json` names. What training wrappers add to all names comes
    off, see `names.unwrapped`.

    Raises:
      UserError: the file does not exist or is not a readable checkpoint.
    """
    file = _read_index(path) if path.endswith(_INDEX) else _read(path)
    renamed, prefix = names.unwrapped(file.tensors)
    tensors = {renamed[name]: tensor for name, tensor in file.tensors.items()}
    return dataclasses.replace(file, tensors=tensors, prefix=file.prefix + prefix)


def file_in(path: str) -> str:
    """Returns the file of weights in a folder that is no checkpoint directory; else the path.

    Raises:
      UserError: the folder holds several, and none has transformers' name.
    """
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, "model.json")):
        return path
    inside = sorted(os.listdir(path))
    found = [name for name in _HUB_FILES if name in inside]
    found = found or [name for name in inside if name.endswith(_SUFFIXES)]
    if len(found) > 1 and found[0] not in _HUB_FILES:
        raise UserError(f"{path}: holds {', '.join(found[:5])}; name one of these files")
    return os.path.join(path, found[0]) if found else path


def _read(path: str) -> TensorFile:
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # safetensors: 8 bytes of header length, then JSON. For damaged files the suffix decides.
    if head[8:9] == b"{" or Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    return read_pth(path)


def _read_index(path: str) -> TensorFile:
    try:
        places = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        files = {
            name: _read(str(Path(path).parent / name)) for name in sorted(set(places.values()))
        }
        tensors = {name: files[place].tensors[name] for name, place in places.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: does not list the tensors of its files ({error!r}); get the folder again"
        ) from None
    if not files:
        raise UserError(f"{path}: lists no tensors; get the folder again")
    return TensorFile(path, f"{next(iter(files.values())).format}, {len(files)} files", tensors)
