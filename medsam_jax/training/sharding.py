"""The device mesh, and the placement of batches and training state on it.

The mesh has axes `data` and `fsdp`. The batch is split over both, arrays of the state over `fsdp`
only, along their longest side that it divides. Axis types are Auto: with jax's default, Explicit,
the reshape that cuts windows would need a sharding at every call.
"""

from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from medsam_jax.errors import UserError


def make_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """Makes a mesh over all devices of all processes.

    Raises UserError if the axes' product is not the number of devices, or does not divide a batch.
    """
    count = jax.device_count()
    shape = {"data": config.mesh.data, "fsdp": config.mesh.fsdp}
    free = [name for name, size in shape.items() if size == -1]
    fixed = int(np.prod([size for size in shape.values() if size != -1]))
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        shape[free[0]] = count // fixed
    if shape["data"] * shape["fsdp"] != count or min(shape.values()) < 1:
        raise UserError(
            f"config.mesh: data {config.mesh.data} x fsdp {config.mesh.fsdp} is not the number of "
            f"devices, {count}; set one of them to -1"
        )
    batches = {
        "batch_size / accumulation_steps": config.batch_size // config.accumulation_steps,
        "eval_batch_size": config.eval_batch_size,
    }
    for name, size in batches.items():
        if size % count:
            raise UserError(f"config.{name}: {size} is not a multiple of the {count} devices")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shard_state(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """Returns a sharding for each leaf: its longest side that `fsdp` divides, or replicated."""
    size = mesh.shape["fsdp"]

    def leaf_sharding(leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct) -> NamedSharding:
        sides = [side if side % size == 0 else 0 for side in leaf.shape]
        if size == 1 or not sides or max(sides) == 0:
            return replicated(mesh)
        axis = int(np.argmax(sides))
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(leaf_sharding, state)


def place(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Makes a global array of an array that every process holds; it may share its memory.

    Parts are copied through the host. `jax.device_put` would compile a program for each shape that
    it cuts, and one that compares the processes.
    """
    if sharding.is_fully_addressable and sharding.is_fully_replicated:
        return jax.device_put(array, sharding)
    host = np.array(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices and returns global arrays."""
    return {n: jax.make_array_from_process_local_data(sharding, x) for n, x in batch.items()}


def model_inputs(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch that the steps take: embeddings, if any, replace the images."""
    image = "embedding" if "embedding" in batch else "image"
    points = [name for name in ("points", "point_labels", "boxes_valid") if name in batch]
    return {name: batch[name] for name in (image, "mask", "box", "valid_shape", *points)}
