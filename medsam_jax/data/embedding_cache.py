"""Image embeddings kept on disk: a frozen encoder computes them once.

```
DIRECTORY/
  key.json                           encoder, data set and form of the embeddings
  SPLIT-00000-of-00003.array_record  one record an embedding, in the split's order: raw values
```

Shards, not one file a slice: MedSAM's cache of loose files ran out of file handles.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medsam_jax.cli import progress
from medsam_jax.data.datasets import DatasetInfo
from medsam_jax.data.recipes import Preprocessing
from medsam_jax.distributed import wait_for_all
from medsam_jax.errors import UserError, disk_space
from medsam_jax.io.files import require_space, write_json, write_whole
from medsam_jax.ops.compile import one_ahead

SLICES_PER_SHARD = 32
KEY_FILE = "key.json"


class Embeddings(Sequence):
    """The embeddings of a split's records, [h, w, C] each, by position. Picklable, for workers."""

    def __init__(self, paths: Sequence[Path], shape: Sequence[int], dtype: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records = ArrayRecordDataSource([str(path) for path in paths])
        self._shape, self._dtype = tuple(shape), jnp.dtype(dtype)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: Any) -> np.ndarray:
        return np.frombuffer(self._records[int(position)], self._dtype).reshape(self._shape)


class WithEmbeddings(Sequence):
    """A split's records, each with its `embedding`."""

    def __init__(self, records: Sequence[dict[str, Any]], embeddings: Sequence[Any]):
        self._records, self._embeddings = records, embeddings

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: Any) -> dict[str, Any]:
        return {**self._records[position], "embedding": self._embeddings[position]}


def cache_key(
    encoder: Mapping[str, jax.Array | np.ndarray],
    preprocessing: Preprocessing,
    info: DatasetInfo,
    shape: Sequence[int],
    dtype: str,
    variants: Mapping[str, Any] | None = None,
    matmul_precision: str = "highest",
) -> dict[str, Any]:
    """Returns the key of a cache: encoder weights, preprocessing contract, data set, stored form.

    `variants` holds the augmentation of training slices and its count; None: slices as stored.
    """
    weights = hashlib.sha256()
    for name in sorted(encoder):
        weights.update(name.encode())
        weights.update(np.asarray(encoder[name]).tobytes())
    return {
        "encoder weights": weights.hexdigest(),
        "preprocessing": preprocessing.fields_of_embedding(),
        "data set": info.fingerprint,
        "shape": list(shape),
        "dtype": dtype,
        "augmentation of training slices": variants and dict(variants),
        "matmul precision": matmul_precision,
    }


def open_or_build(
    directory: str | os.PathLike,
    key: Mapping[str, Any],
    records: Sequence[dict[str, Any]],
    split: str,
    encode: Callable[[np.ndarray, np.ndarray], jax.Array | np.ndarray],
    batch_size: int,
) -> Embeddings:
    """Returns the embeddings of a split; computes the shards that are missing.

    Shards are written whole or not at all, so an interrupted pass continues where it stopped. The
    processes of a multi-host run share the shards and wait for one another.

    Args:
      key: of `cache_key`.
      records: of the split, or its `Variants`.
      encode: images uint8 [B, S, S, 3] and valid shapes [B, 2] to embeddings [B, h, w, C]; always
        called with `batch_size` slices. Answers are read one call later, so that it need not wait.

    Raises:
      UserError: the directory holds embeddings of another encoder, data set, contract or type, or
        its disk is too small for them.
    """
    directory = Path(directory)
    _claim(directory, key)
    wait_for_all(f"claimed {directory}")
    count = math.ceil(len(records) / SLICES_PER_SHARD)
    paths = [directory / f"{split}-{i:05d}-of-{count:05d}.array_record" for i in range(count)]
    mine = range(jax.process_index(), count, jax.process_count())
    missing = [shard for shard in mine if not paths[shard].exists()]
    slice_bytes = math.prod(key["shape"]) * jnp.dtype(key["dtype"]).itemsize
    all_missing = sum(not path.exists() for path in paths)  # of all processes: they share the disk
    needed = min(all_missing * SLICES_PER_SHARD, len(records)) * slice_bytes
    require_space(directory, needed, f"embeddings of {split}")
    wait_for_all(f"counted embeddings of {split}")
    for shard in missing:
        start = shard * SLICES_PER_SHARD
        positions = range(start, min(start + SLICES_PER_SHARD, len(records)))
        with disk_space(paths[shard]):
            desc = f"embedding {split}, shard {shard + 1} of {count}"
            write = functools.partial(_write_shard, records, positions, encode, batch_size, desc)
            write_whole(paths[shard], write)
    wait_for_all(f"embeddings of {split}")
    return Embeddings(paths, key["shape"], key["dtype"])


def _claim(directory: Path, key: Mapping[str, Any]) -> None:
    """Writes the key into a new cache; refuses a cache with another key."""
    path = directory / KEY_FILE
    if path.exists():
        found = {"matmul precision": "highest"} | json.loads(path.read_text())
        different = [name for name in key if found.get(name) != key[name]]
        if different:
            raise UserError(
                f"{directory}: made with another {' and '.join(different)}; "
                "name another embedding_cache or remove this one"
            )
    elif jax.process_index() == 0:
        write_json(path, key)


def _write_shard(
    records: Sequence[dict[str, Any]],
    positions: range,
    encode: Callable[[np.ndarray, np.ndarray], jax.Array | np.ndarray],
    batch_size: int,
    desc: str,
    path: Path,
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    def launched() -> Iterator[tuple[int, jax.Array | np.ndarray]]:
        for start in progress(range(0, len(positions), batch_size), desc):
            batch = [records[position] for position in positions[start : start + batch_size]]
            filled = batch + [batch[-1]] * (batch_size - len(batch))
            images = np.stack([record["image"] for record in filled])
            valid_shape = np.stack([record["valid_shape"] for record in filled])
            yield len(batch), encode(images, valid_shape)

    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for count, embeddings in one_ahead(launched()):
        for embedding in np.asarray(embeddings)[:count]:
            writer.write(np.ascontiguousarray(embedding).tobytes())
    writer.close()
