"""Position encoding of the image's pixels against that of the same positions as points."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsam_jax.models.prompt_encoder import PositionEmbeddingRandom


@pytest.mark.parametrize("size", [(64, 64), (3, 5)])
def test_a_pixel_is_encoded_as_the_point_at_its_centre(size):
    encode = PositionEmbeddingRandom(16, rngs=nnx.Rngs(0))
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    expected = encode.forward_with_coords(jnp.float32(np.stack([x, y], axis=-1)), size)
    np.testing.assert_allclose(encode(size), expected, atol=3e-6)
