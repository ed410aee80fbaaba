import jax
import jax.numpy as jnp

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
