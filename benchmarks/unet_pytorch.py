"""Trains `medsam_jax.models.unet` in PyTorch with the same recipe on the same batches.

Initial weights, batches, augmentation, loss, optimiser, schedule and weight averaging are those of
`python -m medsam_jax.train` with the same configuration. The model and the training step are
PyTorch's. The best weights by tune DSC are written as a checkpoint of this library, so that one
command scores both:

  python -m benchmarks.unet_pytorch --config configs/unet_small.py --workdir runs/unet/torch \
      --config.data_dir=DATA --config.checkpoint=runs/unet/init
  python -m medsam_jax.evaluate --checkpoint runs/unet/box/best,runs/unet/torch/best \
      --data_dir DATA --output results/unet_pytorch

It needs the environment of `tests/parity`: torch and this library.
"""

import copy
import csv
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import flags, logging
from ml_collections import config_flags
from torch import nn

from medsam_jax.cli import run
from medsam_jax.data.input_pipeline import eval_objects, train_loader
from medsam_jax.data.preprocess import encoder_input, stored_to_input
from medsam_jax.errors import UserError
from medsam_jax.hub import resolve
from medsam_jax.metrics import dice_batch
from medsam_jax.models.checkpoint import read_config, read_params, save_model
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training.config import augmentation_of
from medsam_jax.training.optimizer import learning_rate_schedule

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where scores and the best weights go.")

# Axis orders of (transposed) convolution kernels: Flax to PyTorch, and back.
TO_TORCH, TO_FLAX = (3, 2, 0, 1), (2, 3, 1, 0)


class Stage(nn.Module):
    """Block of two convolutions with instance norm and leaky ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1)
        self.norm1 = nn.InstanceNorm2d(n_out, affine=True)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.norm2 = nn.InstanceNorm2d(n_out, affine=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(x)), 0.01)


class UNet(nn.Module):
    """U-Net from pixels [B, 3 or 4, S, S] (fourth channel: box) to logits [B, h, w] per stage."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths = config.features
        inputs = (3 + config.box_channel, *widths[:-1])
        self.encoder = nn.ModuleList(
            Stage(n_in, n_out, 1 if level == 0 else 2)
            for level, (n_in, n_out) in enumerate(zip(inputs, widths, strict=True))
        )
        upper, lower = widths[-2::-1], widths[:0:-1]
        self.upsampling = nn.ModuleList(
            nn.ConvTranspose2d(n_in, n_out, 2, 2) for n_in, n_out in zip(lower, upper, strict=True)
        )
        self.decoder = nn.ModuleList(Stage(2 * n, n, 1) for n in upper)
        self.heads = nn.ModuleList(nn.Conv2d(n, 1, 1) for n in upper[-config.supervised :])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()
        logits = []
        first_head = len(self.decoder) - len(self.heads)
        for level, (up, stage) in enumerate(zip(self.upsampling, self.decoder, strict=True)):
            x = stage(torch.cat([up(x), skips.pop()], dim=1))
            if level >= first_head:
                logits.append(self.heads[level - first_head](x)[:, 0])
        return logits


def load_flax(model: nn.Module, params: Mapping[str, np.ndarray]) -> None:
    """Copies our U-Net's arrays, by dotted path, into `UNet`."""
    state = {}
    for name, value in params.items():
        stem, leaf = name.rsplit(".", 1)
        value = value.transpose(TO_TORCH) if leaf == "kernel" else value
        state[f"{stem}.{'bias' if leaf == 'bias' else 'weight'}"] = torch.tensor(np.array(value))
    model.load_state_dict(state)


def to_flax(model: nn.Module) -> dict[str, np.ndarray]:
    """Returns the model's arrays in Flax's layout, the inverse of `load_flax`."""
    params = {}
    for name, value in model.state_dict().items():
        stem, leaf = name.rsplit(".", 1)
        array = value.detach().numpy()
        if leaf == "weight":
            leaf = "kernel" if array.ndim == 4 else "scale"
        params[f"{stem}.{leaf}"] = array.transpose(TO_FLAX) if leaf == "kernel" else array
    return params


def inputs(batch: Mapping[str, np.ndarray], config: UNetConfig) -> torch.Tensor:
    """Converts a loader's batch to the network's input with our preprocessing."""
    pixels = encoder_input(batch["image"], batch["valid_shape"], config.preprocessing)
    x = torch.tensor(np.array(pixels)).permute(0, 3, 1, 2)
    if config.box_channel:
        boxes = torch.tensor(stored_to_input(batch["box"], config.preprocessing))
        x_min, y_min, x_max, y_max = boxes.T[:, :, None]
        position = torch.arange(config.image_size)
        rows = (position >= y_min) & (position <= y_max)
        columns = (position >= x_min) & (position <= x_max)
        x = torch.cat([x, (rows[:, :, None] & columns[:, None, :])[:, None].float()], dim=1)
    return x.contiguous(memory_format=torch.channels_last)


