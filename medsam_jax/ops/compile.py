"""`jax.jit` with the options that a device's compiler needs."""

from collections.abc import Callable
from typing import Any

import jax

from medsam_jax.ops.form import Form

# By default XLA orders a CPU's program for parallel execution and keeps many temporaries at a time.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit(function: Callable, form: Form, **options: Any) -> Callable:
    """`jax.jit(function, **options)` for whole programs: jax refuses options on inner ones.

    Args:
      form: of the model in `function`.
    """
    return jax.jit(function, compiler_options=_CPU_OPTIONS if form.cpu else None, **options)
