"""Reads TIFF with tifffile: any sample type, planes, tiles, pages and photometric interpretation.

tifffile lacks LZW, ZSTD and the floating-point predictor without its optional codecs. Strips
compressed so are unpacked by Pillow's libtiff first, one at a time. Pages in a picture codec (JPEG,
CCITT fax, WebP) are read by Pillow whole.
"""

import contextlib
import io
import logging
import math
import pathlib
import struct
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.pages import alpha_notes, colour_page, label_page, oriented, unoriented

_BYTE_CODECS = (5, 50000)  # LZW and ZSTD: compressed rows of bytes
_PICTURE_CODECS = (2, 3, 4, 6, 7, 33007, 34712, 50001)  # CCITT, JPEG, JPEG 2000, WebP
_CODECS = (1, 5, 8, 32946, 32773, 34925, 50000)  # none, LZW, Deflate, PackBits, LZMA, ZSTD
_LOSSY = (6, 7, 33007, 34712, 50001)
_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _SEPARATED, _YCBCR = 0, 1, 2, 3, 5, 6
_PILLOW_COLOURS = (_SEPARATED, _YCBCR)  # read by Pillow, which knows them
_PILLOW_BITS = (2, 4, 12)
_STRETCH = {2: 85, 4: 17}  # factor by which Pillow multiplies grey values of so many bits
_MOST_BYTES = 1 << 26  # of pixels that are never doubted
_MOST_RATIO = 4500  # pixel bytes for each byte of a file; LZW and ZSTD stay below


def read_tiff(path: pathlib.Path, as_labels: bool) -> tuple[np.ndarray, tuple[str, ...], bool]:
    """Returns pages [Z, H, W] or [Z, H, W, 3], notes, and whether the compression is lossy.

    Raises:
      UserError: pages of different sizes, values that are neither grey, palette nor colours.
    """
    import tifffile

    with _no_errors(path):
        with tifffile.TiffFile(path) as file:
            kept, notes = _full_pages(path, file)
            for page in kept:
                _check_segments(path, page)
            is_packed = any(p.compression in _BYTE_CODECS or p.predictor == 3 for p in kept)
        with tifffile.TiffFile(_unpacked(path) if is_packed else path) as file:
            pages, alphas, lossy = [], [], False
            for page in _full_pages(path, file)[0]:
                array, alpha = _page(path, page, as_labels)
                pages.append(oriented(array, _tag(page, "Orientation", 1)))
                alphas.append(alpha)
                lossy |= int(page.compression) in _LOSSY
            if len(pages) == 1 and file.is_imagej:
                pages = _imagej_pages(path, file, pages)
    if any(page.shape != pages[0].shape for page in pages):
        raise UserError(f"{path}: pages of different sizes; save one picture a file")
    if any(page.dtype != pages[0].dtype for page in pages):
        raise UserError(f"{path}: pages of different types; save one picture a file")
    seen = [alpha for alpha in alphas if alpha is not None]
    if seen:
        notes += alpha_notes(np.concatenate([alpha.ravel() for alpha in seen]))
    return np.stack(pages), notes, lossy


def _full_pages(path: pathlib.Path, file: Any) -> tuple[list[Any], tuple[str, ...]]:
    """Returns the pages but thumbnails, pyramid levels and transparency masks, and a note."""
    pages, offsets = [], set()
    for page in file.pages:
        if page.offset in offsets:
            raise UserError(f"{path}: its pages lead in a circle; export it again")
        offsets.add(page.offset)
        pages.append(page.aspage())
    kept = [page for page in pages if not page.subfiletype & 0b101]
    if not kept:
        raise UserError(f"{path}: has no page of full resolution; export it again")
    axes = {axis for axis, size in _series_axes(file) if size > 1}
    if file.is_imagej or file.is_ome:
        for axis, meaning in (("C", "channels"), ("T", "time points")):
            if axis in axes:
                raise UserError(f"{path}: its pages are {meaning}, not slices; save one a file")
    if len(kept) == len(pages):
        return kept, ()
    left = len(pages) - len(kept)
    return kept, (f"{left} of {len(pages)} pages are thumbnails or smaller copies; left out.",)


def _series_axes(file: Any) -> list[tuple[str, int]]:
    if not (file.is_imagej or file.is_ome):
        return []
    series = file.series[0]
    return list(zip(series.axes, series.shape, strict=True))


def _imagej_pages(path: pathlib.Path, file: Any, pages: list[np.ndarray]) -> list[np.ndarray]:
    """Returns all slices of an ImageJ stack, which may describe only its first page."""
    count = int((file.imagej_metadata or {}).get("images", 1))
    if count <= 1:
        return pages
    stack = file.series[0].asarray()
    if stack.shape != (count, *pages[0].shape) or _tag(file.pages[0], "Orientation", 1) != 1:
        raise UserError(f"{path}: is an ImageJ stack of {count} images; save it as a plain TIFF")
    return list(stack)


