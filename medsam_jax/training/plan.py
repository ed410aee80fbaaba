"""A recipe's steps over shapes alone: no weights, no data, and no more devices than a mesh names.

For lowering a step to a platform that is not at hand, and for the memory that XLA plans for it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import AbstractMesh, Mesh

from medsam_jax.data.recipes import get_recipe
from medsam_jax.models.checkpoint import abstract_model
from medsam_jax.models.functional import Functional, parameter_names
from medsam_jax.training import optimizer as opt
from medsam_jax.training.loop import configured
from medsam_jax.training.lora import adapted
from medsam_jax.training.sharding import batch_sharding, replicated, shard_state
from medsam_jax.training.step import TrainState, init_state, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """The jitted steps of a run, as `train_and_evaluate` makes them, and the shapes they take."""

    train_step: Any  # jax.stages.Wrapped: (state, batch) -> (state, scalars)
    eval_step: Any  # (arrays, batch) -> scores
    state: TrainState  # of jax.ShapeDtypeStruct
    train_batch: dict[str, jax.ShapeDtypeStruct]
    eval_batch: dict[str, jax.ShapeDtypeStruct]


def plan_steps(
    config: ml_collections.ConfigDict,
    stored_config: Any,
    mesh: Mesh | AbstractMesh | None = None,
    cached: bool = False,
) -> Plan:
    """The steps of a run of `config` from a checkpoint of `stored_config`.

    Args:
      config: a recipe's.
      stored_config: `SamConfig` or `UNetConfig` of the checkpoint that `config` names.
      mesh: as of `sharding.make_mesh`, or an abstract one of devices that are not here; None for
        one device.
      cached: the batch holds embeddings in place of images.

    Raises:
      UserError: a configuration that does not fit the model.
    """
    model_config = configured(stored_config, config)
    model = abstract_model(model_config)
    functional = adapted(Functional(model), config)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in functional.arrays.items()}
    labels = opt.label_parameters(arrays, parameter_names(model), config.frozen)
    tx = opt.make_optimizer(config, labels)
    state = jax.eval_shape(lambda arrays: init_state(arrays, labels, tx, config), arrays)
    train_step = make_train_step(functional, tx, labels, config)
    eval_step = make_eval_step(functional, config.tolerance)
    train_shardings, eval_shardings = {}, {}
    if mesh is not None:
        placement, by_item = shard_state(mesh, state), batch_sharding(mesh)
        train_shardings = {
            "in_shardings": (placement, by_item),
            "out_shardings": (placement, replicated(mesh)),
        }
        eval_shardings = {
            "in_shardings": (placement.arrays, by_item),
            "out_shardings": by_item,
        }
    return Plan(
        jax.jit(train_step, donate_argnums=0, **train_shardings),
        jax.jit(eval_step, **eval_shardings),
        state,
        _batch(config.batch_size, config, model_config, cached),
        _eval_batch(config, model_config, cached),
    )


def _batch(
    size: int, config: ml_collections.ConfigDict, model_config: Any, cached: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `sharding.model_inputs` of a training batch."""
    prompts = (size,) if config.prompts_per_image == 1 else (size, config.prompts_per_image)
    side = get_recipe(model_config.preprocessing.recipe).size
    shapes = {
        "image": ((size, side, side, 3), jnp.uint8),
        "mask": ((*prompts, side, side), jnp.uint8),
        "box": ((*prompts, 4), jnp.float32),
        "valid_shape": ((size, 2), jnp.int32),
    }
    if config.point_share:
        count = config.positive_points + config.negative_points
        shapes["points"] = ((*prompts, count, 2), jnp.float32)
        shapes["point_labels"] = ((*prompts, count), jnp.int32)
        shapes["boxes_valid"] = (prompts, jnp.bool_)
    if cached:
        grid, channels = model_config.embedding_size, model_config.embed_dim
        del shapes["image"]
        shapes["embedding"] = ((size, grid, grid, channels), jnp.dtype(config.embedding_dtype))
    return {name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()}


def _eval_batch(
    config: ml_collections.ConfigDict, model_config: Any, cached: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a tune batch: one object a slice, with one point where points are trained."""
    one_point = config.copy_and_resolve_references()
    one_point.update({"prompts_per_image": 1, "positive_points": 1, "negative_points": 0})
    shapes = _batch(config.eval_batch_size, one_point, model_config, cached)
    return {name: shape for name, shape in shapes.items() if name != "boxes_valid"}
