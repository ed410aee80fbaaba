"""Accelerators whose compilers run on a machine without an accelerator, and their limits.

libtpu compiles for a TPU topology, jax's CUDA plugin for a GPU that a text describes. Neither needs
the device. `prepare` must run before jax is imported.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Limits of one device, from its data sheet. Rates are per second."""

    name: str
    platform: str  # as `ops.form.form_for` takes it
    rates: Mapping[str, float]  # of products, operations by the types of `counting.operations`
    bandwidth: float  # bytes to and from HBM
    link_bandwidth: float  # bytes to and from other devices
    memory: int  # bytes
    launch: float = 0.0  # seconds a kernel takes at least


def _tpu(rate: float) -> dict[str, float]:
    """A TPU multiplies float32 in one, three or six products of bfloat16."""
    passes = {"bfloat16": 1, "float32": 1, "float32 high": 3, "float32 highest": 6}
    return {kind: rate / count for kind, count in passes.items()}


# 800 of the H100's 989 TFLOP/s are what large products reach. TF32 has half the rate; float32
# proper has no tensor cores.
_HOPPER = {"bfloat16": 800e12, "float32": 400e12, "float32 high": 400e12, "float32 highest": 67e12}
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", _tpu(197e12), 819e9, 200e9, 16 * GIB),
        Chip("v6e", "tpu", _tpu(918e12), 1640e9, 448e9, 32 * GIB),
        Chip("v5p", "tpu", _tpu(459e12), 2765e9, 600e9, 95 * GIB),
        Chip("h100", "cuda", _HOPPER, 3352e9, 450e9, 84942979072, launch=2.5e-6),
    )
}

# Devices -> shape in libtpu's name, the smallest one that has as many.
_SHAPES = {
    "v5e": {1: "2x2", 4: "2x2", 16: "4x4"},
    "v6e": {1: "2x2", 4: "2x2", 16: "4x4"},
    "v5p": {1: "2x2x1", 4: "2x2x1", 16: "2x2x4"},
}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Autotuning runs kernels, and XLA's own matrix kernels are chosen by it.
_OPTIONS = {
    "cuda": {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False},
    "tpu": {},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A number of chips: "v5e", "v5e-16", "h100"."""

    chip: Chip
    devices: int = 1

    @classmethod
    def named(cls, name: str) -> "Target":
        """Returns the target of a name. Raises KeyError for an unknown one."""
        chip, _, count = name.partition("-")
        devices = int(count or 1)
        if chip == "h100" and devices > 1 or devices not in (1, 4, 16):
            raise KeyError(name)
        return cls(CHIPS[chip], devices)

    @property
    def name(self) -> str:
        """Name of the chip, with the number of devices if there are several."""
        return self.chip.name if self.devices == 1 else f"{self.chip.name}-{self.devices}"

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """Options without which the compiler would need the device."""
        return _OPTIONS[self.chip.platform]

    def mesh(self, fsdp: int = 1):
        """Returns a mesh of these devices with the axes of a training run."""
        from jax.experimental.topologies import get_topology_desc
        from jax.sharding import AxisType, Mesh

        if self.chip.platform == "cuda":
            topology = get_topology_desc("", "cuda", topology="1x1x1", target_config=_H100)
        else:
            shape = _SHAPES[self.chip.name][self.devices]
            topology = get_topology_desc(f"{self.chip.name}:{shape}", "tpu")
        devices = np.array(topology.devices[: self.devices]).reshape(-1, fsdp)
        return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def prepare() -> None:
    """Sets the environment in which jax compiles for devices that this machine does not have."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # libtpu is for one process, unless there is no TPU
    )
