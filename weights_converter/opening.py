"""Opens a checkpoint from a file, a checkpoint directory or a known name."""

import dataclasses
import os

from medsam_jax.errors import UserError
from medsam_jax.io.files import sha256_of
from weights_converter import contract, conversion, fetch, known, readers
from weights_converter.architectures import ARCHITECTURES
from weights_converter.registry import REGISTRY, by_sha256


def open_checkpoint(source: str, model: str = "auto") -> conversion.StateDict:
    """Returns the tensors of a checkpoint: names and shapes checked, values not read yet.

    Args:
      source: path of a file, a checkpoint directory or a folder of the hub; or name of known
        weights, which are downloaded and verified.
      model: known name or architecture of the file; "auto" recognises it by the file's hash, then
        by the JSON beside it (`contract`), then by its tensors. A known name sets the
        preprocessing that the weights were trained with.

    Raises:
      UserError: unreadable file, failed verification, or tensors that differ from the model's.
    """
    source = readers.file_in(source)
    if os.path.isdir(source):
        if model != "auto":
            raise UserError(
                f"{source}: its model.json says what it holds; leave out --model {model}"
            )
        return conversion.state_dict_from_directory(source)
    if not os.path.exists(source):
        path = str(fetch.fetch(source))
        model = source if model == "auto" else model
    else:
        path = source
    file = readers.read_file(path)
    sha256 = sha256_of(path)
    name, recognised = by_sha256(sha256) or (None, None)
    beside = contract.read(path, sha256) if model == "auto" and not name else None
    if model == "auto" and name:
        model = name
    metadata = known.known_metadata(recognised) if recognised else {"licence": "unknown"}
    if beside:
        config, metadata = beside
    elif model in REGISTRY:
        config = known.known_config(model)
    else:
        config = None if model == "auto" else ARCHITECTURES[model].config()
    state = conversion.state_dict_from_file(file, config)
    return dataclasses.replace(state, source=state.source | {"sha256": sha256}, metadata=metadata)