def _page(path: pathlib.Path, page: Any, as_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a page as [H, W] or [H, W, 3] and its alpha."""
    photometric = int(page.photometric)
    codec, bits = int(page.compression), page.bitspersample
    if codec in _PICTURE_CODECS or photometric in _PILLOW_COLOURS or bits in _PILLOW_BITS:
        return _by_pillow(path, page, as_labels), None
    if photometric not in (_MINISWHITE, _MINISBLACK, _RGB, _PALETTE):
        raise UserError(
            f"{path}: its colours are {getattr(page.photometric, 'name', photometric)}; save it as "
            "RGB or grey"
        )
    if codec not in _CODECS or bits not in (1, 8, 16, 32, 64):
        raise UserError(
            f"{path}: {bits} bits, compressed as {getattr(page.compression, 'name', codec)}; save "
            "it with 8 or 16 bits, uncompressed or with Deflate"
        )
    if page.imagedepth > 1:
        raise UserError(
            f"{path}: a page is a volume (ImageDepth {page.imagedepth}); save slices as pages"
        )
    array = page.asarray()
    if page.planarconfig == 2 and page.samplesperpixel > 1:
        array = np.moveaxis(array, 0, -1)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: pixels are {array.dtype}; save integers or floats")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise UserError(f"{path}: a page has shape {array.shape}; save one picture a page")
    array, alpha = _without_alpha(path, page, array, 3 if photometric == _RGB else 1)
    if photometric == _PALETTE:
        array = array[..., 0] if as_labels else _coloured(page, array[..., 0])
    elif photometric == _RGB:
        array = _native(array)
    else:
        array = _grey(path, page, array[..., 0], as_labels)
    return array, alpha


def _without_alpha(
    path: pathlib.Path, page: Any, array: np.ndarray, colours: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the colours [H, W, 1 or 3] and alpha. Raises UserError for values that are neither.

    Colours that were multiplied by alpha are divided by it.
    """
    extra = array.shape[-1] - colours
    kinds = [int(kind) for kind in page.extrasamples]
    if extra == 0:
        return array, None
    if extra != 1 or kinds[:1] not in ([1], [2]) or array.dtype.kind == "b":
        raise UserError(
            f"{path}: has {array.shape[-1]} values a pixel, and the tag ExtraSamples does not say "
            "that one is alpha; save each channel as a file of its own"
        )
    array, alpha = array[..., :colours], array[..., colours]
    if kinds[0] == 1 and array.dtype.kind == "u":
        full = np.iinfo(array.dtype).max
        whole = array.astype(np.float64) * full / np.maximum(alpha, 1)[..., None]
        array = np.clip(np.rint(whole), 0, full).astype(array.dtype)
    return array, alpha


def _grey(path: pathlib.Path, page: Any, array: np.ndarray, as_labels: bool) -> np.ndarray:
    """Returns grey values: white is the largest, and 1 to 7 bits are stretched to 255."""
    bits = page.bitspersample
    if page.photometric == _MINISWHITE:
        if array.dtype.kind in "if":
            raise UserError(
                f"{path}: 0 is white (photometric interpretation) in pixels of {array.dtype}; save "
                "it with 0 as black"
            )
        array = ~array if array.dtype.kind == "b" else ((1 << bits) - 1) - array
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    if bits < 8 and not as_labels:
        array = array * np.uint8(255 // ((1 << bits) - 1))
    return _native(array)


def _coloured(page: Any, indices: np.ndarray) -> np.ndarray:
    """Returns the colours [H, W, 3] of palette indices; a palette holds 16 bits, rarely 8."""
    palette = np.asarray(page.colormap)
    if palette.max(initial=0) > 255:
        palette = palette >> 8
    return np.ascontiguousarray(palette.astype(np.uint8).T[indices])


def _native(array: np.ndarray) -> np.ndarray:
    """Returns an array in the machine's byte order; float16 becomes float32, bits 0 and 255."""
    if array.dtype.kind == "b":
        return array * np.uint8(255)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def _by_pillow(path: pathlib.Path, page: Any, as_labels: bool) -> np.ndarray:
    """Returns a page of up to 8 bits, or 12, as Pillow reads it, its orientation undone."""
    from PIL import Image

    bits, is_grey = page.bitspersample, page.samplesperpixel == 1
    if (bits > 8 and not (is_grey and bits == 12)) or page.extrasamples or page.samplesperpixel > 4:
        raise UserError(
            f"{path}: {page.samplesperpixel} values of {page.bitspersample} bits, compressed as "
            f"{page.compression.name}, colours {page.photometric.name}; save it as RGB or grey, "
            "uncompressed or with Deflate"
        )
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        image.seek(page.index)
        image.load()
        array = label_page(image) if as_labels else colour_page(image)
    if as_labels and page.photometric in (_MINISWHITE, _MINISBLACK):
        array = array // _STRETCH.get(bits, 1)
    return unoriented(array, _tag(page, "Orientation", 1))


def _unpacked(path: pathlib.Path) -> io.BytesIO:
    """Returns the file with its LZW, ZSTD and floating-point predicted pages uncompressed."""
    import tifffile

    memory = io.BytesIO(path.read_bytes())
    with tifffile.TiffFile(memory) as file:
        for page in file.pages:
            page = page.aspage()
            codec = int(page.compression)
            if codec not in _BYTE_CODECS and page.predictor != 3:
                continue
            if codec not in (*_BYTE_CODECS, 8, 32946):
                raise UserError(f"{path}: compressed as {page.compression.name}; use Deflate")
            segments = []
            for index, (start, size) in enumerate(_segments(page)):
                memory.seek(start)
                rows, row_bytes = _segment_shape(page, index)
                raw = _decompressed(memory.read(size), codec, rows, row_bytes)
                segments.append(_unpredicted(raw, page))
            _replace(memory, page, segments)
    memory.seek(0)
    return memory


def _segment_shape(page: Any, index: int) -> tuple[int, int]:
    """Returns rows and bytes a row of a strip or tile before compression."""
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    if page.is_tiled:
        return page.tilelength, (page.tilewidth * samples * page.bitspersample + 7) // 8
    strips = -(-page.imagelength // page.rowsperstrip)
    rows = min(page.rowsperstrip, page.imagelength - index % strips * page.rowsperstrip)
    return rows, (page.imagewidth * samples * page.bitspersample + 7) // 8


def _decompressed(data: bytes, codec: int, rows: int, row_bytes: int) -> bytes:
    """Returns the bytes of a strip, which is wrapped as an 8-bit grey TIFF for Pillow's libtiff."""
    from PIL import Image

    tags = ((256, row_bytes), (257, rows), (258, 8), (259, codec), (262, 1), (273, 0), (277, 1))
    tags += ((278, rows), (279, len(data)))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(head + data)) as image:
        return np.asarray(image).tobytes()


def _unpredicted(raw: bytes, page: Any) -> bytes:
    """Returns the samples of a strip, in the file's byte order, with its predictor undone."""
    if page.predictor == 1:
        return raw
    rows = np.frombuffer(raw, np.uint8)
    samples = page.samplesperpixel if page.planarconfig == 1 else 1
    width = page.tilewidth if page.is_tiled else page.imagewidth
    size = page.bitspersample // 8
    if page.predictor == 2:
        order = page.parent.byteorder
        values = rows.view(f"{order}u{size}").reshape(-1, width, samples)
        return np.cumsum(values, axis=1, dtype=values.dtype).astype(values.dtype).tobytes()
    # Bytes of one significance stand together, most significant first, and hold differences.
    planes = np.cumsum(rows.reshape(-1, width * size, samples), axis=1, dtype=np.uint8)
    values = planes.reshape(-1, size, width * samples).transpose(0, 2, 1)
    if page.parent.byteorder == "<":
        values = values[..., ::-1]
    return values.tobytes()


def _replace(memory: io.BytesIO, page: Any, segments: list[bytes]) -> None:
    """Appends uncompressed segments to a TIFF in memory and points the page's tags at them."""
    end = memory.seek(0, io.SEEK_END)
    offsets = []
    for segment in segments:
        offsets.append(end)
        end += memory.write(segment)
    kind = "Tile" if page.is_tiled else "Strip"
    page.tags["Compression"].overwrite(1)
    if "Predictor" in page.tags:
        page.tags["Predictor"].overwrite(1)
    page.tags[f"{kind}Offsets"].overwrite(offsets)
    page.tags[f"{kind}ByteCounts"].overwrite([len(segment) for segment in segments])


def _check_segments(path: pathlib.Path, page: Any) -> None:
    """Raises UserError if strips or tiles are missing, or too few for the promised pixels."""
    promised = page.imagewidth * page.imagelength * page.samplesperpixel * page.bitspersample // 8
    size = path.stat().st_size
    ends = [start + count for start, count in _segments(page)]
    most = size if page.compression == 1 else max(_MOST_BYTES, _MOST_RATIO * size)
    if len(ends) != math.prod(page.chunked) or max(ends, default=0) > size or promised > most:
        raise UserError(
            f"{path}: is truncated or damaged: {page.imagewidth} x {page.imagelength} pixels in "
            f"{len(ends)} strips or tiles, {size} bytes; copy or export it again"
        )


def _segments(page: Any) -> list[tuple[int, int]]:
    return list(zip(page.dataoffsets, page.databytecounts, strict=True))


@contextlib.contextmanager
def _no_errors(path: pathlib.Path) -> Iterator[None]:
    """Raises UserError for what tifffile only logs: damaged tags, pages that are not there."""
    found: list[logging.LogRecord] = []

    class Collect(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.thread == thread:
                found.append(record)
            return record.thread != thread

    logger, thread, collect = logging.getLogger("tifffile"), threading.get_ident(), Collect()
    logger.addFilter(collect)
    try:
        yield
    finally:
        logger.removeFilter(collect)
    errors = [record.getMessage() for record in found if record.levelno >= logging.ERROR]
    if errors:
        raise UserError(
            f"{path}: cannot be read ({' '.join(errors[0].split())[:120]}); the picture is "
            "damaged: copy or export it again"
        )


def _tag(page: Any, name: str, default: int) -> int:
    tag = page.tags.get(name)
    return default if tag is None else int(tag.value)
