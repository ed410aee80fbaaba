"""Rows for a GPU: SAM's ViT in bfloat16 against that of `transformers` under `torch.compile`.

The rows need jax, flax, torch and transformers, but no data set and no network. Both sides have the
same random weights. Tests run the same code with a small encoder on a CPU.
"""

import dataclasses

import numpy as np

from benchmarks.harness import Contender, Row, Work
from benchmarks.models import INPUTS

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # SAM's
FROZEN = {
    "full": (r"prompt_encoder\..*",),
    "decoder": (r"image_encoder\..*", r"prompt_encoder\..*"),
}
RATE, DECAY = 1e-4, 0.01
# Both processes of a row share one GPU: jax must not reserve three quarters of its memory at start.
GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def sam_config(encoder: str, dtype: str = "bfloat16"):
    """Returns SAM at 1024 pixels ("vit_b", "vit_l", "vit_h"), or "small" at 256 for tests."""
    from medsam_jax.models.image_encoder import ViTConfig
    from medsam_jax.models.sam import SamConfig

    if encoder != "small":
        return dataclasses.replace(getattr(SamConfig, encoder)(), dtype=dtype)
    config = SamConfig.vit_b()
    return dataclasses.replace(
        config,
        encoder=ViTConfig(32, 2, 2, (1,)),
        image_size=256,
        preprocessing=dataclasses.replace(config.preprocessing, recipe="lite", image_size=256),
        dtype=dtype,
    )


def random_arrays(config) -> dict[str, np.ndarray]:
    """Returns random weights of usual scale for all variables, the same in every process."""
    from medsam_jax.models.checkpoint import abstract_model
    from medsam_jax.models.functional import flatten_state

    rng, arrays = np.random.default_rng(0), {}
    for name, variable in flatten_state(abstract_model(config)).items():
        leaf, shape = name.rsplit(".", 1)[1], variable.shape
        fan_in = np.prod(shape[:-1]) if leaf == "kernel" else 100
        value = rng.standard_normal(shape, np.float32) / np.sqrt(fan_in, dtype=np.float32)
        arrays[name] = 1 + value if leaf == "scale" else value
    return arrays


def images(config, batch: int) -> list[np.ndarray]:
    """Returns images of noise blocks, uint8 [B, S, S, 3]."""
    rng, side = np.random.default_rng(0), config.image_size // 32
    coarse = rng.integers(0, 255, (INPUTS, batch, 32, 32, 3), np.uint8)
    return [x.repeat(side, axis=1).repeat(side, axis=2) for x in coarse]


def batches(config, batch: int, cached: bool) -> list[dict[str, np.ndarray]]:
    """Returns rectangles as objects, their boxes, and images or embeddings [B, h, w, 256]."""
    return [_batch(np.random.default_rng(i), config, batch, cached) for i in range(INPUTS)]


