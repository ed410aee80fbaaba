"""Reads PyTorch `.pth` files (zip and legacy format) without torch and without running their code.

Tensors are views of the memory-mapped file. Formats: `torch/serialization.py` (`_save`,
`_legacy_save`). Differences: pickles are interpreted, not run (`unpickler.py`), stored sizes are
checked against the file before memory is allocated, and checksums are verified.
"""

import functools
import math
import mmap
import re
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.io.tensors import LazyTensor, TensorFile
from weights_converter import unpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_MAX_PICKLE_BYTES = 64 * 2**20  # ViT-H with its optimiser needs 0.5 MB
_MAX_TENSORS = 20_000  # ViT-H has 594
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, struct.error)


def read_pth(path: str) -> TensorFile:
    """Reads the names, shapes and types of a `.pth` file; values are read on demand.

    Raises:
      UserError: not a PyTorch file, damaged, or its pickle needs more than tensors and containers.
    """
    data = _map(path)
    if data[:4] == b"PK\x03\x04":
        archive = _ZipArchive(path, data)
        content, _ = unpickler.load(archive.pickle(), path)
        return _tensor_file(path, "pth", content, archive)
    if data[:1] == b"\x80":
        content, storages = _read_legacy(path, data)
        return _tensor_file(path, "pth (legacy)", content, storages)
    raise UserError(f"{path}: {_describe(bytes(data[:512]))}; expected a checkpoint of torch.save")


