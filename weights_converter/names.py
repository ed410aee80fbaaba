"""Tables of the tensor names in each naming, and of the axis order of the values.

segment_anything's names are the common form; MedSAM, LiteMedSAM and MobileSAM use them. Another
naming is a table of pairs. Our own paths differ from the common form in the last part and in the
axis order.
"""

import dataclasses
import os
import re
from collections.abc import Mapping

import numpy as np

SEGMENT_ANYTHING = "segment_anything"
TRANSFORMERS = "transformers"
NAMINGS = (SEGMENT_ANYTHING, TRANSFORMERS)

# Fields of the patterns below. Every pattern matches whole names only.
_FIELDS = {"i": r"\d+", "j": r"\d+", "leaf": r"weight|bias", "rest": r"[a-z_0-9.]+"}

# segment_anything <-> transformers `SamModel` (convert_sam_to_hf.py); the first match applies.
_TRANSFORMERS_TABLE = (
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("image_encoder.patch_embed.proj.{leaf}", "vision_encoder.patch_embed.projection.{leaf}"),
    ("image_encoder.blocks.{i}.norm{j}.{leaf}", "vision_encoder.layers.{i}.layer_norm{j}.{leaf}"),
    ("image_encoder.blocks.{i}.attn.{rest}", "vision_encoder.layers.{i}.attn.{rest}"),
    ("image_encoder.blocks.{i}.mlp.{rest}", "vision_encoder.layers.{i}.mlp.{rest}"),
    ("image_encoder.neck.0.weight", "vision_encoder.neck.conv1.weight"),
    ("image_encoder.neck.1.{leaf}", "vision_encoder.neck.layer_norm1.{leaf}"),
    ("image_encoder.neck.2.weight", "vision_encoder.neck.conv2.weight"),
    ("image_encoder.neck.3.{leaf}", "vision_encoder.neck.layer_norm2.{leaf}"),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "shared_image_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.{i}.weight", "prompt_encoder.point_embed.{i}.weight"),
    ("prompt_encoder.not_a_point_embed.weight", "prompt_encoder.not_a_point_embed.weight"),
    ("prompt_encoder.no_mask_embed.weight", "prompt_encoder.no_mask_embed.weight"),
    ("prompt_encoder.mask_downscaling.0.{leaf}", "prompt_encoder.mask_embed.conv1.{leaf}"),
    ("prompt_encoder.mask_downscaling.1.{leaf}", "prompt_encoder.mask_embed.layer_norm1.{leaf}"),
    ("prompt_encoder.mask_downscaling.3.{leaf}", "prompt_encoder.mask_embed.conv2.{leaf}"),
    ("prompt_encoder.mask_downscaling.4.{leaf}", "prompt_encoder.mask_embed.layer_norm2.{leaf}"),
    ("prompt_encoder.mask_downscaling.6.{leaf}", "prompt_encoder.mask_embed.conv3.{leaf}"),
    ("mask_decoder.iou_token.weight", "mask_decoder.iou_token.weight"),
    ("mask_decoder.mask_tokens.weight", "mask_decoder.mask_tokens.weight"),
    (
        "mask_decoder.transformer.layers.{i}.norm{j}.{leaf}",
        "mask_decoder.transformer.layers.{i}.layer_norm{j}.{leaf}",
    ),
    (
        "mask_decoder.transformer.norm_final_attn.{leaf}",
        "mask_decoder.transformer.layer_norm_final_attn.{leaf}",
    ),
    ("mask_decoder.transformer.{rest}", "mask_decoder.transformer.{rest}"),
    ("mask_decoder.output_upscaling.0.{leaf}", "mask_decoder.upscale_conv1.{leaf}"),
    ("mask_decoder.output_upscaling.1.{leaf}", "mask_decoder.upscale_layer_norm.{leaf}"),
    ("mask_decoder.output_upscaling.3.{leaf}", "mask_decoder.upscale_conv2.{leaf}"),
    (
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.0.{leaf}",
        "mask_decoder.output_hypernetworks_mlps.{i}.proj_in.{leaf}",
    ),
    (
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.1.{leaf}",
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.0.{leaf}",
    ),
    (
        "mask_decoder.output_hypernetworks_mlps.{i}.layers.2.{leaf}",
        "mask_decoder.output_hypernetworks_mlps.{i}.proj_out.{leaf}",
    ),
    (
        "mask_decoder.iou_prediction_head.layers.0.{leaf}",
        "mask_decoder.iou_prediction_head.proj_in.{leaf}",
    ),
    (
        "mask_decoder.iou_prediction_head.layers.1.{leaf}",
        "mask_decoder.iou_prediction_head.layers.0.{leaf}",
    ),
    (
        "mask_decoder.iou_prediction_head.layers.2.{leaf}",
        "mask_decoder.iou_prediction_head.proj_out.{leaf}",
    ),
)

# Second names of one tensor: transformers ties the prompt encoder's copy.
ALIASES = {
    "prompt_encoder.shared_embedding.positional_embedding": (
        "shared_image_embedding.positional_embedding"
    ),
}

# Entries of PyTorch files that the model does not use; kept, so that an export contains them.
EXTRAS = re.compile(
    r".+\.num_batches_tracked"  # BatchNorm's counter of training steps
    r"|image_encoder\.(norm_head|head)\.(weight|bias)"  # MobileSAM: TinyViT's ImageNet classifier
)


