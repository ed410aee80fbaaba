"""Describes the machine of the measurements: its name and its measured limits.

    python -m benchmarks.machine

prints the limits as JSON. The benchmarks run this command in its own process, which frees its
memory at the end.
"""

import json
import os
import platform
import time
from pathlib import Path

import numpy as np


def describe(cores: int) -> dict[str, str]:
    """Returns processor, cores used, memory, system and Python as text."""
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


def gpu() -> str | None:
    """Returns the name of jax's first GPU, or None if there is none."""
    import jax

    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def limits(repeats: int = 5) -> dict[str, float]:
    """Measures the peaks of the default jax device.

    Returns `operations` and `operations_bf16` per second of a matrix product in either type, and
    `bytes` per second read and written while adding one to an array. Each is the best of `repeats`.
    """
    import jax
    import jax.numpy as jnp

    side = {"gpu": 8192}.get(jax.default_backend(), 2048)
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32))
    array = jnp.zeros(2**26, jnp.float32)  # 256 MiB, in place: new arrays cause page faults
    exact = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    half = jax.jit(lambda a: jnp.matmul(a, a))
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    return {
        "operations": 2 * side**3 / _best(exact, matrix, repeats),
        "operations_bf16": 2 * side**3 / _best(half, matrix.astype(jnp.bfloat16), repeats),
        "bytes": 2 * array.nbytes / _best(add, array, repeats, chained=True),
    }


def _best(function, argument, repeats: int, chained: bool = False) -> float:
    """Returns the shortest seconds of a call; `chained` calls take the previous result."""
    result = function(argument).block_until_ready()
    times = []
    for _ in range(repeats):
        argument = result if chained else argument
        start = time.perf_counter()
        result = function(argument).block_until_ready()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints the limits."""
    print(json.dumps(limits()))


if __name__ == "__main__":
    main()
