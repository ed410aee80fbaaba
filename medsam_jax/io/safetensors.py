"""Reads safetensors files with their library, and writes them tensor by tensor.

The library's writer needs all tensors in memory and sorts them. The format is a JSON header and the
bytes. The writer here keeps the order and holds one tensor in memory.
"""

import functools
import json
import struct
from collections.abc import Mapping

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.tensors import DTYPE_NAMES, DTYPES, LazyTensor, TensorFile, reading


def read_safetensors(path: str) -> TensorFile:
    """Reads names, shapes and types; values are read on demand, each as a copy.

    Raises:
      UserError: not a safetensors file, damaged, or an element type that no SAM has.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        names = file.offset_keys()
        slices = {name: file.get_slice(name) for name in names}
        described = {name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path}: not a readable safetensors file ({reason})") from None
    strangers = sorted({dtype for _, dtype in described.values()} - set(DTYPES))
    if strangers or not described:
        what = f"elements of type {', '.join(strangers)}" if strangers else "no tensors"
        raise UserError(f"{path}: holds {what}; expected the weights of a SAM")

    tensors = {
        name: LazyTensor(tuple(shape), DTYPES[dtype], functools.partial(_read, file, path, name))
        for name, (shape, dtype) in described.items()
    }
    return TensorFile(path, "safetensors", tensors)


def _read(file, path: str, name: str) -> np.ndarray:
    from safetensors import SafetensorError

    try:
        return file.get_tensor(name)
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {ascii(name)} cannot be read ({error})") from None


def write_safetensors(path: str, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes `tensors` in their order to `path`; an existing file is overwritten."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = position + tensor.size * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in reading(tensors, "writing .safetensors"):
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8))
