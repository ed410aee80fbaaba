"""Packed arrays of the nnInteractive remote protocol, read with bounds and written.

An array is `NNIA`, a version byte, a codec byte, the number of axes, the length of the type's name,
that name, each side as int64, and the number of chunks as uint32; each chunk is its raw and its
packed length as uint64 and a blosc2 frame. All numbers are little-endian.
"""

import math
import struct

import blosc2
import numpy as np

from medsam_jax.errors import UserError

MAGIC, VERSION = b"NNIA", 1
_CODECS = {1: blosc2.Codec.ZSTD, 2: blosc2.Codec.LZ4}
_TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
_TYPES += ("float16", "float32", "float64")
_MOST_AXES = 4
_CHUNK = 1 << 30  # bytes before packing; blosc2 takes less than 2 GiB
_FRAME_HEADER = 32  # bytes that every blosc2 frame has


class TooLargeError(UserError):
    """A request that is above a limit of the server."""


def pack(array: np.ndarray) -> bytes:
    """Returns a packed array, as the protocol's clients read it."""
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    name = array.dtype.name.encode("ascii")
    head = struct.pack("<4sBBBB", MAGIC, VERSION, 1, array.ndim, len(name)) + name
    raw, chunks = memoryview(array.reshape(-1)).cast("B"), []
    for start in range(0, array.nbytes, _CHUNK):
        part = raw[start : start + _CHUNK]
        # The true item size: blosc2 cannot read back zeros whose length is no multiple of it.
        packed = blosc2.compress2(
            part,
            typesize=array.dtype.itemsize,
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            filters=[blosc2.Filter.NOFILTER],
        )
        chunks.append(struct.pack("<QQ", len(part), len(packed)) + packed)
    shape = struct.pack(f"<{array.ndim}q", *array.shape)
    return b"".join([head, shape, struct.pack("<I", len(chunks)), *chunks])


def unpack(body: bytes, most_bytes: int) -> np.ndarray:
    """Returns the array of a packed body.

    Raises:
      TooLargeError: it would have more than `most_bytes` bytes; none of them was made.
      UserError: damaged, or of a type or shape that the protocol does not have.
    """
    try:
        dtype, shape, offset = _read_head(body)
        (chunks,) = struct.unpack_from("<I", body, offset)
    except (struct.error, UnicodeDecodeError):
        raise UserError("packed array: its head is cut off; send it again") from None
    size = math.prod(shape) * dtype.itemsize
    if size > most_bytes:
        raise TooLargeError(
            f"packed array: shape {list(shape)} of {dtype} is {size:,} bytes; the limit is "
            f"{most_bytes:,}"
        )
    frames = _frames(body, offset + 4, chunks, size, dtype.itemsize)
    flat, start = np.empty(math.prod(shape), dtype), 0
    for frame, length in frames:
        stop = start + length // dtype.itemsize
        try:
            blosc2.decompress2(frame, dst=flat[start:stop])
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"packed array: a chunk is damaged ({error}); send it again") from None
        start = stop
    return flat.reshape(shape)


def array_type(name: str) -> np.dtype:
    """Returns the type of that name. Raises UserError for one that the protocol does not have."""
    if name not in _TYPES:
        raise UserError(f"type: {name[:80]!r}; use one of {', '.join(_TYPES)}")
    return np.dtype(name)


def _read_head(body: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """Returns type, shape and the offset behind them."""
    magic, version, codec, ndim, length = struct.unpack_from("<4sBBBB", body)
    if magic != MAGIC or version != VERSION or codec not in _CODECS:
        raise UserError(
            f"packed array: starts with {magic!r}, version {version}, codec {codec}; give "
            f"{MAGIC!r}, {VERSION} and one of {sorted(_CODECS)}"
        )
    if not 1 <= ndim <= _MOST_AXES:
        raise UserError(f"packed array: {ndim} axes; give 1 to {_MOST_AXES}")
    name = body[8 : 8 + length].decode("ascii")
    dtype = array_type(name)
    shape = struct.unpack_from(f"<{ndim}q", body, 8 + length)
    if min(shape) < 1:
        raise UserError(f"packed array: shape {list(shape)}; every side has at least one element")
    return dtype, shape, 8 + length + 8 * ndim


def _frames(
    body: bytes, offset: int, chunks: int, size: int, itemsize: int
) -> list[tuple[memoryview, int]]:
    """Returns each chunk's frame and raw length, all lengths checked before any is unpacked."""
    view, frames, total = memoryview(body), [], 0
    while len(frames) < chunks:
        if offset + 16 > len(body):
            raise UserError("packed array: a chunk is missing; send it again")
        raw, packed = struct.unpack_from("<QQ", body, offset)
        frame = view[offset + 16 : offset + 16 + packed]
        if len(frame) < max(packed, _FRAME_HEADER) or raw % itemsize or not 0 < raw <= size - total:
            raise UserError("packed array: a chunk's lengths are wrong; send it again")
        if blosc2.get_cbuffer_sizes(frame)[:2] != (raw, packed):
            raise UserError("packed array: a chunk's frame has another length; send it again")
        frames.append((frame, raw))
        offset, total = offset + 16 + packed, total + raw
    if total != size or offset != len(body):
        raise UserError(f"packed array: {total:,} bytes in its chunks, {size:,} in its shape")
    return frames