def _map(path: str) -> memoryview:
    try:
        with open(path, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:
        raise UserError(f"{path}: the file is empty; get it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _describe(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself (run `git lfs pull`)"
    if head[257:262] == b"ustar":
        return "a tar archive (PyTorch 0.1.9 or older, or packed by hand)"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "a text file, perhaps a web page saved in place of the download"
    return "not a PyTorch file, or damaged at its beginning"


class _ZipArchive:
    """Zip file as `torch.save` writes it: `NAME/data.pkl` and one stored member per storage."""

    def __init__(self, path: str, data: memoryview):
        self.path, self.data = path, data
        self.verified: set[str] = set()
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except _ZIP_ERRORS:
            raise UserError(f"{path}: the archive is truncated or damaged; get it again") from None
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members):
            raise UserError(f"{path}: the archive names a member twice; get the file again")
        self.root = self._find_root()
        order = self._byte_order()
        if order not in (b"", b"little"):
            raise UserError(f"{path}: numbers in {_short(order)} order; not supported")

    def _find_root(self) -> str:
        roots = [name[:-8] for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1:
            raise UserError(f"{self.path}: a zip archive, but not one of torch.save (no data.pkl)")
        if f"{roots[0]}constants.pkl" in self.members:
            raise UserError(f"{self.path}: a TorchScript archive; save model.state_dict() instead")
        return roots[0]

    def _byte_order(self) -> bytes:
        name = f"{self.root}byteorder"
        return bytes(self.member(name)[:16]) if name in self.members else b""

    def pickle(self) -> memoryview:
        name = f"{self.root}data.pkl"
        if self.members[name].file_size > _MAX_PICKLE_BYTES:
            raise UserError(f"{self.path}: its pickle is larger than that of any checkpoint")
        return self.member(name)

    def check(self, storage: unpickler.Storage) -> None:
        """Raises `UserError` unless the member of `storage` has exactly the declared size."""
        name = f"{self.root}data/{storage.key}"
        member = self.members.get(name)
        if member is None:
            raise UserError(f"{self.path}: {_short(name)} is missing; get the file again")
        claimed = storage.size * storage.dtype.itemsize
        if member.file_size != claimed:
            raise UserError(
                f"{self.path}: {_short(name)} claims {claimed} bytes, the file has "
                f"{member.file_size}; get it again"
            )
        self._span(name)

    def read(self, storage: unpickler.Storage) -> np.ndarray:
        return np.frombuffer(self.member(f"{self.root}data/{storage.key}"), storage.dtype)

    def member(self, name: str) -> memoryview:
        """Returns the bytes of a member; the first call verifies its checksum."""
        start, end = self._span(name)
        content, checksum = self.data[start:end], self.members[name].CRC
        # With torch.serialization.set_crc32_options(False) the checksums are zero.
        if name not in self.verified and checksum and zlib.crc32(content) != checksum:
            raise UserError(f"{self.path}: {_short(name)} is damaged (checksum); get it again")
        self.verified.add(name)
        return content

    def _span(self, name: str) -> tuple[int, int]:
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError(
                f"{self.path}: {_short(name)} is compressed or encrypted, which torch.save never "
                "does; unpack and save again"
            )
        header = bytes(self.data[member.header_offset : member.header_offset + 30])
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise UserError(f"{self.path}: the archive is truncated or damaged; get it again")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        start = member.header_offset + 30 + name_size + extra_size
        end = start + member.file_size
        if end > len(self.data):
            raise UserError(f"{self.path}: {_short(name)} breaks off; get the file again")
        return start, end


class _LegacyStorages:
    """Storages after the pickles of the legacy format: 8 bytes of count, then the elements."""

    def __init__(self, path: str, data: memoryview, keys: list[str], start: int):
        self.path, self.data, self.order = path, data, keys
        self.position = start
        self.start: dict[str, int] = {}
        self.known: dict[str, unpickler.Storage] = {}

    def check(self, storage: unpickler.Storage) -> None:
        if self.known.setdefault(storage.key, storage) != storage:
            raise UserError(f"{self.path}: storage {_short(storage.key)} is claimed in two sizes")

    def locate(self) -> None:
        """Finds the offset of each storage after all are checked; element types give the sizes."""
        for key in self.order:
            storage = self.known.pop(key, None)
            if storage is None:
                raise UserError(f"{self.path}: storage {_short(key)} belongs to no tensor")
            start = self.position + 8
            end = start + storage.size * storage.dtype.itemsize
            count = bytes(self.data[self.position : start])
            if end > len(self.data) or struct.unpack("<q", count)[0] != storage.size:
                raise UserError(
                    f"{self.path}: storage {_short(key)} claims {storage.size} elements that the "
                    "file does not have; get it again"
                )
            self.start[key], self.position = start, end
        if self.known:
            raise UserError(f"{self.path}: {len(self.known)} storages are missing; get it again")

    def read(self, storage: unpickler.Storage) -> np.ndarray:
        return np.frombuffer(
            self.data, storage.dtype, count=storage.size, offset=self.start[storage.key]
        )


def _read_legacy(path: str, data: memoryview) -> tuple[Any, _LegacyStorages]:
    magic, position = unpickler.load(data, path)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise UserError(f"{path}: a pickle, but not one of torch.save")
    protocol, position = unpickler.load(data, path, position)
    system, position = unpickler.load(data, path, position)
    if protocol != _LEGACY_PROTOCOL or type(system) is not dict:
        raise UserError(f"{path}: PyTorch's older format in an unknown version")
    if system.get("little_endian") is not True:
        raise UserError(f"{path}: numbers in big-endian order; not supported")
    content, position = unpickler.load(data, path, position)
    keys, position = unpickler.load(data, path, position)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise UserError(f"{path}: the list of storages is damaged; get the file again")
    return content, _LegacyStorages(path, data, keys, position)


def _tensor_file(
    path: str, format: str, content: Any, storages: _ZipArchive | _LegacyStorages
) -> TensorFile:
    wrapper, views = _unwrap(path, content)
    if isinstance(storages, _LegacyStorages):
        for view in _all_views(content):
            storages.check(view.storage)
        storages.locate()
    tensors = {name: _lazy(path, name, view, storages) for name, view in views.items()}
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return TensorFile(path, format, tensors, wrapper, prefix)


def _unwrap(path: str, content: Any) -> tuple[str, dict[str, unpickler.TensorView]]:
    """Finds the state dict: the content itself, or an entry of it under a usual key."""
    if type(content) is not dict:
        raise UserError(f"{path}: holds no dictionary of tensors; save model.state_dict()")
    wrapper = _find_wrapper(path, content)
    state = content[wrapper] if wrapper else content
    strangers = [
        name for name, value in state.items() if not isinstance(value, unpickler.TensorView)
    ]
    if not state or strangers or not all(type(name) is str for name in state):
        inside = f"under {wrapper!r} " if wrapper else ""
        found = f"but {', '.join(map(_short, strangers[:5]))}" if strangers else "no names"
        raise UserError(
            f"{path}: {inside}not a plain dictionary of tensors ({found}); save "
            "model.state_dict() itself, or under 'model' or 'state_dict'"
        )
    if len(state) > _MAX_TENSORS:
        raise UserError(f"{path}: {len(state)} tensors, more than any SAM has")
    return wrapper, state


def _find_wrapper(path: str, content: dict[Any, Any]) -> str:
    """Returns the key of the state dict; "" if the content is one itself. Raises UserError."""
    known = [key for key in _WRAPPERS if type(content.get(key)) is dict]
    if known or any(isinstance(value, unpickler.TensorView) for value in content.values()):
        return known[0] if known else ""
    inner = [key for key, value in content.items() if type(key) is str and _is_state_dict(value)]
    if len(inner) > 1:
        raise UserError(
            f"{path}: holds tensors under {', '.join(map(_short, inner[:5]))}; save the one to "
            "convert alone, or under 'state_dict'"
        )
    return inner[0] if inner else ""


def _is_state_dict(value: Any) -> bool:
    return (
        type(value) is dict
        and all(
            type(name) is str and isinstance(tensor, unpickler.TensorView)
            for name, tensor in value.items()
        )
        and bool(value)
    )


def _all_views(content: Any) -> list[unpickler.TensorView]:
    """Returns all tensors of a checkpoint, including the optimiser's; visits a container once."""
    found, seen, pending = [], set(), [content]
    while pending:
        value = pending.pop()
        if isinstance(value, unpickler.TensorView):
            found.append(value)
        elif type(value) in (dict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value.values() if type(value) is dict else value)
    return found


def _lazy(
    path: str, name: str, view: unpickler.TensorView, storages: _ZipArchive | _LegacyStorages
) -> LazyTensor:
    storages.check(view.storage)
    size = math.prod(view.shape)
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    if size == 0 or size > view.storage.size or last >= view.storage.size:
        raise UserError(
            f"{path}: {_short(name)} claims {size} elements from {view.offset} on, its storage has "
            f"{view.storage.size}; get the file again"
        )
    dtype = view.storage.dtype
    strides = tuple(stride * dtype.itemsize for stride in view.strides)
    return LazyTensor(view.shape, dtype, functools.partial(_read, view, strides, storages))


def _read(
    view: unpickler.TensorView, strides: tuple[int, ...], storages: _ZipArchive | _LegacyStorages
) -> np.ndarray:
    values = storages.read(view.storage)[view.offset :]
    return np.lib.stride_tricks.as_strided(values, view.shape, strides, writeable=False)


def _short(name: Any) -> str:
    return ascii(str(name)[:100])
