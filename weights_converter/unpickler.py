"""Pickle interpreter that builds only tensor descriptions and plain containers.

A pickle is a program. Python's `pickle` lets it call every importable function. This interpreter
supports only the instructions that `torch.save` writes. It looks names such as `os.system` up in
the table below; it never imports, calls or sets anything that the file names. A damaged file causes
only an error. Sizes are checked against the file before memory is allocated.
"""

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from medsam_jax.errors import UserError

_MAX_INSTRUCTIONS = 5_000_000  # 100 times a ViT-H with its optimiser; limits the reading time
_INTEGER_BYTES = 16  # the magic number of the legacy format needs 10


@dataclasses.dataclass(frozen=True)
class StorageType:
    """A storage class such as `torch.FloatStorage`."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Storage:
    """An array of `size` elements, stored elsewhere in the file under `key`."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TensorView:
    """Arguments of `torch._utils._rebuild_tensor_v2`: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


@dataclasses.dataclass(frozen=True)
class _Function:
    """Replaces a callable that the file names; `apply` is our code and checks its arguments."""

    name: str
    apply: Callable[..., Any]


class _Mark:
    """Marks the start of an argument list on the stack."""


class _DamagedPickle(Exception):
    """Internal error; `load` converts it to a `UserError` that names the file."""


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise _DamagedPickle(message)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView:
    # The remaining arguments (requires_grad, hooks, metadata) do not change the values.
    _demand(isinstance(storage, Storage), "a tensor without storage")
    _demand(_is_size(offset), "a tensor with an impossible offset")
    for sizes in (shape, strides):
        _demand(
            type(sizes) is tuple and len(sizes) <= 8 and all(map(_is_size, sizes)),
            "a tensor with an impossible shape",
        )
    _demand(len(shape) == len(strides), "a tensor with an impossible shape")
    return TensorView(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> TensorView:
    _demand(isinstance(data, TensorView), "a parameter without a tensor")
    return data


def _ordered_dict(items: Any = ()) -> dict:
    _demand(type(items) in (tuple, list) and not items, "an ordered dict with arguments")
    return {}


def _encode(text: Any, encoding: Any = "") -> bytes:
    # Protocol 2 writes bytes as `_codecs.encode(text, "latin1")`.
    _demand(isinstance(text, str) and encoding == "latin1", "bytes in an unknown spelling")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise _DamagedPickle("bytes in an unknown spelling") from None


def _numpy_dtype(name: Any, *_: Any) -> np.dtype:
    sizes = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
    _demand(isinstance(name, str) and name in sizes, "a numpy scalar of another type")
    return np.dtype(name)


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    _demand(isinstance(dtype, np.dtype) and isinstance(data, bytes), "a damaged numpy scalar")
    _demand(len(data) == dtype.itemsize, "a damaged numpy scalar")
    return np.frombuffer(data, dtype)[0].item()


_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

# All names that a file may use. Any other name is an error.
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function("OrderedDict", _ordered_dict),
    ("torch._utils", "_rebuild_tensor"): _Function("_rebuild_tensor", _rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function("_rebuild_tensor_v2", _rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function("_rebuild_parameter", _rebuild_parameter),
    ("_codecs", "encode"): _Function("encode", _encode),
    ("numpy", "dtype"): _Function("dtype", _numpy_dtype),
    ("numpy.core.multiarray", "scalar"): _Function("scalar", _numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Function("scalar", _numpy_scalar),
} | {("torch", name): StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()}


def load(data: memoryview, path: str, start: int = 0) -> tuple[Any, int]:
    """Interprets the pickle at `data[start:]`.

    Returns the object, its tensors as `TensorView`, and the offset just after the pickle.

    Raises:
      UserError: the pickle is damaged, or needs more than tensors and plain containers.
    """
    machine = _Machine(data, path, start)
    try:
        return machine.run(), machine.position
    except (_DamagedPickle, struct.error, UnicodeDecodeError, IndexError, KeyError) as error:
        reason = str(error) if isinstance(error, _DamagedPickle) else "it breaks off or is damaged"
        raise UserError(
            f"{path}: not a readable checkpoint: {reason} (byte {machine.position} of the pickle); "
            "get the file again"
        ) from None


class _Machine:
    """Stack machine over the opcodes of protocols 2 to 5 that `torch.save` writes."""

    def __init__(self, data: memoryview, path: str, start: int):
        self.data, self.path, self.position = data, path, start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_INSTRUCTIONS):
            opcode = self.take(1)[0]
            if opcode == ord("."):
                _demand(len(self.stack) == 1, "the pickle ends with a wrong stack")
                return self.stack.pop()
            handler = _HANDLERS.get(opcode)
            _demand(handler is not None, f"unknown pickle instruction 0x{opcode:02x}")
            handler(self)
        raise _DamagedPickle("the pickle is longer than that of any checkpoint")

    def take(self, count: int) -> memoryview:
        end = self.position + count
        _demand(end <= len(self.data), "the pickle breaks off")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.position
        while end < len(self.data) and self.data[end] != ord("\n"):
            end += 1
            _demand(end - self.position < 256, "a name without end")
        text = bytes(self.take(end - self.position)).decode("ascii")
        self.take(1)
        return text

    def text(self, layout: str, encoding: str = "utf-8") -> None:
        self.stack.append(bytes(self.take(self.number(layout))).decode(encoding))

    def binary(self, layout: str) -> None:
        self.stack.append(bytes(self.take(self.number(layout))))

    def integer(self) -> None:
        size = self.number("<B")
        _demand(size <= _INTEGER_BYTES, "an integer larger than any in a checkpoint")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def pop(self) -> Any:
        value = self.stack.pop()
        _demand(value is not _Mark, "the pickle's stack is out of order")
        return value

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _Mark:
            index -= 1
            _demand(index >= 0, "the pickle's stack is out of order")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, items: list[Any]) -> None:
        _demand(type(self.stack[-1]) is list, "the pickle appends to what is no list")
        self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        _demand(
            type(self.stack[-1]) is dict and len(items) % 2 == 0,
            "the pickle fills what is no dictionary",
        )
        keys = items[::2]
        # Plain keys only: a crafted nested tuple can take unlimited time to hash.
        _demand(all(type(key) in (str, int) for key in keys), "a dictionary with unusual keys")
        self.stack[-1].update(zip(keys, items[1::2], strict=True))

    def remember(self, index: int) -> None:
        _demand(bool(self.stack) and self.stack[-1] is not _Mark, "the pickle's memo is damaged")
        self.memo[index] = self.stack[-1]

    def find(self, module: Any, name: Any) -> None:
        _demand(isinstance(module, str) and isinstance(name, str), "a damaged name")
        if (module, name) not in _GLOBALS:
            self.refuse(module, name)
        self.stack.append(_GLOBALS[module, name])

    def refuse(self, module: str, name: str) -> NoReturn:
        wanted = ascii(f"{module}.{name}"[:120])
        if module.startswith("__torch__"):
            raise UserError(
                f"{self.path}: a TorchScript archive ({wanted}); save model.state_dict() instead"
            )
        raise UserError(
            f"{self.path}: the pickle asks for {wanted}, which is no part of a tensor; refused, "
            "nothing was run. If you trust the file, save its state_dict alone with torch first"
        )

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        self.find(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        _demand(isinstance(function, _Function), "the pickle calls what is no function")
        _demand(type(arguments) is tuple and len(arguments) <= 8, "a call with wrong arguments")
        try:
            self.stack.append(function.apply(*arguments))
        except TypeError:
            raise _DamagedPickle(f"{function.name} with wrong arguments") from None

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        # A state dict stores its modules' versions (`_metadata`), a numpy dtype its byte order.
        if isinstance(target, np.dtype):
            _demand(type(state) is tuple and len(state) > 1, "a damaged numpy type")
            _demand(state[1] in ("<", "|"), "numbers in big-endian order")
            return
        _demand(type(target) is dict and type(state) is dict, "the pickle sets a state")

    def persistent_id(self) -> None:
        value = self.pop()
        _demand(type(value) is tuple and len(value) in (5, 6), "a damaged storage")
        kind, storage_type, key, _, size = value[:5]
        _demand(kind == "storage" and isinstance(key, str), "a damaged storage")
        _demand(isinstance(storage_type, StorageType), "a storage of unknown type")
        _demand(_is_size(size), "a storage of impossible size")
        _demand(len(value) == 5 or value[5] is None, "a storage view of PyTorch 0.3 or older")
        self.stack.append(Storage(key, storage_type.dtype, size))


def _push(value: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value())


_HANDLERS: dict[int, Callable[[_Machine], Any]] = {
    ord(code): handler
    for code, handler in {
        "\x80": lambda m: _demand(2 <= m.number("<B") <= 5, "a pickle of unknown protocol"),
        "\x95": lambda m: m.take(8),  # FRAME: a hint for buffered readers, ignored
        "(": lambda m: m.stack.append(_Mark),
        "0": lambda m: m.stack.pop(),
        "1": lambda m: m.pop_to_mark(),
        "N": _push(lambda: None),
        "\x88": _push(lambda: True),
        "\x89": _push(lambda: False),
        "J": lambda m: m.stack.append(m.number("<i")),
        "K": lambda m: m.stack.append(m.number("<B")),
        "M": lambda m: m.stack.append(m.number("<H")),
        "\x8a": _Machine.integer,
        "G": lambda m: m.stack.append(m.number(">d")),
        "X": lambda m: m.text("<I"),
        "\x8c": lambda m: m.text("<B"),
        "T": lambda m: m.text("<I", "latin1"),  # str of Python 2
        "U": lambda m: m.text("<B", "latin1"),
        "B": lambda m: m.binary("<I"),
        "C": lambda m: m.binary("<B"),
        ")": _push(tuple),
        "t": lambda m: m.stack.append(tuple(m.pop_to_mark())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "]": _push(list),
        "a": lambda m: m.append([m.pop()]),
        "e": lambda m: m.append(m.pop_to_mark()),
        "}": _push(dict),
        "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
        "u": lambda m: m.set_items(m.pop_to_mark()),
        "c": lambda m: m.find(m.line(), m.line()),
        "\x93": _Machine.find_on_stack,
        "R": _Machine.reduce,
        "b": _Machine.build,
        "Q": _Machine.persistent_id,
        "q": lambda m: m.remember(m.number("<B")),
        "r": lambda m: m.remember(m.number("<I")),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.stack.append(m.memo[m.number("<B")]),
        "j": lambda m: m.stack.append(m.memo[m.number("<I")]),
    }.items()
}
