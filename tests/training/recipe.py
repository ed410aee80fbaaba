"""The default of every field, as a recipe for the command line."""

from medsam_jax.training.config import base_config

get_config = base_config
