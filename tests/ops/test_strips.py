"""Strips and depthwise convolution: each device's form against the plain statement."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import strips
from medsam_jax.ops.depthwise import depthwise_conv3x3, depthwise_of_strip


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def depthwise(x, kernel, stride):
    """In float64, output pixel by output pixel."""
    x, kernel = (np.asarray(a, np.float64) for a in (x, kernel))
    batch, height, width, channels = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.empty((batch, -(-height // stride), -(-width // stride), channels))
    for row, column in np.ndindex(out.shape[1:3]):
        y, x = row * stride, column * stride
        out[:, row, column] = (padded[:, y : y + 3, x : x + 3] * kernel[:, :, 0]).sum((1, 2))
    return out


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [6, 7])
def test_depthwise(platform, stride, side):
    x, kernel = random(2, side, side + 1, 5), random(3, 3, 1, 5)
    with strips.form_for_cpu(platform == "cpu"):
        found = depthwise_conv3x3(x, kernel, stride)
    np.testing.assert_allclose(found, depthwise(x, kernel, stride), atol=1e-5)


def test_depthwise_rounds_once():
    """Half a unit in bfloat16's last place, not that of each of nine terms."""
    x, kernel = (random(*shape).astype(jnp.bfloat16) for shape in ((1, 6, 7, 5), (3, 3, 1, 5)))
    with strips.form_for_cpu(True):
        found = depthwise_conv3x3(x, kernel)
    assert found.dtype == jnp.bfloat16
    expected = depthwise(x.astype(jnp.float32), kernel.astype(jnp.float32), 1)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradient(platform, stride):
    """Against finite differences of the sum that defines it, in float64."""
    x, kernel = random(1, 4, 5, 3), random(3, 3, 1, 3)
    weights = random(1, 4, 5, 3)[:, ::stride, ::stride]
    with strips.form_for_cpu(platform == "cpu"):
        by_x, by_kernel = jax.grad(
            lambda *a: (depthwise_conv3x3(*a, stride) * weights).sum(), argnums=(0, 1)
        )(x, kernel)
    for index, gradient in ((0, by_x), (1, by_kernel)):
        for position in [(0,) * 4, tuple(n - 1 for n in gradient.shape)]:
            moved = [np.asarray(x, np.float64), np.asarray(kernel, np.float64)]
            moved[index][position] += 1.0  # linear in each: any step is exact
            change = depthwise(*moved, stride) - depthwise(x, kernel, stride)
            expected = (change * np.asarray(weights)).sum()
            np.testing.assert_allclose(gradient[position], expected, atol=1e-5)


@pytest.mark.parametrize("most", [1, 3, 4, 12])
def test_strips_with_their_neighbours_make_the_whole(most):
    x, kernel = random(2, 12, 5, 3), random(3, 3, 1, 3)
    parts = strips.split_rows(x, most)
    assert parts.shape[2] == most
    np.testing.assert_array_equal(strips.join_rows(parts), x)
    with strips.form_for_cpu(True):
        above, below = strips.neighbour_rows(parts)
        mixed = strips.map_strips(
            lambda rows: depthwise_of_strip(jnp.concatenate(rows, axis=1), kernel),
            (above, parts, below),
        )
    np.testing.assert_allclose(strips.join_rows(mixed), depthwise(x, kernel, 1), atol=1e-5)


def test_rows_that_nothing_divides():
    assert strips.split_rows(random(1, 7, 2, 1), 4).shape == (1, 7, 1, 2, 1)


@pytest.mark.parametrize(("bytes_", "rows"), [(0, 3), (6 * 40, 6), (11 * 40, 6), (12 * 40, 12)])
def test_rows_within_a_limit(bytes_, rows):
    x = random(1, 12, 5, 2)  # 40 bytes a row
    assert strips.split_rows(x, strips.rows_of(bytes_, 5, 2), multiple=3).shape[2] == rows


def test_maps_are_the_function_of_each_part():
    x = random(2, 4, 3)
    for platform in ("cpu", "gpu"):
        with strips.form_for_cpu(platform == "cpu"):
            found = strips.map_strips(lambda part: part[:, ::-1] * 2, x)
        np.testing.assert_array_equal(found, x[..., ::-1] * 2)
    images = strips.map_images(lambda images: images[:, :, :, ::-1] + 1, x[..., None, :])
    np.testing.assert_array_equal(images, x[..., None, ::-1] + 1)


def wide(x):
    """A hidden layer 64 times wider than what goes in and out."""
    kernel = random(4, 256)
    return jnp.tanh(x @ kernel) @ kernel.T


def in_strips(x):
    return strips.join_rows(strips.map_strips(wide, strips.split_rows(x, 8)))


def test_a_cpu_holds_one_image_and_one_strip():
    """4 images of 8 strips each."""
    images = jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32)

    def temporary(function):
        compiled = jax.jit(function).lower(images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * 64 * 256 * 4
    assert temporary(wide) >= whole
    assert temporary(lambda x: strips.map_images(in_strips, x)) < whole / 16


def test_other_devices_get_the_whole_batch_at_once():
    images = jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32)

    def lowered(platform):
        function = jax.jit(lambda x: strips.map_images(in_strips, x))
        return jax.export.export(function, platforms=[platform])(images).mlir_module()

    assert lowered("cpu").count("stablehlo.while") == 2  # over images, over strips
    for platform in ("cuda", "tpu"):
        assert "stablehlo.while" not in lowered(platform)
        assert "tensor<32x8x64x256xf32>" in lowered(platform)  # the hidden layer of all
