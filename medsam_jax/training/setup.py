"""A run's model, optimiser, shardings and jitted steps, made once: `set_up`.

Without parameters it needs no weights, no data and no devices beyond those that a mesh names. The
steps can then be compiled for a platform that is not at hand, to read the memory that XLA plans.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from medsam_jax.data.datasets import DatasetInfo, open_dataset
from medsam_jax.data.recipes import PREPROCESSING, get_recipe
from medsam_jax.errors import UserError
from medsam_jax.models.checkpoint import abstract_model, build_model
from medsam_jax.models.functional import Functional, parameter_names
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.ops.compile import jit
from medsam_jax.ops.form import form_for, local_form
from medsam_jax.training import optimizer as opt
from medsam_jax.training.lora import Adapted, adapted
from medsam_jax.training.sharding import batch_sharding, place, replicated, shard_state
from medsam_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    parts_of_batch,
)

ONE_DEVICE = AbstractMesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects of a run that depend on its configuration and checkpoint, and not on its data."""

    config: ml_collections.ConfigDict
    model_config: SamConfig | UNetConfig  # with this run's dtype and contract
    functional: Functional | Adapted
    labels: dict[str, str]  # of `optimizer.label_parameters`
    tx: optax.GradientTransformation
    state: TrainState  # of `jax.ShapeDtypeStruct`
    state_sharding: TrainState  # of `NamedSharding`
    by_item: NamedSharding  # of batches and scores
    train_step: jax.stages.Wrapped  # (state, batch) -> (state, scalars)
    eval_step: jax.stages.Wrapped  # (arrays, batch) -> scores

    def first_state(self) -> TrainState:
        """Makes the state before the first step, from the parameters, on the mesh."""
        state = init_state(self.functional.arrays, self.labels, self.tx, self.config)
        return jax.tree.map(place, state, self.state_sharding)

    def train_batch(self, cached: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch; `cached`: with embeddings instead of images."""
        config, model_config, size = self.config, self.model_config, self.config.batch_size
        prompts = (size,) if config.prompts_per_image == 1 else (size, config.prompts_per_image)
        side = get_recipe(model_config.preprocessing.recipe).size
        shapes = {
            "mask": ((*prompts, side, side), jnp.uint8),
            "box": ((*prompts, 4), jnp.float32),
            "valid_shape": ((size, 2), jnp.int32),
        }
        if cached:
            grid, channels = model_config.embedding_size, model_config.embed_dim
            shapes["embedding"] = ((size, grid, grid, channels), jnp.dtype(config.embedding_dtype))
        else:
            shapes["image"] = ((size, side, side, 3), jnp.uint8)
        if config.point_share:
            count = config.positive_points + config.negative_points
            shapes["points"] = ((*prompts, count, 2), jnp.float32)
            shapes["point_labels"] = ((*prompts, count), jnp.int32)
            shapes["boxes_valid"] = (prompts, jnp.bool_)
        return {name: jax.ShapeDtypeStruct(*one) for name, one in shapes.items()}

    def eval_batch(self, cached: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a tune batch: one object a slice, with one point if points are trained."""
        config = self.config.copy_and_resolve_references()
        config.update({"prompts_per_image": 1, "positive_points": 1, "negative_points": 0})
        config.batch_size = config.eval_batch_size
        shapes = dataclasses.replace(self, config=config).train_batch(cached)
        return {name: shape for name, shape in shapes.items() if name != "boxes_valid"}


def set_up(
    config: ml_collections.ConfigDict,
    stored_config: SamConfig | UNetConfig,
    mesh: Mesh | AbstractMesh = ONE_DEVICE,
    params: Mapping[str, np.ndarray] | None = None,
    platform: str | None = None,
) -> Setup:
    """Makes what a run of `config` needs. Raises UserError if it does not fit the model.

    Args:
      stored_config: model config of the checkpoint that `config` names.
      mesh: `sharding.make_mesh(config)`, or an abstract mesh of devices that are not here.
      params: the checkpoint's arrays by dotted path; None for shapes alone.
      platform: the platform to make the steps for, such as "cpu" or "tpu"; None for this process's.
    """
    devices = mesh.size, config.matmul_precision
    form = form_for(platform, *devices) if platform else local_form(*devices)
    form = dataclasses.replace(form, mesh=mesh)
    model_config = configured(stored_config, config)
    if params is None:
        model = abstract_model(model_config)
    else:
        model = build_model(model_config, params, config.checkpoint)
    functional = adapted(Functional(model, form), config)
    labels = opt.label_parameters(functional.arrays, parameter_names(model), config.frozen)
    tx = opt.make_optimizer(config, labels, form)

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in functional.arrays.items()}
    state = jax.eval_shape(lambda arrays: init_state(arrays, labels, tx, config), shapes)
    shardings = shard_state(mesh, state)
    by_item, on_all = batch_sharding(mesh), replicated(mesh)
    parts = parts_of_batch(model, config, form, mesh.size)
    train = jit(
        make_train_step(functional, tx, labels, config, parts),
        form,
        in_shardings=(shardings, by_item),
        out_shardings=(shardings, on_all),
        donate_argnums=0,
    )
    evaluate = jit(
        make_eval_step(functional, config.tolerance),
        form,
        in_shardings=(shardings.arrays, by_item),
        out_shardings=by_item,
    )
    return Setup(
        config, model_config, functional, labels, tx, state, shardings, by_item, train, evaluate
    )


