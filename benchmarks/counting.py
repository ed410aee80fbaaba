"""Counts the minimum work of a jitted function: matrix products, arguments and results."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.lax import Precision


def least_work(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Returns `operations` and `bytes` of a call as keyword arguments of `Work`.

    Operations are those of matrix products and convolutions, with loops unrolled. Elementwise work
    is not counted, because the measured peak is that of a matrix product. Bytes are those of
    arguments and results, each once.
    """
    closed, results = jax.make_jaxpr(function, return_shape=True)(*arguments)
    arrays = jax.tree.leaves((arguments, results))
    sizes = (math.prod(np.shape(x)) * np.dtype(x.dtype).itemsize for x in arrays)
    return {"operations": float(operations(closed).total()), "bytes": float(sum(sizes))}


def operations(jaxpr: ClosedJaxpr | Jaxpr) -> Counter[str]:
    """Returns the operations of products by their type.

    Types are "bfloat16" (and other half precisions), "float32" in the device's default precision,
    "float32 high" and "float32 highest".
    """
    total: Counter[str] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        total.update(_of_equation(equation))
    return total


def _of_equation(equation) -> Counter[str]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return Counter({_type(equation): 2 * depth * equation.outvars[0].aval.size})
    if name == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        kernel = equation.invars[1].aval
        inputs_of_output = kernel.size // kernel.shape[numbers.rhs_spec[0]]
        dilated = math.prod(params["lhs_dilation"])  # zeros between inputs are not work
        count = 2 * inputs_of_output * equation.outvars[0].aval.size // dilated
        return Counter({_type(equation): count})
    inner = [operations(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name in ("cond", "switch"):  # alternative forms of the same work, one per device type
        return max(inner, key=Counter.total, default=Counter())
    times = params.get("length", 1)  # of a scan
    if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    total = sum(inner, Counter())
    return Counter({kind: times * count for kind, count in total.items()})


def _type(equation) -> str:
    if equation.invars[0].aval.dtype.itemsize < 4:
        return "bfloat16"
    precision = equation.params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    names = {Precision.HIGH: "float32 high", Precision.HIGHEST: "float32 highest"}
    return names.get(precision, "float32")


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    return []
