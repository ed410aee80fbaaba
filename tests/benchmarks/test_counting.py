import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

import benchmarks.counting
from benchmarks.counting import least_work


def operations(function, *arguments):
    return least_work(function, *arguments)["operations"]


def test_products_and_bytes():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
    counted = least_work(jax.jit(jnp.matmul), a, b)
    assert counted["operations"] == 2 * 3 * 4 * 5 * 7
    assert counted["bytes"] == 4 * (3 * 4 * 5 + 3 * 5 * 7 + 3 * 4 * 7)


def test_convolutions_by_groups():
    x = jnp.ones((2, 8, 8, 6))
    for groups in (1, 2, 6):
        kernel = jnp.ones((3, 3, 6 // groups, 6))

        def convolve(x, kernel, groups=groups):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        assert operations(convolve, x, kernel) == 2 * (2 * 4 * 4 * 6) * 9 * (6 // groups)


def test_loops_count_every_turn_and_gradients_both_products():
    square = jnp.ones((4, 4))
    once = 2 * 4**3

    def looped(a):
        return jax.lax.map(lambda row: row @ square, jnp.stack([a] * 5))

    assert operations(looped, square) == 5 * once
    assert operations(jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), square, square) == 3 * once


def test_forms_for_different_devices_count_once():
    square = jnp.ones((4, 4))

    def either(a):
        return jax.lax.platform_dependent(a, cpu=lambda a: a @ a, default=lambda a: (a @ a) @ a)

    assert operations(either, square) == 2 * (2 * 4**3)


def test_products_by_type():
    half, single = jnp.ones((4, 4), jnp.bfloat16), jnp.ones((4, 4))
    highest = functools.partial(jnp.matmul, precision="highest")
    jaxpr = jax.make_jaxpr(lambda a, b: (a @ a, b @ b @ b, highest(b, b)))(half, single)
    once = 2 * 4**3
    expected = {"bfloat16": once, "float32": 2 * once, "float32 highest": once}
    assert benchmarks.counting.operations(jaxpr) == expected


def test_kernels_count_once_for_each_part_of_their_grid():
    def kernel(a, out):
        out[...] = a[...] @ a[...]

    def call(a):
        return pl.pallas_call(
            kernel,
            out_shape=a,
            grid=(3, 2),
            in_specs=[pl.BlockSpec((4, 4), lambda i, j: (i, j))],
            out_specs=pl.BlockSpec((4, 4), lambda i, j: (i, j)),
            interpret=True,
        )(a)

    assert operations(call, jnp.ones((12, 8))) == 3 * 2 * 2 * 4**3