def configured(
    stored: SamConfig | UNetConfig, config: ml_collections.ConfigDict
) -> SamConfig | UNetConfig:
    """Returns the model config to compute with: `trained_for`, in this run's dtype and remat."""
    changes: dict[str, Any] = {"dtype": config.dtype}
    if config.remat:
        if not hasattr(getattr(stored, "encoder", None), "remat"):
            raise UserError(f"config.remat: only a ViT has it, not {stored.name}; leave it False")
        changes["encoder"] = dataclasses.replace(stored.encoder, remat=True)
    return dataclasses.replace(trained_for(stored, config), **changes)


def trained_for(
    stored: SamConfig | UNetConfig,
    config: ml_collections.ConfigDict,
    ct_windows: tuple[str, ...] = (),
) -> SamConfig | UNetConfig:
    """Returns the model config to export: the checkpoint's, with this run's contract.

    The contract is preprocessing, mask threshold and CT windows: `ct_windows` are those of the
    training split; () keeps the checkpoint's.
    """
    if isinstance(stored, UNetConfig) and (config.point_share or config.losses.iou):
        field = "point_share" if config.point_share else "losses.iou"
        raise UserError(
            f"config.{field}: {config.point_share or config.losses.iou} given, but a U-Net has "
            "neither points nor a predicted IoU; set it to 0"
        )
    preprocessing = stored.preprocessing
    if config.preprocessing:
        preprocessing = PREPROCESSING[config.preprocessing]
        if preprocessing.image_size != stored.image_size:
            raise UserError(
                f"config.preprocessing: {config.preprocessing!r} gives inputs of "
                f"{preprocessing.image_size} pixels, {stored.name} takes {stored.image_size}; use "
                "the preprocessing that its size fits"
            )
    if config.mask_threshold is not None:
        preprocessing = dataclasses.replace(preprocessing, mask_threshold=config.mask_threshold)
    if ct_windows:
        preprocessing = dataclasses.replace(preprocessing, ct_windows=ct_windows)
    changes: dict[str, Any] = {"preprocessing": preprocessing}
    if config.point_share and config.losses.iou:  # automatic masks are ranked by predicted IoU
        changes["automatic_prompts"] = "points"
    return dataclasses.replace(stored, **changes)


def open_splits(config: ml_collections.ConfigDict) -> DatasetInfo:
    """Returns the data set of a run. Raises UserError for a split without objects."""
    for split in ("train", "tune"):
        _, info = open_dataset(config.data_dir, split, config.fold)
        if len(info.objects(split, config.task)[0]) == 0:
            raise UserError(
                f"{info.directory}: split {split!r} holds no object; assign cases with masks to it "
                "in the manifest's split column"
            )
    return info


def check_one_object_a_slice(
    info: DatasetInfo, model_config: SamConfig | UNetConfig, task: str
) -> None:
    """Refuses slices of several objects for a U-Net that is not shown the box."""
    if not isinstance(model_config, UNetConfig) or model_config.box_channel:
        return
    for split in ("train", "tune"):
        positions, _ = info.objects(split, task)
        several = len(positions) - len(set(positions.tolist()))
        if several:
            raise UserError(
                f"{info.directory}: split {split!r} has {several} further objects in slices that "
                "have one already, and a U-Net without the box channel cannot tell which is "
                "meant; give it the channel, or choose one label with datasets.build --labels or "
                "one task with config.task"
            )
