"""Position encoding of the image's pixels against that of the same positions as points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models.functional import Functional
from medsam_jax.models.prompt_encoder import PositionEmbeddingRandom
from tests.tiny import tiny_sam, update_state


@pytest.mark.parametrize("size", [(64, 64), (3, 5)])
def test_a_pixel_is_encoded_as_the_point_at_its_centre(size):
    encode = PositionEmbeddingRandom(16, rngs=nnx.Rngs(0))
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    expected = encode.forward_with_coords(jnp.float32(np.stack([x, y], axis=-1)), size)
    np.testing.assert_allclose(encode(size), expected, atol=3e-6)


def test_the_encoding_of_the_pixels_is_computed_once_and_follows_its_matrix():
    model = tiny_sam()
    functional = Functional(model)
    assert not any("dense_pe" in name for name in functional.arrays)
    decode = jax.jit(lambda arrays: functional.bind(arrays).prompt_encoder.get_dense_pe())
    program = decode.lower(functional.arrays).as_text()
    assert "stablehlo.sine" not in program, "a constant of the program"
    name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    update_state(model, {name: 2 * functional.arrays[name]})
    encoder = model.prompt_encoder
    expected = encoder.pe_layer(encoder.image_embedding_size)[None]
    np.testing.assert_array_equal(encoder.get_dense_pe(), expected)
    assert np.abs(encoder.get_dense_pe() - decode(functional.arrays)).max() > 0.1
