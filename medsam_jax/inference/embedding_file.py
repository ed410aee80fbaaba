"""Encoded images in an `.npz`, with the fingerprint of the encoder that made them."""

import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax.numpy as jnp
import numpy as np

from medsam_jax.errors import UserError
from medsam_jax.inference.engine import EncodedImage
from medsam_jax.io.files import write_whole


def write_embeddings(
    path: str | os.PathLike,
    images: Sequence[EncodedImage],
    fingerprint: str,
    notes: Mapping[str, Any],
) -> None:
    """Writes images and notes, arrays by name, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    embeddings, original_shapes, valid_shapes = zip(*images, strict=True)
    buffer = io.BytesIO()
    np.savez(  # not compressed: floats hardly shrink, and it takes longer than encoding
        buffer,
        embedding=np.asarray(jnp.stack(embeddings), np.float32),
        original_shape=original_shapes,
        valid_shape=valid_shapes,
        weights=fingerprint,
        **{f"note_{name}": value for name, value in notes.items()},
    )
    write_whole(Path(path), lambda partial: partial.write_bytes(buffer.getvalue()))


def read_embeddings(
    path: str | os.PathLike, fingerprint: str
) -> tuple[list[EncodedImage], dict[str, np.ndarray]]:
    """Reads what `write_embeddings` wrote: images and notes.

    Raises:
      UserError: no such file, not one of ours, or of another fingerprint.
    """
    try:
        # Opened here: np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            saved = dict(archive)
        weights = str(saved["weights"])
        parts = saved["embedding"], saved["original_shape"], saved["valid_shape"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error):
        raise UserError(f"{path}: no file of Predictor.save_embedding; make it again") from None
    if weights != fingerprint:
        raise UserError(f"{path}: made with other weights; encode the image again")
    images = [
        EncodedImage(jnp.asarray(embedding), tuple(map(int, shape)), tuple(map(int, valid)))
        for embedding, shape, valid in zip(*parts, strict=True)
    ]
    notes = {k.removeprefix("note_"): v for k, v in saved.items() if k.startswith("note_")}
    return images, notes
