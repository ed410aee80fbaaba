"""`jax.jit` with compiler options for the device."""

from collections.abc import Callable
from typing import Any

import jax

from medsam_jax.ops.form import Form

# XLA's default schedule for CPUs allows parallel execution and keeps many temporaries in memory.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit(function: Callable, form: Form, **options: Any) -> Callable:
    """Returns `jax.jit(function, **options)`, with compiler options for the form of its model.

    For whole programs: jax rejects compiler options in a jitted function that another one calls.
    """
    return jax.jit(function, compiler_options=_CPU_OPTIONS if form.cpu else None, **options)
