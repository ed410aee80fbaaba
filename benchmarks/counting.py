"""Counts the minimum work of a jitted function: matrix products, arguments and results."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr


def least_work(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Returns `operations` and `bytes` of a call as keyword arguments of `Work`.

    Operations are those of matrix products and convolutions, with loops unrolled. Elementwise work
    is not counted, because the measured peak is that of a matrix product. Bytes are those of
    arguments and results, each once.
    """
    closed, results = jax.make_jaxpr(function, return_shape=True)(*arguments)
    arrays = jax.tree.leaves((arguments, results))
    sizes = (math.prod(np.shape(x)) * np.dtype(x.dtype).itemsize for x in arrays)
    return {"operations": float(_operations(closed.jaxpr)), "bytes": float(sum(sizes))}


def _operations(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return 2 * depth * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = equation.invars[1].aval
        inputs_of_output = kernel.size // kernel.shape[numbers.rhs_spec[0]]
        dilated = math.prod(params["lhs_dilation"])  # zeros between inputs are not work
        return 2 * inputs_of_output * equation.outvars[0].aval.size // dilated
    inner = [_operations(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name in ("cond", "switch"):
        return max(inner, default=0)  # alternative forms of the same work, one per device type
    return sum(inner) * params.get("length", 1)  # `length` of a scan


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
