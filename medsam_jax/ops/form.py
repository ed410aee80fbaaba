"""Form of a program's operations, chosen once, where the program is jitted.

Every operation of this package has a plain form, given by its first lines. It may have other forms,
which compute the same result faster on some device. `Functional(model, form)` passes the choice to
the model's modules, and they pass it to the operations. No operation queries the device.
"""

import dataclasses

import jax
from jax.sharding import AbstractMesh, Mesh

AnyMesh = Mesh | AbstractMesh | None


@dataclasses.dataclass(frozen=True)
class Form:
    """The device that a program is written for, and what it can do."""

    device: str = "plain"  # "plain", "cpu" or "accelerator"
    image_by_image: bool = False  # encode the images of a batch one after another
    folded: bool = False  # the arrays are those of `Functional.for_inference`
    kernels: bool = True  # use the platform's Pallas kernels in programs for accelerators
    mesh: AnyMesh = None  # devices that the batch is sharded over

    @property
    def cpu(self) -> bool:
        """Whether to process arrays in pieces that fit a CPU core's cache."""
        return self.device == "cpu"


PLAIN = Form()
# A batch sharded over several CPU devices is encoded at once. Image by image, every device would
# encode every image.
CPU = Form("cpu", image_by_image=True)
CPU_MESH = Form("cpu")
ACCELERATOR = Form("accelerator")


def form_for(platform: str, devices: int = 1) -> Form:
    """Returns the form of programs for "cpu", "gpu", "cuda", "rocm" or "tpu", here or elsewhere.

    A batch is sharded over `devices`.
    """
    if platform == "cpu":
        return CPU if devices == 1 else CPU_MESH
    return ACCELERATOR


def local_form(devices: int = 1) -> Form:
    """Returns the form of programs for this process's devices."""
    form = form_for(jax.default_backend(), devices)
    try:  # a number on NVIDIA GPUs alone: on ROCm devices it is the name of an architecture
        capability = float(getattr(jax.local_devices()[0], "compute_capability", ""))
    except (TypeError, ValueError):
        return form
    return dataclasses.replace(form, kernels=capability >= 8)  # Triton needs Ampere or later
