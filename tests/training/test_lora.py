"""Adapters start as nothing, change what they are told to, and are gone from an export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.errors import UserError
from medsam_jax.models.functional import Functional, parameter_names
from medsam_jax.training import lora
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config
from tests.tiny import tiny_sam

ALL = (r".*",)


def lora_config(rank=4, **fields):
    config = base_config()
    config.lora.update({"rank": rank, "alpha": 6.0} | fields)
    return config


@pytest.fixture(scope="module")
def tiny():
    return tiny_sam()


def test_new_adapters_change_no_bit_of_any_array(tiny):
    functional = Functional(tiny)
    adapted = lora.adapted(functional, lora_config())
    merged = lora.merge(adapted.arrays, scale=1.5)
    assert merged.keys() == functional.arrays.keys()
    for name, before in functional.arrays.items():
        assert np.asarray(merged[name]).tobytes() == np.asarray(before).tobytes(), name


def test_what_is_adapted_and_trained(tiny):
    """qkv and proj of the three attention blocks; only adapters are trained, without decay."""
    adapted = lora.adapted(Functional(tiny), lora_config(rank=4))
    labels = opt.label_parameters(adapted.arrays, parameter_names(tiny), ALL)
    trained, frozen = opt.split_frozen(adapted.arrays, labels)
    assert len(trained) == 2 * 2 * 3
    assert all(name.startswith("image_encoder.layers.") for name in trained)
    assert {labels[name] for name in trained} == {opt.UNDECAYED}
    qkv = "image_encoder.layers.1.blocks.0.attn.qkv.kernel"
    assert trained[qkv + ".lora_a"].shape == (8, 4)
    assert trained[qkv + ".lora_b"].shape == (4, 24)
    assert qkv in frozen
    table = opt.parameter_table(adapted.arrays, labels, ())
    assert "image_encoder adapters" in table


def test_adapted_layer_is_the_layer_and_the_low_rank_product():
    """Value and gradients against the formula written out, on one linear layer."""
    layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    config = lora_config(rank=2, targets=("kernel",))
    adapted = lora.adapted(Functional(layer), config)
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(7, 5)), rng.normal(size=(2, 3))
    arrays = adapted.arrays | {"kernel.lora_b": jnp.asarray(b, jnp.float32)}
    a = np.asarray(arrays["kernel.lora_a"], np.float64)
    expected = x @ np.asarray(layer.kernel[...]) + 6.0 / 2 * (x @ a) @ b
    np.testing.assert_allclose(adapted.bind(arrays)(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)

    gradient = jax.grad(lambda arrays: adapted.bind(arrays)(jnp.asarray(x)).sum())(arrays)
    ones = np.ones((7, 3))
    np.testing.assert_allclose(gradient["kernel.lora_a"], 3.0 * x.T @ ones @ b.T, rtol=1e-4)
    np.testing.assert_allclose(
        gradient["kernel.lora_b"], 3.0 * (x @ a).T @ ones, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("attn",), r"config.lora.targets: 'attn' matches no array"),
        (("(",), "no regular expression"),
        ((r"image_encoder\.neck\.0\.kernel",), "is no matrix but of shape"),
    ],
)
def test_bad_targets_are_refused(tiny, targets, message):
    with pytest.raises(UserError, match=message):
        lora.adapted(Functional(tiny), lora_config(targets=targets))


def test_a_kernel_is_not_trained_beside_its_adapter(tiny):
    adapted = lora.adapted(Functional(tiny), lora_config())
    with pytest.raises(UserError, match=r"attn\.\w+\.kernel is trained itself"):
        opt.label_parameters(adapted.arrays, parameter_names(tiny), (r"mask_decoder\..*",))
