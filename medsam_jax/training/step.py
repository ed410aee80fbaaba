"""The jitted training and evaluation steps: pure functions over pytrees, built once per run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from medsam_jax.data.preprocess import encoder_input, stored_grid_logits, stored_to_input
from medsam_jax.metrics.overlap import dice_batch
from medsam_jax.metrics.surface import nsd_batch
from medsam_jax.models.common import Functional
from medsam_jax.models.sam import Sam
from medsam_jax.models.unet import UNet
from medsam_jax.training import optimizer as opt
from medsam_jax.training.losses import cross_entropy_loss, dice_loss, valid_pixels

Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that changes in training, but for the position in the data."""

    step: jax.Array  # int32, steps done
    arrays: dict[str, jax.Array]  # the model's variables by dotted path, frozen ones included
    opt_state: Any
    ema: dict[str, jax.Array]  # averages of the trained arrays; empty without `ema_decay`

    def evaluated(self) -> dict[str, jax.Array]:
        """The arrays that are evaluated and exported: the averages where there are any."""
        return {**self.arrays, **self.ema}


def encode(model: Sam, images: jax.Array, valid_shape: jax.Array) -> jax.Array:
    """Image embeddings [B, h, w, C] of stored slices."""
    return model.image_encoder(encoder_input(images, valid_shape, model.config.preprocessing))


def box_logits(model: Sam, batch: Batch) -> jax.Array:
    """Logits [B, S, S] on the stored grid of one box per slice, from cached embeddings if given."""
    return supervised_logits(model, batch)[0]


def supervised_logits(model: Sam | UNet, batch: Batch) -> list[jax.Array]:
    """What the loss is taken of: `box_logits`, then a U-Net's coarser stages, finest first."""
    preprocessing = model.config.preprocessing
    if "embedding" in batch:
        embeddings = batch["embedding"].astype(model.config.dtype)
    else:
        embeddings = encode(model, batch["image"], batch["valid_shape"])
    boxes = stored_to_input(batch["box"], preprocessing)[:, None]  # [B, 1, 4]
    if isinstance(model, UNet):
        stages = model.supervised_logits(embeddings, boxes=boxes)[::-1]
    else:
        stages = [model.decode(embeddings, boxes=boxes)[0]]
    return [stored_grid_logits(logits[:, 0, 0], preprocessing) for logits in stages]


def make_train_step(
    functional: Functional,
    tx: optax.GradientTransformation,
    labels: Mapping[str, str],
    config: ml_collections.ConfigDict,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The step: state and batch to the next state and its scalars (loss and parts, norms, rate)."""
    schedule = opt.learning_rate_schedule(config)

    def loss_fn(trained, frozen, batch):
        model = functional.bind({**frozen, **trained})
        stages = supervised_logits(model, batch)
        valid = valid_pixels(batch["valid_shape"], stages[0].shape[-1])
        target = batch["mask"] > 0
        # Deep supervision as in nnU-Net: half the weight for half the resolution, 1 in all.
        weights = [0.5**i / (2 - 0.5 ** (len(stages) - 1)) for i in range(len(stages))]
        parts = {
            name: sum(
                w * jnp.mean(loss(x, target, valid)) for w, x in zip(weights, stages, strict=True)
            )
            for name, loss in (("dice_loss", dice_loss), ("cross_entropy", cross_entropy_loss))
        }
        loss = config.dice_weight * parts["dice_loss"]
        loss += config.cross_entropy_weight * parts["cross_entropy"]
        return loss, {"loss": loss, **parts}

    def gradients_of(trained, frozen, batch):
        gradient_fn = jax.grad(loss_fn, has_aux=True)
        parts = config.accumulation_steps
        if parts == 1:
            return gradient_fn(trained, frozen, batch)
        # Every `parts`-th item makes a micro-batch, so that each stays spread over the devices.
        micro = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

        def accumulate(total, batch):
            return jax.tree.map(jnp.add, total, gradient_fn(trained, frozen, batch)), None

        shapes = jax.eval_shape(gradient_fn, trained, frozen, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(accumulate, zeros, micro)
        return jax.tree.map(lambda x: x / parts, total)

    def train_step(state, batch):
        trained, frozen = opt.split_frozen(state.arrays, labels)
        gradients, scalars = gradients_of(trained, frozen, batch)
        arrays, opt_state, update_norm = opt.apply_gradients(
            tx, state.arrays, gradients, state.opt_state
        )
        scalars |= {
            "gradient_norm": optax.tree.norm(gradients),
            "update_norm": update_norm,
            "learning_rate": schedule(state.step),
        }
        new = {name: arrays[name] for name in state.ema}
        ema = optax.incremental_update(new, state.ema, 1.0 - config.ema_decay)
        return TrainState(state.step + 1, arrays, opt_state, ema), scalars

    return train_step


def make_eval_step(
    functional: Functional, tolerance: float
) -> Callable[[Mapping[str, jax.Array], Batch], dict[str, jax.Array]]:
    """Arrays and batch to `dice` [B], `nsd` [B] (native 2D, pixels) and `prediction` [B, S, S]."""

    def eval_step(arrays, batch):
        logits = box_logits(functional.bind(arrays), batch)
        valid = valid_pixels(batch["valid_shape"], logits.shape[-1])
        threshold = functional.bind(arrays).config.preprocessing.mask_threshold
        prediction = (logits > threshold) & valid
        truth = (batch["mask"] > 0) & valid
        return {
            "dice": dice_batch(prediction, truth),
            "nsd": nsd_batch(prediction, truth, (1.0, 1.0), tolerance),
            "prediction": prediction,
        }

    return eval_step


def init_state(
    arrays: Mapping[str, jax.Array],
    labels: Mapping[str, str],
    tx: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
) -> TrainState:
    """The state before the first step."""
    trained, _ = opt.split_frozen(arrays, labels)
    ema = trained if config.ema_decay else {}
    return TrainState(jnp.zeros((), jnp.int32), dict(arrays), tx.init(arrays), ema)
