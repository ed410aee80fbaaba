"""Writes `.pth` files by hand, honest and hostile, from pickle opcodes."""

import io
import zipfile

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    key: str = "0",
    storage: str = "FloatStorage",
    size: int = 4,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
) -> bytes:
    storage_id = b"(" + text("storage") + b"ctorch\n" + storage.encode() + b"\n" + text(key)
    storage_id += text("cpu") + integer(size) + b"tQ"
    arguments = storage_id + integer(offset) + integers(shape) + integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + ORDERED_DICT + b"tR"


def dictionary(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def archive(
    program: bytes, members: dict[str, bytes] | None = None, compress: bool = False
) -> bytes:
    """A zip file around the pickle `program` (without its first and last opcode)."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        for name, data in (members or {}).items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()
