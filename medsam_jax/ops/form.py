"""Form of a program's operations, chosen once, where the program is jitted.

Every operation of this package has a plain form, given by its first lines. It may have other forms,
which compute the same result faster on some device. `Functional(model, form)` passes the choice to
the model's modules, and they pass it to the operations. No operation queries the device.
"""

import dataclasses

import jax
from jax.sharding import AbstractMesh, Mesh

from medsam_jax.errors import UserError

AnyMesh = Mesh | AbstractMesh | None

# Of products and convolutions of float32 arrays, as jax names them. On a TPU they are made of six,
# three or one bfloat16 products; "high" and "default" are TF32 on Ampere and later GPUs. A CPU
# always computes in float32, and bfloat16 arrays are multiplied exactly everywhere.
MATMUL_PRECISIONS = ("highest", "high", "default")


@dataclasses.dataclass(frozen=True)
class Form:
    """The device that a program is written for, what it can do, and how exactly it multiplies.

    Raises UserError for an unknown `matmul_precision`.
    """

    device: str = "plain"  # "plain", "cpu" or "accelerator"
    image_by_image: bool = False  # encode the images of a batch one after another
    folded: bool = False  # the arrays are those of `Functional.for_inference`
    kernels: bool = True  # use the platform's Pallas kernels in programs for accelerators
    mesh: AnyMesh = None  # devices that the batch is sharded over
    matmul_precision: str = "highest"  # one of `MATMUL_PRECISIONS`

    def __post_init__(self) -> None:
        if self.matmul_precision not in MATMUL_PRECISIONS:
            raise UserError(
                f"matmul_precision: {self.matmul_precision!r} given; use one of "
                f"{', '.join(MATMUL_PRECISIONS)}"
            )

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


def form_for(platform: str, devices: int = 1, matmul_precision: str = "highest") -> Form:
    """Returns the form of programs for "cpu", "gpu", "cuda", "rocm" or "tpu", here or elsewhere.

    A batch is sharded over `devices`.
    """
    form = ACCELERATOR
    if platform == "cpu":
        form = CPU if devices == 1 else CPU_MESH
    return dataclasses.replace(form, matmul_precision=matmul_precision)


def local_form(devices: int = 1, matmul_precision: str = "highest") -> Form:
    """Returns the form of programs for this process's devices."""
    form = form_for(jax.default_backend(), devices, matmul_precision)
    try:  # a number on NVIDIA GPUs alone: on ROCm devices it is the name of an architecture
        capability = float(getattr(jax.local_devices()[0], "compute_capability", ""))
    except (TypeError, ValueError):
        return form
    return dataclasses.replace(form, kernels=capability >= 8)  # Triton needs Ampere or later
