"""Low-rank adapters on the attention of SAM ViT-B's image encoder; everything else is frozen.

Follows SAMed (Zhang and Liu 2023), on qkv and proj of every block, with MedSAM v2's slices. To
train the mask decoder too: --config.frozen="(r'image_encoder\\..*', r'prompt_encoder\\..*')". For
LiteMedSAM: --config.checkpoint=lite_medsam --config.preprocessing= --config.remat=False.

Command:  python -m medsam_jax.train --config configs/lora.py --workdir W --config.data_dir=DATA
Data:     python -m datasets.build --recipe v2
Hardware: one accelerator; 442 thousand of 94 million parameters are trained.
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
    config.frozen = (r".*",)
    config.lora.rank = 8
    config.lora.alpha = 8.0
    config.num_steps = 20_000
    config.learning_rate = 5e-4
    config.schedule = "cosine"
    config.warmup_steps = 250
    config.box_jitter = 20
    config.eval_every = 1000
    config.checkpoint_every = 500
    return config