def _batch(rng, config, batch: int, cached: bool) -> dict[str, np.ndarray]:
    side, grid = config.image_size, config.embedding_size
    corner, size = rng.integers(side // 16, side // 2, (2, batch, 2))
    box = np.hstack([corner, corner + size])  # x0, y0, x1, y1
    position = np.arange(side)
    columns, rows = (
        (position >= box[:, axis, None]) & (position < box[:, axis + 2, None]) for axis in (0, 1)
    )
    if cached:
        embedding = rng.standard_normal((batch, grid, grid, config.embed_dim), np.float32)
        source = {"embedding": embedding}
    else:
        source = {"image": images(config, batch)[rng.integers(INPUTS)]}
    return source | {
        "mask": (rows[:, :, None] & columns[:, None, :]).astype(np.uint8),
        "box": box.astype(np.float32),
        "valid_shape": np.full((batch, 2), side, np.int32),
    }


def encoder_operations(config, batch: int) -> float:
    """Returns the operations of the ViT's matrix products, without the padding of windows."""
    vit, tokens = config.encoder, config.embedding_size**2
    width, patch = vit.embed_dim, vit.patch_size
    blocks = 0
    for index in range(vit.depth):
        keys = tokens if index in vit.global_attn_indexes else vit.window_size**2
        blocks += 2 * tokens * width * (4 + 2 * vit.mlp_ratio) * width + 4 * tokens * keys * width
    neck = 2 * tokens * config.embed_dim * (width + 9 * config.embed_dim)
    return batch * (blocks + neck + 2 * tokens * 3 * patch**2 * width)


def jax_encoder(encoder: str, batch: int) -> Work:
    """Runs `model.image_encoder` on normalised images under jit."""
    import jax

    config = sam_config(encoder)
    functional = _functional(config)
    encode = jax.jit(lambda arrays, x: functional.bind(arrays).image_encoder(x))
    arrays = jax.device_put(functional.arrays)
    inputs = [jax.device_put(_normalised(x)) for x in images(config, batch)]

    def run(index):
        return encode(arrays, inputs[index % INPUTS]).astype("float32").block_until_ready()

    operations = encoder_operations(config, batch)
    return Work(run, operations, items=batch, peak_memory=_jax_memory())


def torch_encoder(encoder: str, batch: int, backend: str = "inductor") -> Work:
    """Runs the compiled `SamModel.vision_encoder` in bfloat16."""
    import torch

    config = sam_config(encoder)
    model = transformers_sam(config).to(torch.bfloat16)
    compiled = torch.compile(model.vision_encoder, backend=backend)
    inputs = [
        torch.from_numpy(_normalised(x)).permute(0, 3, 1, 2).to(model.device, torch.bfloat16)
        for x in images(config, batch)
    ]

    @torch.no_grad()
    def run(index):
        embedding = compiled(inputs[index % INPUTS].contiguous())[0]
        return embedding.permute(0, 2, 3, 1).float().cpu().numpy()

    return Work(run, items=batch, peak_memory=_torch_memory())


def jax_step(encoder: str, batch: int, trained: str) -> Work:
    """Runs `medsam_jax.train`'s bfloat16 step, on embeddings ("decoder") or images ("full")."""
    import jax

    from benchmarks.counting import least_work
    from medsam_jax.models.functional import parameter_names
    from medsam_jax.training import optimizer as opt
    from medsam_jax.training.config import base_config
    from medsam_jax.training.step import init_state, make_train_step

    config = base_config()
    config.update({"batch_size": batch, "frozen": FROZEN[trained], "learning_rate": RATE})
    config.update({"weight_decay": DECAY, "clip_norm": 1.0})
    model_config = sam_config(encoder)
    functional = _functional(model_config)
    names = parameter_names(functional.bind(functional.arrays))
    labels = opt.label_parameters(functional.arrays, names, config.frozen)
    tx = opt.make_optimizer(config, labels)
    state = init_state(jax.device_put(functional.arrays), labels, tx, config)
    step = jax.jit(make_train_step(functional, tx, labels, config), donate_argnums=0)
    inputs = [jax.device_put(x) for x in batches(model_config, batch, trained == "decoder")]
    if trained == "decoder":
        operations = least_work(step, state, inputs[0])["operations"]
    else:  # `least_work` does not count fused attention; the decoder's work is negligible
        operations = 3 * encoder_operations(model_config, batch)

    def run(index):
        nonlocal state
        state, scalars = step(state, inputs[index % INPUTS])
        return np.array(scalars["loss"])

    return Work(run, operations, items=batch, peak_memory=_jax_memory())


def torch_step(encoder: str, batch: int, trained: str, backend: str = "inductor") -> Work:
    """Runs the same step with transformers' SamModel: bfloat16 autocast, compiled, fused AdamW."""
    import torch

    from benchmarks.training import torch_loss

    config = sam_config(encoder)
    model = transformers_sam(config)
    frozen = ("prompt_encoder", "shared_image") + (("vision_",) if trained == "decoder" else ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen)
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = {"fused": True} if model.device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY, **fused)
    inputs = [
        _torch_batch(item, model.device) for item in batches(config, batch, trained == "decoder")
    ]

    def forward(sources, box, mask):
        with torch.autocast(model.device.type, torch.bfloat16):
            answer = model(**sources, input_boxes=box, multimask_output=False)
        logits = torch.nn.functional.interpolate(
            answer.pred_masks[:, 0].float(), mask.shape[1:], mode="bilinear", align_corners=False
        )
        return torch_loss(logits[:, 0], mask)

    compiled = torch.compile(forward, backend=backend)

    def run(index):
        optimizer.zero_grad(set_to_none=True)
        loss = compiled(*inputs[index % INPUTS])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach().cpu().numpy()

    return Work(run, items=batch, peak_memory=_torch_memory())


