"""Programs to compile for accelerators, as inference and training make them, from shapes alone.

A name says everything: "encoder vit_b, batch 1", "decoder lite_medsam, boxes 64",
"train medsam_v2, batch 16, fsdp 16". No weights and no data are needed.
"""

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.targets import Target
from medsam_jax.data.recipes import get_recipe
from medsam_jax.inference.engine import decode_arrays, embed_arrays
from medsam_jax.inference.mask_filters import Thresholds, enlargement, filter_masks
from medsam_jax.inference.prompts import Prompts, pack
from medsam_jax.models.checkpoint import abstract_model
from medsam_jax.models.common import Derived
from medsam_jax.models.functional import Functional
from medsam_jax.models.sam import SamConfig
from medsam_jax.models.unet import UNetConfig
from medsam_jax.ops.compile import jit
from medsam_jax.ops.form import form_for
from medsam_jax.training.setup import Setup, set_up
from weights_converter.known import known_config
from weights_converter.registry import REGISTRY

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = ("lite_medsam", "vit_b", "vit_l", "vit_h")
_SLICE = 512  # side of the image whose automatic masks are filtered, pixels


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes of its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    dtype: str  # of the computation


def recipes() -> list[str]:
    """Returns the names of the configs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def build(name: str, target: Target) -> Program:
    """Makes the program of a name for a target. Raises KeyError for an unknown name."""
    kind, _, rest = name.partition(" ")
    what, *settings = rest.split(", ")
    return _KINDS[kind](what, dict(map(_setting, settings)), target)


def _setting(text: str) -> tuple[str, Any]:
    """Reads "batch 8", "remat off" or "cached"."""
    key, _, value = text.partition(" ")
    return key, int(value) if value.isdigit() else value or True


def _some_values(x: jax.ShapeDtypeStruct) -> np.ndarray:
    """Values that the compiler cannot fold, unlike zeros."""
    return np.random.default_rng(0).standard_normal(x.shape).astype(x.dtype)


class _Model:
    """A model of shapes in the form of a target, its arguments placed on the target's devices."""

    def __init__(self, name: str, dtype: str, target: Target):
        self.config = dataclasses.replace(getattr(SamConfig, name)(), dtype=dtype)
        model = abstract_model(self.config)
        # A loaded model has them as constants.
        derived = nnx.state(model, Derived)
        nnx.update(model, jax.tree.map(_some_values, derived))
        self.mesh = target.mesh()
        form = form_for(target.chip.platform, target.devices)
        self.form = dataclasses.replace(form, mesh=self.mesh)
        self.functional = Functional(model, self.form).for_inference()
        self.on_all = NamedSharding(self.mesh, PartitionSpec())
        self.by_item = NamedSharding(self.mesh, PartitionSpec("data"))
        self.arrays = self.shapes(self.functional.arrays)

    def shapes(self, arrays: Any, split: bool = False) -> Any:
        sharding = self.by_item if split else self.on_all
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays
        )

    def boxes(self, count: int) -> dict[str, Any]:
        return self.shapes(pack([Prompts(boxes=np.zeros((count, 4), np.float32))], count))

    def points(self, count: int) -> dict[str, Any]:
        coords, labels = np.zeros((count, 1, 2), np.float32), np.ones((count, 1), np.int32)
        return self.shapes(pack([Prompts(coords, labels)], count))

    def decoder(self, prompts: dict[str, Any], multimask: bool) -> Program:
        side, channels = self.config.embedding_size, self.config.embed_dim
        embedding = jax.ShapeDtypeStruct((1, side, side, channels), jnp.dtype(self.config.dtype))
        function = functools.partial(decode_arrays, self.functional)
        program = jit(function, self.form, static_argnums=3, out_shardings=self.on_all)
        arguments = self.arrays, self.shapes(embedding), prompts, multimask
        return Program(program, arguments, self.config.dtype)


def _encoder(name: str, settings: dict[str, Any], target: Target) -> Program:
    model = _Model(name, settings.get("dtype", "bfloat16"), target)
    batch, side = settings["batch"], get_recipe(model.config.preprocessing.recipe).size
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    valid_shape = jax.ShapeDtypeStruct((batch, 2), jnp.int32)
    function = functools.partial(embed_arrays, model.functional)
    program = jit(function, model.form, out_shardings=model.by_item)
    arguments = model.arrays, *model.shapes((images, valid_shape), split=True)
    return Program(program, arguments, model.config.dtype)


def _decoder(name: str, settings: dict[str, Any], target: Target) -> Program:
    model = _Model(name, settings.get("dtype", "bfloat16"), target)
    return model.decoder(model.boxes(settings["boxes"]), multimask=False)


