"""As `boxes_and_points.py`, on four versions of every slice whose embeddings are cached.

The decoder learns 14 patients by heart in 250 steps; here it sees each slice as stored and three
times flipped, rotated, scaled and changed in contrast, and twice the steps. The image encoder stays
frozen, so what costs time is one pass of it over the four versions.

Command:  python -m medsam_jax.train --config configs/boxes_and_points_augmented.py --workdir W \
              --config.data_dir=DATA --config.embedding_cache=CACHE
Data:     python -m datasets.build --recipe lite
Hardware: a CPU will do.
"""

import ml_collections

from medsam_jax.training.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config()
    config.embedding_variants = 4
    config.augmentation.flip = 0.5
    config.augmentation.rotation = 30.0
    config.augmentation.scale = 0.2
    config.augmentation.intensity = 0.15
    config.mask_threshold = -0.5
    config.point_share = 0.5
    config.iou_weight = 1.0
    config.num_steps = 500
    config.learning_rate = 2e-4
    config.schedule = "cosine"
    config.warmup_steps = 20
    config.ema_decay = 0.98
    config.eval_every = 125
    config.eval_batch_size = 2
    config.checkpoint_every = 125
    return config
