"""Arrays prepared for inference on accelerators: the same results, and less to compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import hlo
from medsam_jax.models.checkpoint import abstract_model
from medsam_jax.models.functional import Functional
from medsam_jax.models.image_encoder import ViTConfig
from medsam_jax.models.sam import Sam, SamConfig
from medsam_jax.ops.form import ACCELERATOR, CPU

VIT = ViTConfig(32, 2, 2, (1,), patch_size=8, window_size=3)


def random_model(encoder: str, dtype: str) -> Sam:
    """Returns a small model whose arrays, norms' statistics too, are all random."""
    config = dataclasses.replace(SamConfig.tiny(), dtype=dtype)
    if encoder == "vit":
        config = dataclasses.replace(config, encoder=VIT)
    model = Sam(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    positive = lambda x: jnp.asarray(0.5 + rng.random(x.shape), x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(positive, nnx.state(model, nnx.BatchStat)))
    return model


def answers(functional: Functional):
    """Encodes two images and decodes two boxes of each."""
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.integers(0, 256, (2, 64, 64, 3)), jnp.uint8)
    boxes = jnp.asarray(rng.uniform(0, 64, (2, 2, 4)), jnp.float32)

    def run(arrays):
        model = functional.bind(arrays)
        embeddings = model.encode(images, jnp.full((2, 2), 64, jnp.int32))
        return embeddings, *model.decode(embeddings, boxes=boxes)

    return jax.jit(run)(functional.arrays)


@pytest.mark.parametrize(
    ("encoder", "dtype"),
    [("tiny_vit", "float32"), ("tiny_vit", "bfloat16"), ("vit", "bfloat16")],
)
def test_prepared_arrays_give_the_same_results(encoder, dtype):
    functional = Functional(random_model(encoder, dtype), ACCELERATOR)
    folded = functional.for_inference()
    assert folded.arrays.keys() == functional.arrays.keys()
    changed = [n for n, x in folded.arrays.items() if x.dtype != functional.arrays[n].dtype]
    assert bool(changed) == (dtype == "bfloat16")
    assert not any("norm" in name or "gaussian" in name for name in changed)
    for expected, found in zip(answers(functional), answers(folded), strict=True):
        assert np.abs(np.asarray(expected, np.float32)).max() > 0.01
        # The compiler may round the products of a program's own folding elsewhere.
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
        scale = np.abs(np.asarray(expected, np.float32)).max()
        np.testing.assert_allclose(
            np.asarray(found, np.float32) / scale,
            np.asarray(expected, np.float32) / scale,
            atol=tolerance,
        )


def test_prepared_arrays_keep_the_order_of_the_module():
    """With ten blocks and more, that is not the order of the names."""
    config = dataclasses.replace(SamConfig.tiny(), encoder=dataclasses.replace(VIT, depth=11))
    functional = Functional(abstract_model(config), ACCELERATOR)
    assert list(functional.arrays) != sorted(functional.arrays)
    folded = functional.for_inference()
    assert list(folded.arrays) == list(functional.arrays)
    table = "image_encoder.blocks.10.attn.rel_pos_h"
    assert (functional.arrays[table].shape, folded.arrays[table].shape) == ((5, 16), (3, 3, 16))


def test_prepared_arrays_twice_and_for_a_cpu():
    model = random_model("tiny_vit", "float32")
    folded = Functional(model, ACCELERATOR).for_inference()
    assert folded.for_inference() is folded
    on_cpu = Functional(model, CPU)
    assert on_cpu.for_inference() is on_cpu


def test_a_program_of_prepared_arrays_folds_nothing():
    functional = Functional(random_model("tiny_vit", "bfloat16"), ACCELERATOR)

    def used(functional) -> set[str]:
        images = jnp.zeros((1, 64, 64, 3), jnp.uint8)

        def encode(arrays):
            return functional.bind(arrays).encode(images, jnp.full((1, 2), 64, jnp.int32))

        text = jax.jit(encode).lower(functional.arrays).as_text(dialect="hlo")
        computations, entry = hlo.parse(text)
        return {i.opcode for computation in computations.values() for i in computation.values()}

    assert "gather" in used(functional)
    assert "gather" not in used(functional.for_inference())
