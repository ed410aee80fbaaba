"""Strips and depthwise convolution: each device's form against the plain statement."""

from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.ops import strips
from medsam_jax.ops.convolution import depthwise_conv3x3, depthwise_of_strip
from medsam_jax.ops.form import ACCELERATOR, CPU, PLAIN, form_for, local_form


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


@pytest.mark.parametrize("form", [CPU, PLAIN], ids=lambda form: form.device)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [6, 7])
def test_depthwise(form, stride, side):
    x, kernel = random(2, side, side + 1, 5), random(3, 3, 1, 5)
    found = depthwise_conv3x3(x, kernel, stride, form)
    np.testing.assert_allclose(found, depthwise(x, kernel, stride), atol=1e-5)


def test_depthwise_rounds_once():
    """Half a unit in bfloat16's last place, not that of each of nine terms."""
    x, kernel = (random(*shape).astype(jnp.bfloat16) for shape in ((1, 6, 7, 5), (3, 3, 1, 5)))
    found = depthwise_conv3x3(x, kernel, 1, CPU)
    assert found.dtype == jnp.bfloat16
    expected = depthwise(x.astype(jnp.float32), kernel.astype(jnp.float32), 1)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("form", [CPU, PLAIN], ids=lambda form: form.device)
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradient(form, stride):
    """Against finite differences of the sum that defines it, in float64."""
    x, kernel = random(1, 4, 5, 3), random(3, 3, 1, 3)
    weights = random(1, 4, 5, 3)[:, ::stride, ::stride]
    by_x, by_kernel = jax.grad(
        lambda *a: (depthwise_conv3x3(*a, stride, form) * weights).sum(), argnums=(0, 1)
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


@pytest.mark.parametrize("form", [PLAIN, CPU, ACCELERATOR], ids=lambda form: form.device)
def test_maps_are_the_function_of_each_part(form):
    x = random(2, 4, 3)
    found = strips.map_strips(lambda part: part[:, ::-1] * 2, x)
    np.testing.assert_array_equal(found, x[..., ::-1] * 2)
    images = random(3, 40, 64, 2)
    found = strips.image_by_image(lambda images: images + 1, images, form)
    np.testing.assert_array_equal(found, images + 1)
    np.testing.assert_array_equal(strips.token_wise(jnp.exp, images, form), jnp.exp(images))


def wide(x):
    """A hidden layer 64 times wider than what goes in and out."""
    kernel = random(4, 256)
    return jnp.tanh(x @ kernel) @ kernel.T


def encode(images, form):
    return strips.image_by_image(lambda x: strips.token_wise(wide, x, form), images, form)


def test_a_cpu_holds_one_image_and_one_strip():
    """4 images of 4 strips each."""
    images = jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32)

    def temporary(form):
        compiled = jax.jit(encode, static_argnums=1).lower(images, form).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4 * 64 * 64 * 256 * 4
    assert temporary(PLAIN) >= whole
    assert temporary(CPU) < whole / 12


def test_other_devices_get_the_whole_batch_at_once():
    images = jax.ShapeDtypeStruct((4, 64, 64, 4), jnp.float32)

    def lowered(platform):
        function = jax.jit(lambda x: encode(x, form_for(platform)))
        return jax.export.export(function, platforms=[platform])(images).mlir_module()

    assert lowered("cpu").count("stablehlo.while") == 2  # over images, over strips
    for platform in ("cuda", "rocm", "tpu"):
        assert "stablehlo.while" not in lowered(platform)
        assert "tensor<4x64x64x256xf32>" in lowered(platform)  # the hidden layer of all


def test_a_batch_that_is_spread_over_cpus_stays_whole():
    assert form_for("cpu").image_by_image
    assert form_for("cpu", devices=2).cpu
    assert not form_for("cpu", devices=2).image_by_image


@pytest.mark.parametrize(
    ("capability", "kernels"), [("9.0", True), ("7.5", False), ("gfx942", True), (None, True)]
)
def test_kernels_where_they_run(monkeypatch, capability, kernels):
    """Triton needs Ampere. ROCm names an architecture where CUDA has a number."""
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    form = local_form()
    assert (form.device, form.kernels) == ("accelerator", kernels)
