"""What augmentation does to slices, masks and cached embeddings."""

import numpy as np
import pytest

from medsam_jax.data.augment import turn_embedding


@pytest.mark.parametrize("valid_shape", [(32, 32), (32, 21), (18, 32)])
def test_an_embedding_turns_with_its_mask(valid_shape):
    """A stand-in for an embedding, the mean of each cell of the mask, stays just that."""
    rng = np.random.default_rng(0)
    labels = np.zeros((32, 32), np.uint8)
    labels[: valid_shape[0], : valid_shape[1]] = rng.integers(0, 2, valid_shape)
    image = np.repeat(labels[..., None], 3, axis=2)
    cells = labels.reshape(8, 4, 8, 4).mean(axis=(1, 3))[..., None]
    seen = set()
    for _ in range(30):
        embedding, picture, mask, shape = turn_embedding(
            cells, image, labels, np.array(valid_shape, np.int32), 0.5, rng
        )
        np.testing.assert_array_equal(mask.reshape(8, 4, 8, 4).mean(axis=(1, 3)), embedding[..., 0])
        np.testing.assert_array_equal(picture[..., 0], mask)
        rows, columns = (4 * -(-size // 4) for size in shape)
        assert mask[rows:].sum() == mask[:, columns:].sum() == 0
        assert sorted(shape) == sorted(valid_shape)
        seen.add(mask.tobytes())
    assert len(seen) == 8
