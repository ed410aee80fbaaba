"""LiteMedSAM: both encoders frozen, mask decoder trained on boxes, from cached embeddings.

Command:  python -m medsam_jax.train --config configs/lite_medsam.py --workdir W \
              --config.data_dir=DATA --config.embedding_cache=CACHE
Data:     python -m datasets.build --recipe lite
Hardware: a CPU will do. For points see docs/training.md.
Time, memory and scores: not yet measured.
"""

import ml_collections

from medsam_jax.training.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config()
    config.num_steps = 5000
    config.learning_rate = 1e-4
    config.schedule = "cosine"
    config.warmup_steps = 100
    config.eval_every = 250
    config.checkpoint_every = 250
    config.early_stop_evals = 8
    return config
