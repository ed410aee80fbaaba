"""A miniature SAM as PyTorch would save it, made without PyTorch and without a model in memory."""

import ml_dtypes
import numpy as np
import pytest

from medsam_jax.io.tensors import LazyTensor
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.sam import Sam, SamConfig
from weights_converter.names import torch_leaf


def _random(shape: tuple[int, ...], dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Random bits of finite numbers: every bit must survive a round trip."""
    return rng.standard_normal(shape).astype(dtype)


@pytest.fixture(scope="session")
def tiny_arrays() -> dict[str, np.ndarray]:
    """segment_anything's names and PyTorch's shapes, float32, with BatchNorm's counters."""
    from flax import nnx

    rng = np.random.default_rng(0)
    template = flatten_state(nnx.eval_shape(lambda: Sam(SamConfig.tiny(), rngs=nnx.Rngs(0))))
    arrays = {}
    for path, variable in template.items():
        name, leaf = torch_leaf(path, len(variable.shape))
        arrays[name] = _random(leaf.torch_shape(variable.shape), np.dtype(np.float32), rng)
        if name.endswith(".running_var"):
            counter = name.replace("running_var", "num_batches_tracked")
            arrays[counter] = np.array(rng.integers(2**40), np.int64)
    return arrays


@pytest.fixture(scope="session")
def lazily():
    """Turns arrays into the tensors that writers take."""
    return lambda arrays: {name: LazyTensor.of(array) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def as_dtype():
    """Casts the floating point arrays of a dictionary, and leaves the others."""
    types = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}

    def cast(arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
        return {
            key: value.astype(types[name]) if value.dtype == np.float32 else value
            for key, value in arrays.items()
        }

    return cast


@pytest.fixture(scope="session")
def assert_same():
    """Same keys in the same order, same types, same shapes, same bytes."""

    def check(read: dict[str, LazyTensor], expected: dict[str, np.ndarray]) -> None:
        assert list(read) == list(expected)
        for name, array in expected.items():
            found = read[name].read()
            assert (found.dtype, found.shape) == (array.dtype, array.shape), name
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape), name
            assert found.tobytes() == array.tobytes(), name

    return check
