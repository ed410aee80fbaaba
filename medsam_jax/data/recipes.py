"""Two contracts: how a scan becomes slices (`Recipe`), how a model reads them (`Preprocessing`).

A recipe is stored with a data set, a preprocessing contract with a checkpoint. Intensity range and
geometry belong to the weights: a wrong input range is the failure that users of other
implementations report most.
"""

import dataclasses
from typing import Any, Literal

from medsam_jax.data.modality import CT_WINDOWS, IntensitySettings
from medsam_jax.errors import UserError
from medsam_jax.io.files import jsonable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(IntensitySettings):
    """Steps from a scan to uint8 slices of one size, and the objects that are kept.

    Object rules follow the group's code: `rule == "label"` counts a label in the whole scan and in
    the stored slice (MedSAM v1); `"components"` removes connected components, 26-connected in the
    scan and 8-connected in the original slice (v2). `min_voxels` applies to volumes only.
    """

    size: int  # side of the stored slice, pixels
    geometry: Literal["pad", "squash"]  # keep the aspect and zero-pad bottom/right, or stretch
    interpolation: Literal["spline", "area", "pillow"]  # of the image; masks are always nearest
    # size / max(H, W), or the exact ratio of each axis
    coordinate_scale: Literal["longest", "per_axis"]
    rule: Literal["label", "components"]
    min_voxels: int  # a scan's label (or component) must have more than this
    min_pixels: int  # a slice's label (or component) must have more than this

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as JSON-able data, window limits included."""
        windows = {name: CT_WINDOWS[name] for name in self.ct_windows}
        return dataclasses.asdict(self) | {"ct_windows": windows}


DEFAULT_RECIPE = "lite"  # of `datasets.build`: what `config.checkpoint`'s default needs

# Intensities and objects from MedSAM v2 on, which the recipe for SAM shares.
_SINCE_V2 = {"percentiles": (0.5, 99.5), "percentile_voxels": "positive", "clip_8bit": False}
_SINCE_V2 |= {"rule": "components"}

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="v1",
            size=256,
            geometry="squash",
            interpolation="spline",
            coordinate_scale="per_axis",
            ct_windows=("wide",),
            percentiles=(0.95, 99.5),
            percentile_voxels="all",
            clip_8bit=True,
            rule="label",
            min_voxels=1000,
            min_pixels=100,
        ),
        Recipe(
            name="v2",
            size=1024,
            geometry="squash",
            interpolation="spline",
            coordinate_scale="per_axis",
            ct_windows=("soft_tissue", "lung", "brain"),
            **_SINCE_V2,
            min_voxels=999,
            min_pixels=99,
        ),
        Recipe(
            name="lite",
            size=256,
            geometry="pad",
            interpolation="area",
            coordinate_scale="longest",
            ct_windows=("wide", "soft_tissue", "lung", "brain"),
            **_SINCE_V2,
            min_voxels=99,  # the group's pre_CT_MR.py as it stands today; the paper's are in v2
            min_pixels=9,
        ),
        Recipe(
            name="sam",
            size=1024,
            geometry="pad",
            interpolation="pillow",
            coordinate_scale="per_axis",
            ct_windows=("wide", "soft_tissue", "lung", "brain"),
            **_SINCE_V2,
            min_voxels=0,
            min_pixels=0,
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """Returns the recipe of that name. Raises UserError for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"recipe: {name!r} is unknown; use one of {', '.join(RECIPES)}")
    return RECIPES[name]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The steps between a stored slice and the model, and between the model's logits and a mask.

    It travels with a checkpoint; `check_compatible` refuses a data set of another recipe.
    """

    recipe: str  # the RECIPES entry that turns a scan into uint8 slices
    image_size: int  # side of the encoder input, pixels
    normalisation: Literal["min_max", "mean_std", "unit"]  # min_max: per image, over its valid part
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # for mean_std, 0..255
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    upsample: Literal["logits", "probabilities"] = "logits"  # interpolated back to the image's size
    mask_threshold: float = 0.0  # on the logits: 0 is probability 0.5
    ct_windows: tuple[str, ...] = ()  # of the training slices, most frequent first; (): not known

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON-able fields; `from_dict` reads them back."""
        return jsonable(dataclasses.asdict(self))

    def ct_window(self, named: str | None = None) -> str:
        """Returns the CT window to show: the named one, the trained one, or the recipe's first."""
        return named or (*self.ct_windows, *get_recipe(self.recipe).ct_windows)[0]

    def fields_of_embedding(self) -> dict[str, Any]:
        """Returns the fields that the embedding of a stored slice depends on."""
        others = ("ct_windows", "upsample", "mask_threshold")
        return {name: x for name, x in self.to_dict().items() if name not in others}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Reads the fields of `to_dict`. Raises UserError for unknown or missing fields."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(fields) - set(known)), sorted(required - set(fields))
        if unknown or missing:
            raise UserError(
                f"preprocessing: unknown fields {unknown}, missing fields {missing}; "
                "the checkpoint was written by another version: convert it again"
            )
        windows = tuple(fields.get("ct_windows", ()))
        known_windows = get_recipe(fields["recipe"]).ct_windows
        if not set(windows) <= set(known_windows):
            raise UserError(
                f"preprocessing: ct_windows {', '.join(windows)} are not all of recipe "
                f"{fields['recipe']}'s: {', '.join(known_windows)}; name some of these"
            )
        names = {"pixel_mean", "pixel_std"} & set(fields)
        triples = {name: tuple(map(float, fields[name])) for name in names}
        return cls(**(fields | triples | {"ct_windows": windows}))


PREPROCESSING = {
    "v1": Preprocessing(recipe="v1", image_size=1024, normalisation="mean_std"),
    "v2": Preprocessing(
        recipe="v2", image_size=1024, normalisation="min_max", upsample="probabilities"
    ),
    "lite": Preprocessing(recipe="lite", image_size=256, normalisation="min_max"),
    "sam": Preprocessing(recipe="sam", image_size=1024, normalisation="mean_std"),
}
