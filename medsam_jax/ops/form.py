"""The form in which a program's operations are written: chosen once, where it is jitted.

Every operation of this package has a plain form, which its first lines state, and may have others
that compute the same faster on some device. `Functional(model, form)` hands the choice to the
model's modules, which hand it to the operations; nothing below asks which device there is.
"""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Form:
    """The device that a program is written for, and what it can do."""

    device: str = "plain"  # "plain", "cpu" or "accelerator"
    image_by_image: bool = False  # encode the images of a batch one after another
    cudnn: bool = False  # attention in half precision by cuDNN's kernel
    cudnn_head_dim: int = 0  # the longest vectors that the kernel takes

    @property
    def cpu(self) -> bool:
        """Whether to work in pieces that stay in a CPU core's cache."""
        return self.device == "cpu"


PLAIN = Form()
# A batch that is spread over several CPU devices stays whole, or each would encode every image.
CPU = Form("cpu", image_by_image=True)
CPU_MESH = Form("cpu")
ACCELERATOR = Form("accelerator")


def form_for(platform: str, devices: int = 1) -> Form:
    """The form of programs that are compiled for a platform, on this machine or another.

    Args:
      platform: "cpu", "gpu", "cuda", "rocm" or "tpu".
      devices: over how many a batch is spread.
    """
    if platform == "cpu":
        return CPU if devices == 1 else CPU_MESH
    return ACCELERATOR


def local_form(devices: int = 1) -> Form:
    """The form of programs for this process's own devices; cuDNN's kernel only where it runs."""
    form = form_for(jax.default_backend(), devices)
    capability = _cuda_capability(jax.local_devices()[0])
    if capability is None:
        return form
    # cuDNN's attention takes longer vectors from Hopper on.
    return dataclasses.replace(form, cudnn=True, cudnn_head_dim=256 if capability >= 9 else 128)


def _cuda_capability(device: Any) -> float | None:
    """Compute capability of an NVIDIA GPU; None for ROCm, whose devices name an architecture."""
    try:
        return float(getattr(device, "compute_capability", ""))
    except (TypeError, ValueError):
        return None
