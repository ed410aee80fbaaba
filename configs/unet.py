"""U-Net from random weights: the baseline that sees the same boxes (nnU-Net's 2D kind).

Commands:
  python -m weights_converter.init --model unet --output runs/unet/init
  python -m medsam_jax.train --config configs/unet.py --workdir runs/unet/box \
      --config.checkpoint=runs/unet/init --config.data_dir=DATA
  python -m medsam_jax.evaluate --checkpoint lite_medsam,runs/unet/box/best --data_dir DATA \
      --output results/unet

Without the box: `--nobox_channel` in the first command. For a specialist of one task:
`--config.task=TASK`; otherwise one model is trained for all tasks. The full width needs a GPU and
has not been trained yet. `unet_small.py` is for a CPU, with scores in docs/results.md.
"""

import ml_collections

from medsam_jax.training.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config()
    config.checkpoint = "runs/unet/init"
    config.frozen = ()  # everything is trained
    config.num_steps = 10_000
    config.batch_size = 16
    config.learning_rate = 3e-4
    config.schedule = "cosine"
    config.warmup_steps = 200
    config.eval_every = 500
    config.checkpoint_every = 500
    return config
