"""A model as files that run without this library: StableHLO programs by `jax.export`, and weights.

An exported directory holds `image_encoder.stablehlo` and `mask_decoder.stablehlo` (the prompt
encoder is part of the latter), `weights.safetensors` with the arrays both take, and `model.json`
with the preprocessing contract and the arguments of the programs. `jax.export` promises to read
them for six months of jax releases. Shapes are fixed: one image, `prompts` prompts with up to
`points` points each; what a prompt lacks is marked as padding and leaves no trace in the answer.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from medsam_jax.data.prompts import PADDING_LABEL
from medsam_jax.data.recipes import get_recipe
from medsam_jax.errors import UserError
from medsam_jax.io.files import replacing
from medsam_jax.io.safetensors import write_safetensors
from medsam_jax.io.tensors import LazyTensor
from medsam_jax.models.checkpoint import abstract_model
from medsam_jax.models.functional import Functional
from medsam_jax.models.sam import Sam, SamConfig
from medsam_jax.ops.compile import at_precision
from medsam_jax.ops.form import Form, form_for

FORMAT_VERSION = 1
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_ENCODER, _DECODER = "image_encoder.stablehlo", "mask_decoder.stablehlo"


def export_model(
    model: Sam,
    directory: str | os.PathLike,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    prompts: int = 1,
    points: int = 8,
    matmul_precision: str = "highest",
) -> None:
    """Writes a model's programs and weights to a directory, which appears whole or not at all.

    Args:
      platforms: the programs run on, of `PLATFORMS`.
      prompts, points: places for prompts, and for points of each.
      matmul_precision: of float32 products, as `Predictor` takes it; part of the programs.

    Raises:
      UserError: an unknown platform or precision, no places, or a directory that is there already.
    """
    if unknown := [name for name in platforms or ["none"] if name not in PLATFORMS]:
        raise UserError(f"platforms: {unknown[0]} given; use some of {', '.join(PLATFORMS)}")
    if prompts < 1 or points < 1:
        raise UserError(f"prompts, points: {prompts}, {points} given; use 1 or more of each")
    forms = {name: form_for(name, matmul_precision=matmul_precision) for name in platforms}
    _require_flatbuffers()
    arrays = {name: np.asarray(array) for name, array in Functional(model).arrays.items()}
    stored = get_recipe(model.config.preprocessing.recipe).size
    image = _shape(1, stored, stored, 3, dtype=jnp.uint8), _shape(1, 2, dtype=jnp.int32)
    programs = {
        _ENCODER: (Sam.encode, image),
        _DECODER: (_decode, _decoder_arguments(model, prompts, points)),
    }
    # Kernels for NVIDIA GPUs are stored as Triton's code, for which jax promises no compatibility.
    triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with replacing(Path(directory), overwrite=False) as partial:
        for name, (function, arguments) in programs.items():
            program = jax.jit(_by_platform(function, model.config, forms))
            exported = jax.export.export(
                program, platforms=tuple(platforms), disabled_checks=[triton]
            )
            (partial / name).write_bytes(exported(arrays, *arguments).serialize())
        weights = {name: LazyTensor.of(array) for name, array in arrays.items()}
        write_safetensors(str(partial / "weights.safetensors"), weights)
        description = {
            "format_version": FORMAT_VERSION,
            "jax_version": jax.__version__,
            "platforms": list(platforms),
            "matmul_precision": matmul_precision,
            "prompts": prompts,
            "points": points,
            "architecture": model.config.to_dict(),
            "programs": {name: _signature(arguments) for name, (_, arguments) in programs.items()},
        }
        (partial / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")


def _require_flatbuffers() -> None:
    """jax writes and reads programs with it, without depending on it."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError("flatbuffers: not installed; pip install 'medsam-jax[export]'")


def _by_platform(
    function: Callable[..., Any], config: SamConfig, forms: Mapping[str, Form]
) -> Callable[..., Any]:
    """`function(model, ...)` as a program of (weights, ...), in the form of each platform."""

    def program_in(form: Form) -> Callable[..., Any]:
        functional = Functional(abstract_model(config), form)

        def program(arrays: Mapping[str, Array], *arguments: Any) -> Any:
            return function(functional.bind(arrays), *arguments)

        return at_precision(program, form)

    by_name = {name: program_in(form) for name, form in forms.items()}
    if len(forms) == 1:
        return next(iter(by_name.values()))
    return lambda *arguments: jax.lax.platform_dependent(*arguments, **by_name)


def _decode(
    model: Sam, embedding: Float[Array, "1 h w c"], given: Mapping[str, Array]
) -> tuple[Array, Array]:
    given = dict(given)
    points = given.pop("coords"), given.pop("labels")
    return model.decode(embedding, points=points, multimask_output=None, **given)


