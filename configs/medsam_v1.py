"""MedSAM v1: SAM ViT-B with image and prompt encoder frozen, mask decoder trained on boxes.

Adam 1e-5 without decay, batch 8, box jitter up to 19 pixels of the 256 x 256 slice (FLARE and
MedSAM's first release). Put `sam_vit_b_01ec64.pth` where `docs/weights.md` says.

Command:  python -m medsam_jax.train --config configs/medsam_v1.py --workdir W \
              --config.data_dir=DATA --config.embedding_cache=CACHE
Data:     python -m datasets.build --recipe v1
Hardware: one accelerator; the encoder runs once for each slice, then steps run the decoder alone.
Time, memory and scores: not yet measured.
"""

import ml_collections

from medsam_jax.training.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config()
    config.checkpoint = "sam_vit_b"
    config.preprocessing = "v1"
    config.num_steps = 20_000
    config.optimizer = "adam"
    config.learning_rate = 1e-5
    config.weight_decay = 0.0
    config.clip_norm = 0.0
    config.box_jitter = 19
    config.eval_every = 1000
    config.checkpoint_every = 1000
    return config
