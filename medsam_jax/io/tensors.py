"""Named tensors of a checkpoint file of any format, read on demand."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from medsam_jax.cli import progress

# Element types of published checkpoints, keyed by safetensors' names.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LARGE = 200 * 2**20  # bytes that take more than two seconds to convert
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """Tensor in a file: shape and type are known, `read()` reads the values.

    `read` may return a read-only view of the memory-mapped file. It raises `UserError` if the
    stored bytes are damaged.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, array: np.ndarray) -> "LazyTensor":
        """Wraps an array that is in memory."""
        return cls(array.shape, array.dtype, lambda: array)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Checkpoint file without its wrapper dictionary and name prefix.

    Attributes:
      path: of the file, for messages.
      format: "pth", "pth (legacy)", "safetensors" or "orbax".
      tensors: keyed by the file's names without `prefix`, in the file's order.
      wrapper: the key of the dictionary that held the tensors ("model", "state_dict"), or "".
      prefix: common prefix of all names ("module."), or "".
    """

    path: str
    format: str
    tensors: dict[str, LazyTensor]
    wrapper: str = ""
    prefix: str = ""


def reading(tensors: Mapping[str, LazyTensor], desc: str) -> Iterable[LazyTensor]:
    """Yields the tensors in order, with a progress bar if they take seconds to read."""
    size = sum(tensor.size * tensor.dtype.itemsize for tensor in tensors.values())
    if size < _LARGE:
        return tensors.values()
    return progress(tensors.values(), desc, len(tensors))
