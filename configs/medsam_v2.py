"""MedSAM (Nature Communications 15:654, 2024): SAM ViT-B, image encoder and mask decoder trained.

AdamW (0.9, 0.999), constant 1e-4, decay 0.01, box jitter up to 20 pixels of the 1024 x 1024 slice;
the paper's global batch is 160 for 150 epochs: set `num_steps` to 150 * slices / 160.

Command:  python -m medsam_jax.train --config configs/medsam_v2.py --workdir W \
              --config.data_dir=DATA
Data:     python -m datasets.build --recipe v2
Hardware: several accelerators: --config.mesh.fsdp=N splits the state, and
          --config.accumulation_steps=K processes a batch in parts if 160 slices do not fit.
Time, memory and scores: not yet measured.
"""

import ml_collections

from medsam_jax.training.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config()
    config.checkpoint = "sam_vit_b"
    config.preprocessing = "v2"
    config.dtype = "bfloat16"
    config.remat = True
    config.frozen = (r"prompt_encoder\..*",)
    config.batch_size = 160
    config.num_steps = 100_000
    config.box_jitter = 20
    config.clip_norm = 0.0
    config.eval_every = 2000
    config.checkpoint_every = 1000
    return config
