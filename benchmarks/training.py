"""Rows of the training step on LiteMedSAM, against the same step written in PyTorch.

Both steps consist of forward pass, soft Dice and cross-entropy, gradients of the same parameters,
clipping to a norm of 1, and AdamW with decay of kernels. The rows compare loss and gradient norm of
the second step, which depend on the first update too.
"""

import re

import numpy as np

from benchmarks.counting import least_work
from benchmarks.harness import Contender, Row, Work
from benchmarks.models import INPUTS, KEEP_BUFFERS, jax_lite_medsam, torch_lite_medsam

SIDE = 256
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0
BOTH_ENCODERS = (r"image_encoder\..*", r"prompt_encoder\..*")
PROMPT_ENCODER = (r"prompt_encoder\..*",)


def batches(size: int, cached: bool) -> list[dict[str, np.ndarray]]:
    """Returns batches of ellipses with boxes, on noise or on embeddings scaled like real ones."""
    rng = np.random.default_rng(0)
    return [_batch(rng, size, cached) for _ in range(INPUTS)]


def _batch(rng, size: int, cached: bool) -> dict[str, np.ndarray]:
    centre = rng.uniform(90, 160, (size, 2))
    radius = rng.uniform(20, 60, (size, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    pairs = zip(centre, radius, strict=True)
    away = [((y - c[0]) / r[0]) ** 2 + ((x - c[1]) / r[1]) ** 2 for c, r in pairs]
    batch = {
        "mask": (np.stack(away) < 1).astype(np.uint8),
        "box": np.hstack([(centre - radius)[:, ::-1], (centre + radius)[:, ::-1]]),
        "valid_shape": np.full((size, 2), SIDE, np.int32),
    }
    batch["box"] = batch["box"].astype(np.float32)
    if cached:
        batch["embedding"] = rng.standard_normal((size, 64, 64, 256), np.float32)
    else:
        coarse = rng.integers(0, 255, (size, 32, 32, 3), np.uint8)
        batch["image"] = coarse.repeat(8, axis=1).repeat(8, axis=2)
    return batch


def jax_step(batch_size: int, cached: bool, frozen=BOTH_ENCODERS, devices: int = 1) -> Work:
    """Runs the step of `medsam_jax.train` with its recipe's defaults on all devices of jax."""
    import jax

    from medsam_jax.models.functional import parameter_names
    from medsam_jax.ops.compile import jit
    from medsam_jax.training import optimizer as opt
    from medsam_jax.training import sharding
    from medsam_jax.training.config import base_config
    from medsam_jax.training.step import init_state, make_train_step, parts_of_batch

    if jax.device_count() != devices:
        raise RuntimeError(f"{jax.device_count()} devices, not {devices}")
    config = base_config()
    config.update({"batch_size": batch_size, "frozen": tuple(frozen), "learning_rate": RATE})
    config.update({"weight_decay": DECAY, "clip_norm": CLIP})
    functional = jax_lite_medsam(devices=devices)
    model = functional.bind(functional.arrays)
    names = parameter_names(model)
    labels = opt.label_parameters(functional.arrays, names, config.frozen)
    tx = opt.make_optimizer(config, labels)
    state = init_state(functional.arrays, labels, tx, config)
    mesh = sharding.make_mesh(config)
    by_item, whole = sharding.batch_sharding(mesh), sharding.shard_state(mesh, state)
    state = jax.tree.map(sharding.place, state, whole)
    parts = parts_of_batch(model, config, functional.form, devices)
    plain = make_train_step(functional, tx, labels, config, parts)
    step = jit(
        plain,
        functional.form,
        in_shardings=(whole, by_item),
        out_shardings=(whole, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    inputs = [sharding.put_batch(batch, by_item) for batch in batches(batch_size, cached)]
    counted = least_work(plain, state, inputs[0])

    def run(index):
        nonlocal state
        state, scalars = step(state, inputs[index % INPUTS])
        return np.array(scalars["loss"]), np.array(scalars["gradient_norm"])

    run(1)
    return Work(run, items=batch_size, **counted)


def torch_step(batch_size: int, cached: bool, frozen=BOTH_ENCODERS) -> Work:
    """Runs the same step in PyTorch; BatchNorm uses its stored statistics, as ours does."""
    import torch

    model = torch_lite_medsam()
    optimizer, trained = _torch_optimizer(model, frozen)
    trains_encoder = any(p.requires_grad for p in model.image_encoder.parameters())
    inputs = [_torch_batch(batch) for batch in batches(batch_size, cached)]

    def run(index):
        batch = inputs[index % INPUTS]
        if cached:
            embedding = batch["embedding"]
        else:
            with torch.set_grad_enabled(trains_encoder):
                embedding = model.image_encoder(_min_max(batch["image"]))
        with torch.no_grad():
            sparse, dense = model.prompt_encoder(points=None, boxes=batch["box"], masks=None)
        logits, _ = model.mask_decoder(
            image_embeddings=embedding,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        loss = torch_loss(logits[:, 0], batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return loss.detach().numpy(), norm.numpy()

    run(1)
    return Work(run, items=batch_size)


def torch_loss(logits, target):
    """Returns MedSAM's loss for logits and target [B, H, W]: soft Dice plus cross-entropy."""
    import torch

    probability = torch.sigmoid(logits)
    overlap = (probability * target).sum(dim=(1, 2))
    size = (probability**2).sum(dim=(1, 2)) + target.sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return dice.mean() + torch.nn.functional.binary_cross_entropy_with_logits(logits, target)


def _torch_optimizer(model, frozen):
    import torch

    decayed, undecayed = [], []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(re.fullmatch(regex, name) for regex in frozen)
        if parameter.requires_grad:
            kernel = name.endswith("weight") and parameter.ndim > 1 and "token.w" not in name
            kernel = kernel and "mask_tokens" not in name  # an embedding, like iou_token
            (decayed if kernel else undecayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.999)), decayed + undecayed


def _torch_batch(batch: dict[str, np.ndarray]) -> dict:
    import torch

    moved = {
        "mask": torch.from_numpy(batch["mask"]).float(),
        "box": torch.from_numpy(batch["box"])[:, None],
    }
    for name in {"embedding", "image"} & batch.keys():
        moved[name] = torch.from_numpy(batch[name]).permute(0, 3, 1, 2).contiguous()
    return moved


def _min_max(images):
    images = images.float()
    low = images.amin(dim=(1, 2, 3), keepdim=True)
    high = images.amax(dim=(1, 2, 3), keepdim=True)
    return (images - low) / (high - low)


def contender(name: str, function: str = "jax_step", environment=None, **arguments) -> Contender:
    return Contender(name, f"benchmarks.training:{function}", arguments, environment or {})


def _against_pytorch(name: str, targets: dict[str, float], **arguments) -> Row:
    return Row(
        f"training step, {name}, batch {arguments['batch_size']}",
        "cpu",
        (
            contender("medsam_jax", **arguments),
            contender("PyTorch", "torch_step", **arguments),
            contender("PyTorch, buffers kept", "torch_step", KEEP_BUFFERS, **arguments),
        ),
        targets=targets,
        memory_targets={"PyTorch": 1.0},
        tolerance=1e-3,  # Adam's first update is the gradient's sign, also for rounding errors
        rounds=9,
    )


ROWS = (
    _against_pytorch("decoder on cached embeddings", {"PyTorch": 0.65}, batch_size=8, cached=True),
    _against_pytorch("decoder, encoder run each time", {}, batch_size=4, cached=False),
    _against_pytorch(
        "image encoder and decoder",
        {"PyTorch": 0.8},
        batch_size=2,
        cached=False,
        frozen=PROMPT_ENCODER,
    ),
)
