"""SAM and MedSAM in JAX/Flax: promptable segmentation of medical images, with training.

Public names are imported on first use, so that `import medsam_jax` stays quick.
"""

import importlib

_PUBLIC = {
    "load_model": "medsam_jax.hub",
    "read_scan": "medsam_jax.io.scans",
    "Predictor": "medsam_jax.inference.predictor",
    "AutomaticMaskGenerator": "medsam_jax.inference.automatic_mask_generator",
    "VolumePredictor": "medsam_jax.inference.volume",
    "dice": "medsam_jax.metrics.overlap",
    "normalized_surface_dice": "medsam_jax.metrics.surface",
}
__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'medsam_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
