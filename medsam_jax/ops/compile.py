"""`jax.jit` with a form's compiler options and precision of products; reading one call behind."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

from medsam_jax.ops.form import Form

T = TypeVar("T")

# XLA's default schedule for CPUs allows parallel execution and keeps many temporaries in memory.
_CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit(function: Callable, form: Form, **options: Any) -> Callable:
    """Returns `jax.jit(function, **options)`, compiled as the form of its model says.

    For whole programs: jax rejects compiler options in a jitted function that another one calls.
    """
    compiler_options = _CPU_OPTIONS if form.cpu else None
    return jax.jit(at_precision(function, form), compiler_options=compiler_options, **options)


def at_precision(function: Callable, form: Form) -> Callable:
    """Returns `function`, traced with the form's precision of products."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(form.matmul_precision):
            return function(*args, **kwargs)

    return traced


def one_ahead(launched: Iterable[T]) -> Iterator[T]:
    """Yields each item once the next one is made: the device works on that while this is read."""
    for item, _ in itertools.pairwise(itertools.chain(launched, [None])):
        yield item
