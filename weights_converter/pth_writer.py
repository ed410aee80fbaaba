"""Writes a state dict in the zip format of `torch.save`, without torch.

The result loads with `torch.load(weights_only=True)` and memory-maps with `mmap=True`: members are
stored, 64-byte aligned and named as PyTorch names them. Tensors are read and written one at a time.
"""

import math
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from medsam_jax.io.tensors import LazyTensor, reading

_ALIGNMENT = 64
_ROOT = "archive"
_STORAGE_TYPES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage",
    np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


def write_pth(path: str, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes `tensors` in their order to `path`; an existing file is overwritten."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_member(archive, "data.pkl", _pickle(tensors))
        _write_member(archive, "byteorder", b"little")
        for key, tensor in enumerate(reading(tensors, "writing .pth")):
            values = np.ascontiguousarray(tensor.read())
            _write_member(archive, f"data/{key}", values.reshape(-1).view(np.uint8))
        _write_member(archive, "version", b"3\n")


def _write_member(archive: zipfile.ZipFile, name: str, data: bytes | np.ndarray) -> None:
    # The date is fixed, so that equal tensors give equal files.
    info = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    start = archive.fp.tell() + 30 + len(info.filename) + 4  # 4: header of the padding field
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    archive.writestr(info, memoryview(data))


def _pickle(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Returns the protocol 2 pickle of an `OrderedDict` from name to tensor."""
    ordered_dict = _name("collections", "OrderedDict") + b")R"
    parts = [b"\x80\x02", ordered_dict, b"("]
    for key, (name, tensor) in enumerate(tensors.items()):
        storage = (
            b"("
            + _text("storage")
            + _name("torch", _STORAGE_TYPES[tensor.dtype])
            + _text(str(key))
            + _text("cpu")
            + _integer(tensor.size)
            + b"tQ"
        )
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        arguments = (
            b"(" + storage + _integer(0) + _integers(tensor.shape) + _integers(strides)
        ) + (b"\x89" + ordered_dict + b"t")
        parts += [_text(name), _name("torch._utils", "_rebuild_tensor_v2"), arguments, b"R"]
    return b"".join([*parts, b"u."])


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
