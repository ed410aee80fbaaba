"""The jitted training and evaluation steps: pure functions over pytrees, built once per run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from medsam_jax.data.preprocess import stored_grid_logits, stored_to_input, valid_pixels
from medsam_jax.data.prompts import PADDING_LABEL
from medsam_jax.metrics.overlap import iou_batch
from medsam_jax.metrics.registry import METRICS
from medsam_jax.models.functional import Functional
from medsam_jax.models.sam import Sam
from medsam_jax.models.unet import UNet
from medsam_jax.ops.form import Form
from medsam_jax.ops.global_norm import global_norm
from medsam_jax.training import optimizer as opt
from medsam_jax.training.lora import Adapted
from medsam_jax.training.losses import LOSSES, answer_weights, score_weights

Batch = Mapping[str, jax.Array]
Leaf = Any  # an array; its shape or its sharding in the trees that describe a state


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes, except the position in the data."""

    step: Leaf  # int32, steps done
    arrays: dict[str, Leaf]  # the model's variables by dotted path, frozen ones included
    opt_state: Any
    ema: dict[str, Leaf]  # averages of the trained arrays; empty without `ema_decay`

    def evaluated(self) -> dict[str, Leaf]:
        """The arrays to evaluate and export: averages where `ema_decay` is set."""
        return {**self.arrays, **self.ema}


def predict(
    model: Sam | UNet, batch: Batch, multimask_output: bool | None = False
) -> tuple[list[jax.Array], jax.Array]:
    """Predicts a mask for every prompt of a batch with a prompt axis, see `with_prompt_axis`.

    Cached embeddings of the batch, if any, replace its images.

    Returns:
      Logits [B, P, M, S, S] on the stored grid, then those of a U-Net's coarser stages, finest
      first; and the predicted IoU [B, P, M]. For M see `MaskDecoder`.
    """
    preprocessing = model.config.preprocessing
    if "embedding" in batch:
        embeddings = batch["embedding"].astype(model.config.dtype)
    else:
        embeddings = model.encode(batch["image"], batch["valid_shape"])
    boxes = stored_to_input(batch["box"], preprocessing)  # [B, P, 4]
    if isinstance(model, UNet):
        stages = model.supervised_logits(embeddings, boxes=boxes)[::-1]
        predicted_iou = jnp.full(stages[0].shape[:3], jnp.nan)
    else:
        prompts = {"boxes": boxes, "multimask_output": multimask_output}
        if "points" in batch:
            points = stored_to_input(batch["points"], preprocessing)
            prompts["points"] = points, batch["point_labels"]
            prompts["boxes_valid"] = batch["boxes_valid"]
        logits, predicted_iou = model.decode(embeddings, **prompts)
        stages = [logits]
    return [stored_grid_logits(logits, preprocessing) for logits in stages], predicted_iou


def with_prompt_axis(batch: Batch) -> dict[str, jax.Array]:
    """Returns the batch with a prompt axis P, which a loader of one prompt a slice leaves out."""
    if batch["mask"].ndim == 4:
        return dict(batch)
    names = {"mask", "box", "points", "point_labels", "boxes_valid"}
    return {name: x[:, None] if name in names else x for name, x in batch.items()}


