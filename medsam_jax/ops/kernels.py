"""Runs kernels: that of the platform that is compiled for, by each device on its share.

Kernels are in modules of their own, which are imported where they run: Pallas is slow to import.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float32

from medsam_jax.ops.form import AnyMesh


def run_kernel(
    kernels: Mapping[str, Callable[..., Any]],
    mesh: AnyMesh,
    *by_item: Array,
    shared: tuple[Array, ...] = (),
) -> Any:
    """Returns `kernel(*by_item, *shared)`, arrays that have the items of the batch first.

    The compiler cannot split a kernel. On a mesh it would therefore collect the batch, and every
    device would compute all of it.

    Args:
      kernels: functions by platform, and "default" for the others.
      mesh: devices that the items are sharded over; None for one device.
      shared: arrays that every item needs whole.
    """

    def run(*arrays: Array) -> Any:
        return jax.lax.platform_dependent(*arrays, **kernels)

    if mesh is not None and mesh.size > 1:
        share, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
        specs = (share,) * len(by_item) + (whole,) * len(shared)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=share, check_vma=False)
    return run(*by_item, *shared)


def product(a: Array, b: Array, axis_a: int, axis_b: int) -> Float32[Array, "m n"]:
    """Returns the sums of products of two matrices over an axis of each, in a kernel for TPUs.

    The program's precision is that of float32 matrices. Mosaic knows no other product of bfloat16
    ones than the exact one.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
