"""Describes a checkpoint, including one that fits no supported model."""

import collections
import os

from medsam_jax.errors import UserError
from medsam_jax.io.files import sha256_of
from medsam_jax.io.tensors import DTYPE_NAMES, LazyTensor
from weights_converter import contract, conversion, fetch, names, opening, readers
from weights_converter.registry import by_sha256


def inspect(source: str, model: str = "auto") -> str:
    """Returns a text: format, naming, wrapper, architecture, parameters by part, types, licence.

    A file that fits no supported model is described too; the last line states the mismatch.

    Raises:
      UserError: not a readable checkpoint.
    """
    source = readers.file_in(source)
    if os.path.isdir(source):
        state = opening.open_checkpoint(source, model)
        recognised = by_sha256(state.source.get("sha256", ""))
        made_from = recognised[0] if recognised else state.source.get("file", "not recorded")
        trained = "trained further here" if "training" in state.metadata else "as converted"
        lines = {"input": source, "format": "orbax", "made from": f"{made_from}, {trained}"}
        return _table(lines | _state(state))
    path = source if os.path.exists(source) else str(fetch.fetch(source))
    file = readers.read_file(path)
    lines = {
        "input": path,
        "format": file.format,
        "wrapper": file.wrapper or "none",
        "prefix": file.prefix or "none",
        "naming": names.detect_naming(file.tensors) or "none of ours",
        "sha256": sha256_of(path),
    }
    try:
        state = opening.open_checkpoint(source, model)
    except UserError as error:
        return _table(lines | _contents(file.tensors) | {"fits": f"no: {error}"})
    recognised = by_sha256(lines["sha256"])
    lines["known as"] = recognised[0] if recognised else "no known file"
    note = contract.beside(path)
    lines["contract"] = f"from {note.name}" if not recognised and note.exists() else "by its kind"
    return _table(lines | _state(state))


def _state(state: conversion.StateDict) -> dict[str, str]:
    config = state.config
    return {
        "licence": state.metadata.get("licence", "unknown"),
        "architecture": f"{config.name}, input {config.image_size} x {config.image_size}",
        **contract.lines(config),
        **_contents(state.tensors),
    }


def _contents(tensors: dict[str, LazyTensor]) -> dict[str, str]:
    parts, types = collections.Counter(), collections.Counter()
    for name, tensor in tensors.items():
        parts[name.split(".")[0]] += tensor.size
        types[DTYPE_NAMES[tensor.dtype]] += 1
    of_types = ", ".join(f"{count} {dtype}" for dtype, count in types.most_common())
    return {
        "tensors": f"{len(tensors)} ({of_types})",
        "elements": f"{sum(parts.values()):,}",
        **{f"  {ascii(part[:40])[1:-1]}": f"{size:,}" for part, size in parts.most_common(20)},
    }


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines)) + 2
    return "\n".join(f"{title + ':':<{width}}{text}" for title, text in lines.items())