def _decoder_arguments(model: Sam, prompts: int, points: int) -> tuple[Any, ...]:
    side = model.config.embedding_size
    given = {
        "coords": _shape(1, prompts, points, 2),
        "labels": _shape(1, prompts, points, dtype=jnp.int32),
        "boxes": _shape(1, prompts, 4),
        "boxes_valid": _shape(1, prompts, dtype=jnp.bool_),
        "masks": _shape(1, prompts, 4 * side, 4 * side),
        "masks_valid": _shape(1, prompts, dtype=jnp.bool_),
    }
    return _shape(1, side, side, model.config.embed_dim), given


def _shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _signature(arguments: tuple[Any, ...]) -> list[Any]:
    """Types and shapes of what a program takes after the weights."""
    return jax.tree.map(lambda x: [str(x.dtype), *x.shape], list(arguments))


class ExportedModel:
    """Runs the programs of a directory by `export_model`; needs jax and safetensors only.

    Raises UserError for no such directory, another format, or one exported for other platforms.
    """

    def __init__(self, directory: str | os.PathLike):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        directory = Path(directory)
        try:
            self.description = json.loads((directory / "model.json").read_text(encoding="utf-8"))
            version = self.description["format_version"]
            programs = [(directory / name).read_bytes() for name in (_ENCODER, _DECODER)]
            weights = load_file(directory / "weights.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            remedy = "write it with python -m medsam_jax.export"
            raise UserError(f"{directory}: no exported model ({error}); {remedy}") from None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{directory}/model.json: format {version}, this program reads {FORMAT_VERSION}; "
                "export the model again"
            )
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if platform not in self.description["platforms"]:
            raise UserError(
                f"{directory}: exported for {', '.join(self.description['platforms'])}, this is "
                f"{platform}; export it again with --platforms {platform}"
            )
        _require_flatbuffers()
        self._weights = jax.device_put(weights)
        self._encode, self._decode = (
            jax.jit(jax.export.deserialize(bytearray(program)).call) for program in programs
        )

    def encode(
        self,
        images: UInt8[Array | np.ndarray, "1 s s 3"],
        valid_shape: Int[Array | np.ndarray, "1 2"],
    ) -> Float[Array, "1 h w c"]:
        """Embedding of an image on the stored grid (`resize_image`) with its valid part."""
        return self._encode(self._weights, images, jnp.asarray(valid_shape, jnp.int32))

    def decode(
        self,
        embedding: Float[Array | np.ndarray, "1 h w c"],
        coords: Float[Array | np.ndarray, "p n 2"] | None = None,
        labels: Int[Array | np.ndarray, "p n"] | None = None,
        boxes: Float[Array | np.ndarray, "p 4"] | None = None,
        masks: Float[Array | np.ndarray, "p m m"] | None = None,
    ) -> tuple[Float[Array, "p 4 m m"], Float[Array, "p 4"]]:
        """Low-resolution logits and predicted IoU: the mask of a clear prompt, then SAM's three.

        Args:
          coords, labels, boxes: in pixels of the encoder input; labels 1 and 0.
          masks: logits of an earlier answer.

        Raises:
          UserError: nothing given, or more prompts or points than there are places.
        """
        given = [x for x in (coords, boxes, masks) if x is not None]
        places, points = self.description["prompts"], self.description["points"]
        if not given:
            raise UserError("prompt: nothing given; give coords with labels, boxes or masks")
        if (coords is None) != (labels is None):
            raise UserError("coords, labels: one given without the other; give both")
        count = len(given[0])
        if count > places or (coords is not None and np.shape(coords)[1] > points):
            raise UserError(
                f"prompt: {count} prompts of shape {np.shape(given[0])[1:]}; this model was "
                f"exported for {places} with up to {points} points, see python -m medsam_jax.export"
            )
        padded = self._pad(coords=coords, labels=labels, boxes=boxes, masks=masks)
        logits, scores = self._decode(self._weights, embedding, padded)
        return logits[0, :count], scores[0, :count]

    def _pad(self, **given: Any) -> dict[str, np.ndarray]:
        shapes = self.description["programs"][_DECODER][1]
        padded = {name: np.zeros(size, dtype) for name, (dtype, *size) in shapes.items()}
        padded["labels"][:] = PADDING_LABEL
        for name, values in given.items():
            if values is not None:
                padded[name][0, *map(slice, np.shape(values))] = values
                if f"{name}_valid" in padded:
                    padded[f"{name}_valid"][0, : len(values)] = True
        return padded
