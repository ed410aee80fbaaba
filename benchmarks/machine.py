"""What the numbers were measured on: the machine's name and its two physical limits."""

import os
import platform
import time
from pathlib import Path

import numpy as np


def describe(cores: int) -> dict[str, str]:
    """Processor, cores used, memory, system and Python, as text."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores used": f"{cores} of {os.cpu_count()}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def limits(size: int = 2048, repeats: int = 5) -> dict[str, float]:
    """Measured peaks of the default jax device.

    Returns `operations` per second of a float32 matrix product, and `bytes` per second read and
    written while adding one to an array of 256 MiB; the best of a few calls each.
    """
    import jax
    import jax.numpy as jnp

    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    array = jnp.zeros(2**26, jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    add = jax.jit(lambda a: a + 1)
    return {
        "operations": 2 * size**3 / _best(product, matrix, repeats),
        "bytes": 2 * array.nbytes / _best(add, array, repeats),
    }


def _best(function, argument, repeats: int) -> float:
    function(argument).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(argument).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)