def _functional(config):
    from medsam_jax.models.checkpoint import build_model
    from medsam_jax.models.functional import Functional
    from medsam_jax.ops.form import local_form

    model = build_model(config, random_arrays(config), "random weights")
    return Functional(model, local_form())


def _normalised(pictures: np.ndarray) -> np.ndarray:
    return ((pictures - np.array(MEAN)) / np.array(STD)).astype(np.float32)


def _torch_batch(item: dict[str, np.ndarray], device) -> tuple:
    import torch

    if "embedding" in item:
        source = torch.from_numpy(item["embedding"]).permute(0, 3, 1, 2)
        sources = {"image_embeddings": source.contiguous().to(device)}
    else:
        source = torch.from_numpy(_normalised(item["image"])).permute(0, 3, 1, 2)
        sources = {"pixel_values": source.contiguous().to(device)}
    box = torch.from_numpy(item["box"])[:, None].to(device)
    return sources, box, torch.from_numpy(item["mask"]).float().to(device)


def transformers_sam(config):
    """Returns transformers' SamModel with `random_arrays`, on the GPU if there is one."""
    import torch
    from transformers import SamConfig, SamModel

    from weights_converter.names import TRANSFORMERS, to_naming, torch_leaf

    vit = config.encoder
    vision = {
        "hidden_size": vit.embed_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "global_attn_indexes": list(vit.global_attn_indexes),
        "window_size": vit.window_size,
        "mlp_dim": int(vit.mlp_ratio * vit.embed_dim),
        "image_size": config.image_size,
    }
    prompt = {"image_size": config.image_size, "patch_size": vit.patch_size}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt))
    state = {}
    for path, value in random_arrays(config).items():
        name, leaf = torch_leaf(path, value.ndim)
        tensor = torch.from_numpy(np.ascontiguousarray(leaf.to_torch(value)))
        state[to_naming(name, TRANSFORMERS)] = tensor
    found = model.load_state_dict(state, strict=False)
    missing = [name for name in found.missing_keys if "shared_embedding" not in name]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"transformers: missing {missing}, unexpected {found.unexpected_keys}")
    model.prompt_encoder.shared_embedding = model.shared_image_embedding
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _jax_memory():
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return None
    return lambda: device.memory_stats()["peak_bytes_in_use"]


def _torch_memory():
    import torch

    return torch.cuda.max_memory_allocated if torch.cuda.is_available() else None


def row(name: str, function: str, target: float | None, peer=None, **arguments) -> Row:
    """Builds one of `ROWS`, or a row for a test; `peer` has extra arguments of PyTorch's side."""
    theirs = "transformers, torch.compile"
    setup = f"benchmarks.gpu:{{}}_{function}"
    return Row(
        name,
        "gpu",
        (
            Contender("medsam_jax", setup.format("jax"), arguments, GROWING),
            Contender(theirs, setup.format("torch"), arguments | (peer or {}), GROWING),
        ),
        targets={} if target is None else {theirs: target},
        memory_targets={theirs: 1.0},
        tolerance=0.05,  # bfloat16 has 8 bits, and the two sides round at different places
        precision="bfloat16",
    )


ROWS = (
    row("ViT-B encoder, batch 1, bfloat16", "encoder", 1 / 1.3, encoder="vit_b", batch=1),
    row("ViT-B encoder, batch 8, bfloat16", "encoder", 1 / 1.3, encoder="vit_b", batch=8),
    row("ViT-L encoder, batch 8, bfloat16", "encoder", None, encoder="vit_l", batch=8),
    row("ViT-H encoder, batch 8, bfloat16", "encoder", None, encoder="vit_h", batch=8),
    row(
        "ViT-B training step, image encoder and decoder, batch 4, bfloat16",
        "step",
        1 / 1.2,
        encoder="vit_b",
        batch=4,
        trained="full",
    ),
    row(
        "ViT-B training step, decoder on cached embeddings, batch 32, bfloat16",
        "step",
        1 / 1.5,
        encoder="vit_b",
        batch=32,
        trained="decoder",
    ),
)
