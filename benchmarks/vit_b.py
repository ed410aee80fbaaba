"""Rows of SAM's ViT-B encoder at 1024 pixels on a CPU: ours, segment_anything's, transformers'.

All sides have the same random weights, which need no download; weights do not change the speed.
"""

import numpy as np

from benchmarks.gpu import encoder_operations, random_arrays, sam_config, transformers_sam
from benchmarks.harness import Contender, Row, Work
from benchmarks.models import INPUTS, KEEP_BUFFERS, torch_encoder_work

_PREFIX = "image_encoder."


def images() -> list[np.ndarray]:
    """Returns normalised images [1, 1024, 1024, 3] of noise blocks."""
    coarse = np.random.default_rng(0).standard_normal((INPUTS, 1, 64, 64, 3), np.float32)
    return list(coarse.repeat(16, axis=2).repeat(16, axis=3))


def jax_encoder(encoder: str = "vit_b", dtype: str = "float32") -> Work:
    """Runs `model.image_encoder` under one jit."""
    import jax
    from flax import nnx

    from medsam_jax.models.functional import Functional
    from medsam_jax.models.image_encoder import ImageEncoderViT
    from medsam_jax.ops.compile import jit
    from medsam_jax.ops.form import local_form

    config = sam_config(encoder, dtype)
    sizes = config.encoder, config.image_size, config.embed_dim
    abstract = nnx.eval_shape(lambda: ImageEncoderViT(*sizes, dtype=dtype, rngs=nnx.Rngs(0)))
    functional = Functional(abstract, local_form())
    arrays = {name: jax.device_put(value) for name, value in _encoder_arrays(config).items()}
    encode = jit(lambda arrays, x: functional.bind(arrays)(x).astype(x.dtype), functional.form)
    inputs = [jax.device_put(x) for x in images()]
    return Work(
        lambda i: encode(arrays, inputs[i % INPUTS]).block_until_ready(),
        encoder_operations(config, 1),
    )


def segment_anything_encoder(encoder: str = "vit_b") -> Work:
    """Runs segment_anything's `ImageEncoderViT`."""
    import torch

    from tests.parity.torch_models import stub_torchvision

    with stub_torchvision():
        from segment_anything.modeling import ImageEncoderViT
    config = sam_config(encoder, "float32")
    vit = config.encoder
    model = ImageEncoderViT(
        img_size=config.image_size,
        patch_size=vit.patch_size,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
        out_chans=config.embed_dim,
        norm_layer=lambda channels: torch.nn.LayerNorm(channels, eps=1e-6),
        use_rel_pos=True,
        window_size=vit.window_size,
        global_attn_indexes=vit.global_attn_indexes,
    )
    model.load_state_dict(_torch_state(config))
    return torch_encoder_work(model.eval(), images())


def transformers_encoder(encoder: str = "vit_b", dtype: str = "float32") -> Work:
    """Runs transformers' `SamModel.vision_encoder` with PyTorch's fused attention."""
    model = transformers_sam(sam_config(encoder, "float32"))
    found = model.vision_encoder.config._attn_implementation
    if found != "sdpa":
        raise RuntimeError(f"transformers chose attention {found!r}, not sdpa")
    return torch_encoder_work(lambda x: model.vision_encoder(x)[0], images(), dtype)


def _encoder_arrays(config) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(_PREFIX): value
        for name, value in random_arrays(config).items()
        if name.startswith(_PREFIX)
    }


def _torch_state(config) -> dict:
    import torch

    from weights_converter.names import torch_leaf

    state = {}
    for path, value in _encoder_arrays(config).items():
        name, leaf = torch_leaf(_PREFIX + path, value.ndim)
        state[name.removeprefix(_PREFIX)] = torch.from_numpy(
            np.ascontiguousarray(leaf.to_torch(value))
        )
    return state


_HERE = "benchmarks.vit_b:"
_HALF = {"dtype": "bfloat16"}

ROWS = (
    Row(
        name="SAM ViT-B encoder, 1024 pixels",
        suite="cpu",
        contenders=(
            Contender("medsam_jax", f"{_HERE}jax_encoder"),
            Contender("segment_anything", f"{_HERE}segment_anything_encoder"),
            Contender(
                "segment_anything, buffers kept",
                f"{_HERE}segment_anything_encoder",
                environment=KEEP_BUFFERS,
            ),
            Contender("transformers", f"{_HERE}transformers_encoder"),
        ),
        targets={"segment_anything": 0.45, "transformers": 0.6},
        memory_targets={"segment_anything": 1.0, "transformers": 1.0},
        rounds=3,
    ),
    Row(
        name="SAM ViT-B encoder, 1024 pixels, bfloat16",
        suite="cpu",
        contenders=(
            Contender("medsam_jax", f"{_HERE}jax_encoder", _HALF),
            Contender("transformers", f"{_HERE}transformers_encoder", _HALF),
            Contender(
                "transformers, buffers kept", f"{_HERE}transformers_encoder", _HALF, KEEP_BUFFERS
            ),
        ),
        precision="bfloat16",
        tolerance=0.1,
        rounds=3,
    ),
)