def make_loss(
    functional: Functional | Adapted, config: ml_collections.ConfigDict
) -> Callable[[Mapping[str, jax.Array], Batch], tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns a function from arrays and batch to the loss, a mean over prompts, and its parts."""
    weighed = [(LOSSES[name], weight) for name, weight in config.losses.items() if weight]
    mask_losses = [(row, weight) for row, weight in weighed if not row.of_score]
    score_losses = [(row, weight) for row, weight in weighed if row.of_score]

    def loss_fn(arrays, batch):
        model = functional.bind(arrays)
        batch = with_prompt_axis(batch)
        # Points train all four masks; boxes alone need the single one.
        stages, predicted_iou = predict(model, batch, None if "points" in batch else False)
        valid = valid_pixels(batch["valid_shape"], stages[0].shape[-1])[:, None, None]
        target = (batch["mask"] > 0)[:, :, None]  # [B, P, 1, S, S]
        # Deep supervision as in nnU-Net: half the weight for half the resolution, 1 in all.
        depth = [0.5**i / (2 - 0.5 ** (len(stages) - 1)) for i in range(len(stages))]
        losses = jnp.zeros_like(stages[0][..., 0, 0])  # [B, P, M]
        parts = {}
        for row, weight in mask_losses:
            stage_losses = [row.function(logits, target, valid) for logits in stages]
            parts[row.curve] = sum(w * x for w, x in zip(depth, stage_losses, strict=True))
            losses += weight * parts[row.curve]
        weights = answer_weights(losses, batch.get("point_labels"), config.multimask)
        scalars = {curve: jnp.mean(jnp.sum(weights * x, -1)) for curve, x in parts.items()}
        loss = jnp.mean(jnp.sum(weights * losses, -1))
        prediction = stages[0] > model.config.preprocessing.mask_threshold
        for row, weight in score_losses:
            error = row.function(predicted_iou, prediction, target, valid)
            shown = score_weights(error, batch.get("point_labels"), config.multimask)
            scalars[row.curve] = jnp.mean(jnp.sum(shown * error, -1))
            loss += weight * scalars[row.curve]
        return loss, {"loss": loss, **scalars}

    return loss_fn


def make_train_step(
    functional: Functional | Adapted,
    tx: optax.GradientTransformation,
    labels: Mapping[str, str],
    config: ml_collections.ConfigDict,
    parts: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the training step, from state and batch to the next state and its scalars.

    The scalars are the loss and its parts, the norms of gradient and update, the learning rate.
    A batch is processed in `parts` equal parts; None means `config.accumulation_steps`.
    """
    parts = config.accumulation_steps if parts is None else parts
    schedule = opt.learning_rate_schedule(config)
    loss = make_loss(functional, config)

    def loss_fn(trained, frozen, batch):
        return loss({**frozen, **trained}, batch)

    def gradients_of(trained, frozen, batch):
        gradient_fn = jax.grad(loss_fn, has_aux=True)
        if parts == 1:
            return gradient_fn(trained, frozen, batch)

        def accumulate(total, part):
            # Every `parts`-th item, so that each part stays spread over the devices.
            micro = {n: x.reshape(-1, parts, *x.shape[1:])[:, part] for n, x in batch.items()}
            gradients, scalars = gradient_fn(trained, frozen, micro)
            return jax.tree.map(jnp.add, total, gradients), scalars

        zeros = jax.tree.map(jnp.zeros_like, trained)
        total, scalars = jax.lax.scan(accumulate, zeros, jnp.arange(parts))
        gradients = jax.tree.map(lambda x: x / parts, total)
        return gradients, jax.tree.map(lambda x: jnp.mean(x, axis=0), scalars)

    def train_step(state, batch):
        trained, frozen = opt.split_frozen(state.arrays, labels)
        gradients, scalars = gradients_of(trained, frozen, batch)
        arrays, opt_state, update_norm = opt.apply_gradients(
            tx, state.arrays, gradients, state.opt_state, functional.form
        )
        scalars |= {
            "gradient_norm": global_norm(gradients, functional.form),
            "update_norm": update_norm,
            "learning_rate": schedule(state.step),
        }
        new = {name: arrays[name] for name in state.ema}
        ema = optax.incremental_update(new, state.ema, 1.0 - config.ema_decay)
        return TrainState(state.step + 1, arrays, opt_state, ema), scalars

    return train_step


def parts_of_batch(
    model: Sam | UNet, config: ml_collections.ConfigDict, form: Form, devices: int
) -> int:
    """Number of equal parts in which a training step processes its batch; gradients are the same.

    On a CPU a SAM gets one image a device at a time, whose feature maps stay in the cache.
    """
    if form.cpu and isinstance(model, Sam):
        return max(config.accumulation_steps, config.batch_size // devices)
    return config.accumulation_steps


def batch_metrics() -> dict[str, Callable[..., jax.Array]]:
    """Returns the jitted forms of the registry's metrics by name."""
    return {name: metric.batch for name, metric in METRICS.items() if metric.batch}


def make_eval_step(
    functional: Functional | Adapted, tolerance: float
) -> Callable[[Mapping[str, jax.Array], Batch], dict[str, jax.Array]]:
    """Returns a function from arrays and a batch of one object a slice to scores [B] by name.

    The scores of the box prompt are `batch_metrics`, with lengths in pixels, and `iou_error`, the
    absolute error of the predicted IoU; `prediction` [B, S, S] is the mask. A batch with one point
    an object adds the same names with `point_` for the single mask. `point_best_dice` and
    `point_best_iou_error` are those of the mask, of three, with the highest predicted IoU.
    """
    metrics = batch_metrics()

    def scores(prediction, predicted_iou, truth):
        one_pixel = (1.0, 1.0)
        found = {name: f(prediction, truth, one_pixel, tolerance) for name, f in metrics.items()}
        error = jnp.abs(predicted_iou - iou_batch(prediction, truth))
        return found | {"iou_error": error, "prediction": prediction}

    def eval_step(arrays, batch):
        model = functional.bind(arrays)
        batch = with_prompt_axis(batch)
        by_point = "points" in batch
        if by_point:
            batch = _box_and_point(batch)
        stages, predicted_iou = predict(model, batch, None if by_point else False)
        valid = valid_pixels(batch["valid_shape"], stages[0].shape[-1])
        threshold = model.config.preprocessing.mask_threshold
        masks = (stages[0] > threshold) & valid[:, None, None]  # [B, P, M, S, S]
        truth = (batch["mask"][:, 0] > 0) & valid
        found = scores(masks[:, 0, 0], predicted_iou[:, 0, 0], truth)
        if by_point:
            single = scores(masks[:, 1, 0], predicted_iou[:, 1, 0], truth)
            found |= {f"point_{name}": value for name, value in single.items()}
            item = jnp.arange(len(truth))
            best = 1 + jnp.argmax(predicted_iou[:, 1, 1:], axis=-1)
            three = scores(masks[item, 1, best], predicted_iou[item, 1, best], truth)
            found |= {f"point_best_{name}": three[name] for name in ("dice", "iou_error")}
        return found

    return eval_step


def _box_and_point(batch: Batch) -> dict[str, jax.Array]:
    """Returns the batch with two prompts an object, its box and its point."""
    size = len(batch["box"])
    padding = jnp.full_like(batch["point_labels"], PADDING_LABEL)
    return {
        **batch,
        "box": jnp.repeat(batch["box"], 2, axis=1),
        "boxes_valid": jnp.broadcast_to(jnp.array([True, False]), (size, 2)),
        "points": jnp.repeat(batch["points"], 2, axis=1),
        "point_labels": jnp.concatenate([padding, batch["point_labels"]], axis=1),
    }


def init_state(
    arrays: Mapping[str, jax.Array],
    labels: Mapping[str, str],
    tx: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
) -> TrainState:
    """Returns the state before the first step."""
    trained, _ = opt.split_frozen(arrays, labels)
    # Copies: a step donates the state, and no buffer can be donated twice.
    ema = jax.tree.map(jnp.copy, trained) if config.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), dict(arrays), tx.init(arrays), ema)
