"""Small valid files of every format, and seeded damage to their bytes."""

import dataclasses
import gzip
import io
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit

from tests.io.dicom_files import (
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    RLE,
    write_compressed,
    write_enhanced,
    write_slice,
)

SHAPE = (4, 16, 20)
NUMBERS = (0, 1, -1, 2, 127, 255, 32767, -32768, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**40)
FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30, 352.5)
WORDS = (b"0", b"-1", b"3", b"999999999", b"99999999999999999999", b"1e308", b"nan", b"short", b"")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A valid file.

    name: what it is called, by which a reader may go.
    content: its bytes.
    voxels: (offset, type) of the voxels if they are stored plainly, in the order of the array.
    unpack, pack: to the bytes in which damage passes checksums, and back.
    beside: other files that it needs, by name.
    """

    name: str
    content: bytes
    voxels: tuple[int, str] | None = None
    unpack: Callable[[bytes], bytes] = lambda content: content
    pack: Callable[[bytes], bytes] = lambda content: content
    beside: dict[str, bytes] = dataclasses.field(default_factory=dict)


def volume(dtype: str = "int16") -> np.ndarray:
    """Smooth values with few negatives, as a scan has; no two neighbours are equal."""
    z, y, x = np.indices(SHAPE)
    return (100 * z + 17 * y + 3 * x + (x * y) % 5).astype(dtype)


def samples() -> dict[str, Sample]:
    """Returns the valid files by a name for messages."""
    with tempfile.TemporaryDirectory() as folder:
        return _medical(Path(folder)) | _dicom(Path(folder)) | _pictures(Path(folder)) | _npz()


def _medical(folder: Path) -> dict[str, Sample]:
    found = {}
    image = sitk.GetImageFromArray(volume())
    image.SetSpacing((0.8, 0.7, 3.0))
    image.SetOrigin((-10.0, 5.0, 20.0))
    for name in ("a.nii", "a.nrrd", "a.mha", "a.mhd"):
        sitk.WriteImage(image, str(folder / name))
        content = (folder / name).read_bytes()
        raw = volume().tobytes()
        offset = content.find(raw)
        voxels = (offset, "<i2") if offset >= 0 else None
        beside = {"a.raw": (folder / "a.raw").read_bytes()} if name == "a.mhd" else {}
        found[name] = Sample(name, content, voxels, beside=beside)
    sitk.WriteImage(image, str(folder / "p.hdr"))
    header, data = ((folder / name).read_bytes() for name in ("p.hdr", "p.img"))
    found["p.hdr"] = Sample("p.hdr", header, beside={"p.img": data})
    for name in ("z.nrrd", "z.mha"):
        sitk.WriteImage(image, str(folder / name), useCompression=True)
        found[name] = Sample(name, (folder / name).read_bytes())
    floats = sitk.Cast(image, sitk.sitkFloat32)
    sitk.WriteImage(floats, str(folder / "f.nii"))
    found["f.nii"] = Sample("f.nii", (folder / "f.nii").read_bytes())
    packed = gzip.compress(found["a.nii"].content, 1, mtime=0)
    found["a.nii.gz"] = Sample("a.nii.gz", packed)
    found["repacked a.nii.gz"] = Sample("a.nii.gz", packed, None, gzip.decompress, _gzip)
    return found


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def _dicom(folder: Path) -> dict[str, Sample]:
    found = {}
    for name, syntax in (
        ("explicit", EXPLICIT),
        ("implicit", IMPLICIT),
        ("deflated", DEFLATED),
        ("rle", RLE),
    ):
        path = folder / f"{name}.dcm"
        write_slice(path, volume()[0], syntax=syntax, uid="1.2.3.4")
        content = path.read_bytes()
        offset = content.find(volume()[0].tobytes())
        voxels = (offset, "<i2") if offset >= 0 else None
        found[f"{name}.dcm"] = Sample(f"{name}.dcm", content, voxels)
    grey = (volume()[1] % 256).astype(np.uint8)
    for name, plane, syntax, options in (
        ("jpeg.dcm", grey, JPEGBaseline8Bit, {"format": "JPEG"}),
        ("j2k.dcm", volume("uint16")[1], JPEG2000Lossless, {"format": "JPEG2000", "no_jp2": True}),
    ):
        stream = io.BytesIO()
        Image.fromarray(plane).save(stream, **options)
        write_compressed(folder / name, plane, syntax, stream.getvalue())
        found[name] = Sample(name, (folder / name).read_bytes())
    write_enhanced(folder / "enhanced.dcm", volume())
    found["enhanced.dcm"] = Sample("enhanced.dcm", (folder / "enhanced.dcm").read_bytes())
    files = {}
    for index, plane in enumerate(volume()):
        write_slice(folder / "s.dcm", plane, (0, 0, 3.0 * index), uid="1.2.3.5", number=index)
        files[f"series/{index}.dcm"] = (folder / "s.dcm").read_bytes()
    for name in ("series/0.dcm", "series/2.dcm"):
        rest = {other: content for other, content in files.items() if other != name}
        found[name] = Sample(name, files[name], beside=rest)
    return found


def _pictures(folder: Path) -> dict[str, Sample]:
    grey = (volume()[1] % 256).astype(np.uint8)
    colours = np.stack([grey, grey[::-1], grey // 2], -1)
    deep = volume("uint16")
    found = {}
    for name, array in (("g.png", grey), ("c.png", colours), ("d.png", deep[0])):
        Image.fromarray(array).save(folder / name)
        content = (folder / name).read_bytes()
        found[name] = Sample(name, content)
        found[f"checked {name}"] = Sample(name, content, None, bytes, mend_png)
    for name in ("g.jpg", "g.bmp", "g.webp", "g.gif", "g.jp2"):
        Image.fromarray(grey).save(folder / name)
        found[name] = Sample(name, (folder / name).read_bytes())
    palette = Image.fromarray(grey).convert("P")
    palette.save(folder / "l.png")
    Image.fromarray(deep[0]).save(folder / "l.tif", compression="tiff_lzw")
    for name in ("l.png", "l.tif"):
        found[name] = Sample(name, (folder / name).read_bytes())
    rgb = {"photometric": "rgb"}
    for name, array, options in (
        ("s.tif", deep, {}),
        ("z.tif", deep, {"compression": "zlib"}),
        ("p.tif", np.moveaxis(colours, -1, 0), rgb | {"planarconfig": "separate"}),
        ("t.tif", colours, rgb | {"tile": (16, 16)}),
        ("b.tif", deep, {"bigtiff": True}),
    ):
        options, bigtiff = dict(options), options.get("bigtiff", False)
        options.pop("bigtiff", None)
        with tifffile.TiffWriter(folder / name, bigtiff=bigtiff) as writer:
            for page in array if name in ("s.tif", "z.tif", "b.tif") else [array]:
                writer.write(page, metadata=None, **options)
        found[name] = Sample(name, (folder / name).read_bytes())
    return found


def mend_png(content: bytes) -> bytes:
    """Writes right checksums into a PNG as far as its chunks can be followed."""
    mended, at = bytearray(content), 8
    while at + 12 <= len(mended):
        length = int.from_bytes(mended[at : at + 4], "big")
        end = at + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = zlib.crc32(mended[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(mended)


def _npz() -> dict[str, Sample]:
    arrays = {"imgs": volume(), "gts": (volume() % 3).astype(np.uint8)}
    arrays["spacing"] = np.array([0.8, 0.7, 3.0])
    found = {}
    for name, save in (("a.npz", np.savez), ("z.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, **arrays)
        found[name] = Sample(name, buffer.getvalue())
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, arrays["imgs"])

    def pack(array: bytes) -> bytes:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for name in ("imgs.npy", "gts.npy"):  # of 1980: the same bytes in every run
                file.writestr(zipfile.ZipInfo(name), array, zipfile.ZIP_DEFLATED)
        return packed.getvalue()

    whole = pack(buffer.getvalue())
    found["repacked a.npz"] = Sample("a.npz", whole, None, lambda _: buffer.getvalue(), pack)
    return found


def mutate(sample: Sample, others: list[Sample], rng: np.random.Generator) -> tuple[bytes, str]:
    """Returns damaged bytes of a sample, and what was done; the same for the same `rng`."""
    content = bytearray(sample.unpack(sample.content))
    kinds = [_flip, _flip, _truncate, _insert, _delete, _number, _number, _word, _repeat]
    done = []
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        if len(content) < 16:
            break
        kind = kinds[rng.integers(len(kinds))]
        content, text = kind(content, rng)
        done.append(text)
    if rng.random() < 0.03:
        other = others[rng.integers(len(others))].content
        at = int(rng.integers(len(content) + 1))
        content, done = content[:at] + other[at:], [*done, f"another file from {at}"]
    return sample.pack(bytes(content)), ", ".join(done)


def _place(content: bytearray, rng: np.random.Generator) -> int:
    """Returns an offset; two of three are in the first 600 bytes, where headers are."""
    end = len(content) if rng.random() < 1 / 3 else min(600, len(content))
    return int(rng.integers(end))


def _flip(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    places = [_place(content, rng) for _ in range(rng.integers(1, 5))]
    for at in places:
        content[at] ^= int(rng.integers(1, 256))
    return content, f"bytes {places} changed"


def _truncate(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    end = _place(content, rng)
    return content[:end], f"cut at {end}"


def _insert(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    at, new = _place(content, rng), rng.bytes(int(rng.integers(1, 40)))
    return content[:at] + new + content[at:], f"{len(new)} bytes inserted at {at}"


def _delete(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    at, count = _place(content, rng), int(rng.integers(1, 60))
    return content[:at] + content[at + count :], f"{count} bytes left out at {at}"


def _number(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    """Overwrites a field with an extreme number."""
    at, order = _place(content, rng) // 2 * 2, "<>"[rng.integers(2)]
    kind = "bBhHiIqQfd"[rng.integers(10)]
    if kind in "fd":
        value = FLOATS[rng.integers(len(FLOATS))]
        new = struct.pack(order + kind, value)
    else:
        value = NUMBERS[rng.integers(len(NUMBERS))]
        size = struct.calcsize(kind)
        new = (value % 256**size).to_bytes(size, "little" if order == "<" else "big")
    content[at : at + len(new)] = new
    return content, f"{value} as {order}{kind} at {at}"


def _word(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    """Replaces a number of a text header by another word."""
    found = list(re.finditer(rb"(?<=[ ,(=\\])-?\d+(\.\d+)?", bytes(content[:1500])))
    if not found:
        return _number(content, rng)
    match = found[rng.integers(len(found))]
    word = WORDS[rng.integers(len(WORDS))]
    content[match.start() : match.end()] = word
    return content, f"{match[0].decode()} replaced by {word.decode() or 'nothing'}"


def _repeat(content: bytearray, rng: np.random.Generator) -> tuple[bytearray, str]:
    at, count = _place(content, rng), int(rng.integers(1, 200))
    return content[: at + count] + content[at:], f"{count} bytes repeated at {at}"