def _compile(source: str, target: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(source)
    for field, expression in _FIELDS.items():
        pattern = pattern.replace(rf"\{{{field}\}}", f"(?P<{field}>{expression})")
    return re.compile(pattern), re.sub(r"\{(\w+)\}", r"\\g<\1>", target)


_TO_TRANSFORMERS = [_compile(ours, theirs) for ours, theirs in _TRANSFORMERS_TABLE]
_FROM_TRANSFORMERS = [_compile(theirs, ours) for ours, theirs in _TRANSFORMERS_TABLE]


def _rename(name: str, table: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in table:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def from_naming(name: str, naming: str) -> str | None:
    """Returns segment_anything's name for the tensor `name` of `naming`; None if there is none."""
    if naming == SEGMENT_ANYTHING:
        return name
    return _rename(ALIASES.get(name, name), _FROM_TRANSFORMERS)


def to_naming(name: str, naming: str) -> str | None:
    """Returns the name in `naming` for segment_anything's `name`; None if there is none."""
    return name if naming == SEGMENT_ANYTHING else _rename(name, _TO_TRANSFORMERS)


def detect_naming(names: Mapping[str, object]) -> str | None:
    """Returns the naming that `names` follow; None if they are not a SAM's."""
    if any(name.startswith(("vision_encoder.", "shared_image_embedding.")) for name in names):
        return TRANSFORMERS
    parts = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
    return SEGMENT_ANYTHING if any(name.startswith(parts) for name in names) else None


# Parts of names that come from PyTorch's wrappers of modules: compiled, parallel, sharded, remat.
_MODULE_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def unwrapped(names: Mapping[str, object]) -> tuple[dict[str, str], str]:
    """Finds the names of a SAM within those of a training script.

    Module wrappers come off anywhere, and any common prefix (`model.`, `sam.`) without which the
    names are a SAM's.

    Returns:
      The name for each name, and what was taken off, "" for nothing.
    """
    cleaned = {name: _MODULE_WRAPPERS.sub("", name) for name in names}
    if len(set(cleaned.values())) < len(cleaned):
        cleaned = {name: name for name in names}
    shared = os.path.commonprefix(list(cleaned.values()))
    ends = [0, *(match.end() for match in re.finditer(r"\.", shared))]
    fitting = (n for n in ends if detect_naming({name[n:]: None for name in cleaned.values()}))
    start = next(fitting, 0)
    renamed = {name: clean[start:] for name, clean in cleaned.items()}
    removed = dict.fromkeys(name.removesuffix(new) for name, new in renamed.items())
    if len(removed) > 1:  # within the names
        removed = dict.fromkeys(
            _MODULE_WRAPPERS.search(name)[0] for name in names if cleaned[name] != name
        )
    return renamed, ", ".join(removed)


def strangers(names: Mapping[str, object]) -> str:
    """Describes names that are not a SAM's, and those under a prefix that are."""
    under = re.compile(r"(.+\.)(image_encoder|vision_encoder|prompt_encoder|mask_decoder)\.")
    prefix = next((match[1] for match in map(under.match, names) if match), None)
    others = [name for name in names if prefix is None or not name.startswith(prefix)]
    shown = ", ".join(ascii(name[:60]) for name in others[:3])
    if prefix is None:
        return f"not the tensors of a SAM (the first are {shown})"
    return (
        f"a SAM's tensors are under {prefix!r}, beside {len(others)} others (the first are "
        f"{shown}); save those of the SAM alone"
    )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """PyTorch's name for the last part of our path, and the axis order of the values.

    `axes` is the transposition from PyTorch's order to ours.
    """

    pattern: re.Pattern[str]
    name: str
    axes: tuple[int, ...] | None = None

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        return value if self.axes is None else value.transpose(self.axes)

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        return value if self.axes is None else value.transpose(np.argsort(self.axes))

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self.axes is None else tuple(shape[axis] for axis in np.argsort(self.axes))


# Our path, with the number of axes appended as "/N". Convolutions and transposed convolutions share
# a rule: [out, in, h, w] and [in, out, h, w] become [h, w, in, out] and [h, w, out, in], the latter
# the layout of `transpose_kernel=True`.
_LEAVES = (
    Leaf(re.compile(r"(.+)\.kernel/2"), "weight", (1, 0)),
    Leaf(re.compile(r"(.+)\.kernel/4"), "weight", (2, 3, 1, 0)),
    Leaf(re.compile(r"(.+)\.scale/1"), "weight"),
    Leaf(re.compile(r"(.+)\.embedding/2"), "weight"),
    Leaf(re.compile(r"(.+)\.bias/1"), "bias"),
    Leaf(re.compile(r"(.+)\.mean/1"), "running_mean"),
    Leaf(re.compile(r"(.+)\.var/1"), "running_var"),
    Leaf(re.compile(r"(.+)\.attention_biases/2"), "attention_biases"),
    Leaf(re.compile(r"(.+)\.pos_embed/4"), "pos_embed"),
    Leaf(re.compile(r"(.+)\.rel_pos_h/2"), "rel_pos_h"),
    Leaf(re.compile(r"(.+)\.rel_pos_w/2"), "rel_pos_w"),
    Leaf(
        re.compile(r"(.+)\.positional_encoding_gaussian_matrix/2"),
        "positional_encoding_gaussian_matrix",
    ),
)


def torch_leaf(path: str, rank: int) -> tuple[str, Leaf]:
    """Returns segment_anything's name for our `path`, and the rule for its values.

    Raises:
      ValueError: no rule matches: a model file has a new kind of variable.
    """
    for leaf in _LEAVES:
        match = leaf.pattern.fullmatch(f"{path}/{rank}")
        if match:
            return f"{match[1]}.{leaf.name}", leaf
    raise ValueError(f"no rule for variable {path!r} with {rank} axes; add one to names.py")
