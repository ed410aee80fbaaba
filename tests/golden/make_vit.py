"""Makes ``vit.npz``: segment_anything's ViT encoder, small, with random weights, and its answers.

Run from the repository root in the environment of ``make test-parity``:

    python -m tests.golden.make_vit

Holds the weights by our names (``param/...``), images for each input size and the embeddings that
PyTorch gives; position tables are resized by ``torch.nn.functional.interpolate`` where the size is
not that at which the encoder was made.
"""

import functools
from pathlib import Path

import numpy as np
import torch

from tests.parity.torch_models import flax_variables, randomise, stub_torchvision

with stub_torchvision():
    from segment_anything.modeling import ImageEncoderViT

# Windows of 3 in a grid of 8: the last ones are partly padding. Block 1 is global.
SIZES = {
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": (1,),
}
MADE_AT, INPUTS = 32, (20, 32, 48)


def main():
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=MADE_AT,
        out_chans=8,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        **SIZES,
    ).eval()
    randomise(encoder, seed=1)
    golden = {f"param/{k}": v for k, v in flax_variables(encoder.state_dict()).items()}
    pos_embed = encoder.pos_embed.detach()
    for size in INPUTS:
        grid = (size // SIZES["patch_size"],) * 2
        # antialias off and corners not aligned: what SAM's descendants do when they load
        resized = torch.nn.functional.interpolate(
            pos_embed.permute(0, 3, 1, 2), grid, mode="bilinear", align_corners=False
        )
        encoder.pos_embed = torch.nn.Parameter(resized.permute(0, 2, 3, 1))
        image = np.random.default_rng(size).standard_normal((2, size, size, 3), np.float32)
        with torch.no_grad():
            embedding = encoder(torch.from_numpy(image).permute(0, 3, 1, 2).contiguous())
        golden |= {
            f"image/{size}": image,
            f"embedding/{size}": embedding.permute(0, 2, 3, 1).numpy(),
        }
    path = Path(__file__).with_name("vit.npz")
    np.savez_compressed(path, **golden)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