def _masks(name: str, settings: dict[str, Any], target: Target) -> Program:
    """The two programs of automatic masks: 64 points decoded, and their masks filtered."""
    model = _Model(name, settings.get("dtype", "bfloat16"), target)
    if "decode" in settings:
        return model.decoder(model.points(64), multimask=True)
    side = 4 * model.config.embedding_size
    size = get_recipe(model.config.preprocessing.recipe).size
    contract = model.config.preprocessing
    box, shape = np.zeros(4, np.int32), np.zeros(2, np.int32)
    steps = enlargement(side, (size, size), (_SLICE, _SLICE), contract)
    answers = np.zeros((64, 3, side, side), np.float32), np.zeros((64, 3), np.float32)
    thresholds = Thresholds(*map(np.float32, (0.88, 0.95, 1.0, 0.0)))
    arguments = model.shapes((*answers, np.zeros(64, bool), steps, box, shape, thresholds))
    program = functools.partial(filter_masks, upsample=contract.upsample)
    return Program(jit(program, model.form, out_shardings=model.on_all), arguments, "float32")


def load_config(recipe: str) -> tuple[ml_collections.ConfigDict, SamConfig | UNetConfig]:
    """Returns a recipe's configuration and the model config of the checkpoint it starts from."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    if config.checkpoint in REGISTRY:
        return config, known_config(config.checkpoint)
    small = {"features": (16, 32, 64, 128, 128), "image_size": 128}
    if recipe != "unet_small":
        return config, UNetConfig()
    contract = dataclasses.replace(UNetConfig().preprocessing, image_size=128)
    return config, UNetConfig(**small, preprocessing=contract)


def _run(recipe: str, settings: dict[str, Any], target: Target) -> Setup:
    config, stored = load_config(recipe)
    config.batch_size = settings.get("batch", config.batch_size)
    config.eval_batch_size = settings.get("batch", config.eval_batch_size)
    config.accumulation_steps = settings.get("accumulated", config.accumulation_steps)
    config.dtype = settings.get("dtype", config.dtype)
    config.remat = {"on": True, "off": False}.get(settings.get("remat"), config.remat)
    mesh = target.mesh(settings.get("fsdp", 1))
    return set_up(config, stored, mesh, platform=target.chip.platform)


def _train(recipe: str, settings: dict[str, Any], target: Target) -> Program:
    run = _run(recipe, settings, target)
    arguments = run.state, run.train_batch("cached" in settings)
    return Program(run.train_step, arguments, run.config.dtype)


def _evaluate(recipe: str, settings: dict[str, Any], target: Target) -> Program:
    run = _run(recipe, settings, target)
    arguments = run.state.evaluated(), run.eval_batch("cached" in settings)
    return Program(run.eval_step, arguments, run.config.dtype)


_KINDS = {
    "encoder": _encoder,
    "decoder": _decoder,
    "masks": _masks,
    "train": _train,
    "eval": _evaluate,
}


# Recipes whose steps are those of another one.
SAME = {
    "demo": "lite_medsam",
    "boxes_and_points_augmented": "boxes_and_points",
    "unet_small": "unet",
}
# Settings of the recipes' steps on one device; the others take the batch of their config.
_ON_ONE_DEVICE = {
    "lite_medsam": ("cached", "cached, dtype bfloat16", ""),
    "boxes_and_points": ("cached", ""),
    "medsam_v1": ("cached", ""),
    "medsam_v2": ("batch 1", "batch 1, remat off", "batch 4"),
    "lora": ("batch 1", ""),
}
# The device that the docs name for a recipe, and settings with which its step must fit.
STATED = {
    "lite_medsam": ("v5e", "cached"),
    "boxes_and_points": ("v5e", "cached"),
    "boxes_and_points_encoder": ("v5e", ""),
    "medsam_v1": ("v5e", "cached"),
    "medsam_v2": ("v5e-16", "accumulated 10, fsdp 16"),
    "lora": ("v5e", ""),
    "unet": ("v5e", ""),
}


def names() -> Iterator[tuple[str, str]]:
    """Yields every program with its target, those that compile in seconds first."""
    one_chip = ("h100", "v5e", "v6e", "v5p")
    programs = [f"decoder lite_medsam, boxes {count}" for count in (1, 16, 64)]
    programs += ["masks lite_medsam, decode", "masks lite_medsam, filter"]
    programs += [f"encoder lite_medsam, batch {batch}" for batch in (1, 8)]
    programs += [f"decoder vit_b, boxes {count}" for count in (1, 16, 64)]
    programs += [f"encoder {model}, batch {n}" for model in MODELS[1:] for n in (1, 8)]
    distinct = [recipe for recipe in recipes() if recipe not in SAME]
    for step, recipe in itertools.product(("train", "eval"), distinct):
        settings = _ON_ONE_DEVICE.get(recipe, ("",))
        programs += [", ".join(filter(None, (f"{step} {recipe}", one))) for one in settings]
    yield from itertools.product(programs, one_chip)
    for recipe, (target, settings) in STATED.items():
        if target not in one_chip:
            yield ", ".join(filter(None, (f"train {recipe}", settings))), target
    for target in ("v5e-4", "v5e-16", "v6e-16", "v5p-16"):
        count = int(target.partition("-")[2])
        yield f"encoder vit_b, batch {8 * count}", target
        yield f"train medsam_v1, cached, batch {8 * count}", target
        yield f"train medsam_v2, batch {count}, fsdp {count}", target