def on_stored_grid(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes logits [B, h, w] to the size of the stored slices."""
    resized = F.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)
    return resized[:, 0]


def loss_of(stages: list[torch.Tensor], batch: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Returns soft Dice plus cross-entropy over all supervised stages, without padding."""
    size = batch["mask"].shape[-1]
    truth = torch.tensor(batch["mask"] > 0).float()
    valid = torch.tensor(_valid(batch["valid_shape"], size)).float()
    weights = [0.5**i / (2 - 0.5 ** (len(stages) - 1)) for i in range(len(stages))]
    total = torch.zeros(())
    for weight, logits in zip(weights, reversed(stages), strict=True):
        logits = on_stored_grid(logits, size)
        probability, target = torch.sigmoid(logits) * valid, truth * valid
        overlap = (probability * target).sum((1, 2))
        squares = (probability**2).sum((1, 2)) + target.sum((1, 2))
        dice = 1 - (2 * overlap + 1e-5) / (squares + 1e-5)
        entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * valid
        entropy = entropy.sum((1, 2)) / valid.sum((1, 2))
        total = total + weight * (dice + entropy).mean()
    return total


def _valid(valid_shape: np.ndarray, size: int) -> np.ndarray:
    position = np.arange(size)
    rows, columns = (position < valid_shape[:, axis, None] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


def make_optimizer(model: nn.Module, config) -> torch.optim.Optimizer:
    """Returns AdamW with decay of kernels only, as in `training.optimizer`."""
    kernels = [value for value in model.parameters() if value.ndim == 4]
    others = [value for value in model.parameters() if value.ndim < 4]
    groups = [{"params": kernels, "weight_decay": config.weight_decay}, {"params": others}]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)  # the betas are optax's defaults


def step_once(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Mapping[str, np.ndarray],
    model_config: UNetConfig,
    config,
    learning_rate: float,
) -> tuple[float, float]:
    """Runs one step; returns the loss and the gradient norm before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    loss = loss_of(model(inputs(batch, model_config)), batch)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or float("inf"))
    optimizer.step()
    return float(loss.detach()), float(norm)


def train(config, workdir: Path) -> None:
    """Trains with the configuration; writes `tune.csv` and `best/` to `workdir`."""
    origin = resolve(config.checkpoint)
    model_config = read_config(origin)
    if not isinstance(model_config, UNetConfig):
        raise UserError(f"config.checkpoint: {config.checkpoint} holds no U-Net")
    model = UNet(model_config).to(memory_format=torch.channels_last)
    load_flax(model, read_params(origin))
    evaluated = copy.deepcopy(model) if config.ema_decay else model
    optimizer = make_optimizer(model, config)
    schedule = learning_rate_schedule(config)
    rates = [float(schedule(step)) for step in range(config.num_steps)]
    data = train_loader(
        config.data_dir,
        "train",
        batch_size=config.batch_size,
        seed=config.seed,
        box_jitter=config.box_jitter,
        augmentation=augmentation_of(config),
    )
    workdir.mkdir(parents=True, exist_ok=True)
    best = -1.0
    with (workdir / "tune.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "dice", "seconds"])
        start = time.monotonic()
        for step in range(config.num_steps + 1):
            if step % config.eval_every == 0 or step == config.num_steps:
                score = tune_dice(evaluated, model_config, config)
                row = [step, f"{score:.4f}", f"{time.monotonic() - start:.0f}"]
                writer.writerow(row)
                file.flush()
                print("step {}: tune DSC {}, {} s".format(*row), flush=True)
                if score > best:
                    best = score
                    metadata = {"licence": "Apache-2.0", "source": {"naming": "unet_pytorch"}}
                    arrays = to_flax(evaluated)
                    save_model(workdir / "best", arrays, model_config, metadata, overwrite=True)
            if step == config.num_steps:
                return
            step_once(model, optimizer, next(data), model_config, config, rates[step])
            if config.ema_decay:
                _move_average(evaluated, model, config.ema_decay)


@torch.no_grad()
def _move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)


@torch.no_grad()
def tune_dice(model: nn.Module, model_config: UNetConfig, config) -> float:
    """Returns the mean DSC over the tune split's objects, with the boxes of our training."""
    return float(np.mean(list(_tune_scores(model, model_config, config))))


def _tune_scores(model: nn.Module, model_config: UNetConfig, config) -> Iterator[float]:
    objects = eval_objects(
        config.data_dir,
        "tune",
        batch_size=config.eval_batch_size,
        box_jitter=config.box_jitter,
        seed=config.seed,
    )
    for batch in objects:
        size = batch["mask"].shape[-1]
        valid = _valid(batch["valid_shape"], size)
        logits = on_stored_grid(model(inputs(batch, model_config))[-1], size).numpy()
        scores = dice_batch((logits > 0) & valid, (batch["mask"] > 0) & valid)
        yield from np.asarray(scores)[batch["weight"] > 0]


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it writes
    train(_CONFIG.value, Path(_WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    run(main)
