"""Rows of the mask decoder: prompts on one embedding, a prediction, automatic masks."""

from functools import partial

import numpy as np

from benchmarks.counting import least_work
from benchmarks.data import ct_slice
from benchmarks.harness import Contender, Row, Work
from benchmarks.models import (
    INPUTS,
    KEEP_BUFFERS,
    jax_lite_medsam,
    segment_anything_lite_medsam,
    stand_in_embedding,
    torch_lite_medsam,
)

SIDE = 512  # pixels, of the image passed to `set_image`


def point_prompts(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns single foreground points: coordinates [P, 1, 2] in input pixels, labels [P, 1]."""
    rng = np.random.default_rng(1)
    labels = np.ones((count, 1), np.int32)
    return [(rng.uniform(0, 255, (count, 1, 2)).astype(np.float32), labels) for _ in range(INPUTS)]


def jax_decoder(prompts: int) -> Work:
    """Runs our prompt encoder and decoder for points on one embedding, three masks per point."""
    import jax

    functional = jax_lite_medsam()
    embedding = jax.device_put(stand_in_embedding()[None])
    names = ("prompt_encoder.", "mask_decoder.")
    used = {name: x for name, x in functional.arrays.items() if name.startswith(names)}
    unused = {name: x for name, x in functional.arrays.items() if name not in used}

    @jax.jit
    def decode(arrays, embedding, coords, labels):
        model = functional.bind({**unused, **arrays})
        return model.decode(embedding, points=(coords, labels), multimask_output=True)

    inputs = [
        (jax.device_put(coords[None]), jax.device_put(labels[None]))
        for coords, labels in point_prompts(prompts)
    ]

    def run(index):
        logits, iou = jax.block_until_ready(decode(used, embedding, *inputs[index % INPUTS]))
        return logits[0], iou[0]

    return Work(run, items=prompts, **least_work(decode, used, embedding, *inputs[0]))


def torch_decoder(prompts: int) -> Work:
    """Runs the work of `jax_decoder` in PyTorch."""
    from tests.parity.torch_models import torch_decode

    model, embedding = torch_lite_medsam(), stand_in_embedding()
    inputs = [{"points": coords, "labels": labels} for coords, labels in point_prompts(prompts)]
    return Work(lambda i: torch_decode(model, embedding, inputs[i % INPUTS], True), items=prompts)


def boxes() -> list[np.ndarray]:
    """Returns boxes [4] in pixels of the image."""
    return [np.array([60.0 + 20 * i, 80.0, 300.0 + 20 * i, 330.0]) for i in range(INPUTS)]


def _answer(masks, scores, low_res_logits) -> tuple[np.ndarray, ...]:
    """Replaces masks by their areas, because a pixel at the threshold may differ between sides."""
    return masks.mean(axis=(1, 2)), scores, low_res_logits


def jax_prediction() -> Work:
    """Runs `Predictor.predict` with a box after `set_image`; masks have the image's size."""
    import jax

    from medsam_jax import Predictor, load_model
    from medsam_jax.inference.predictor import EncodedImage

    predictor = Predictor(load_model("lite_medsam"))
    embedding = jax.device_put(stand_in_embedding())
    predictor.use([EncodedImage(embedding, (SIDE, SIDE), (256, 256))])
    prompts = boxes()

    def run(index):
        return _answer(*predictor.predict(box=prompts[index % INPUTS], multimask_output=False))

    return Work(run)


def torch_prediction() -> Work:
    """Runs `SamPredictor.predict` on the same embedding."""
    import torch

    predictor = _sam_predictor(0.0, 1.0)
    predictor.features = torch.from_numpy(stand_in_embedding()).permute(2, 0, 1)[None].contiguous()
    predictor.original_size, predictor.input_size = (SIDE, SIDE), (256, 256)
    predictor.is_image_set = True
    prompts = boxes()

    def run(index):
        return _answer(*predictor.predict(box=prompts[index % INPUTS], multimask_output=False))

    return Work(run)


def _sam_predictor(pixel_mean: float, pixel_std: float):
    from tests.parity.torch_models import stub_torchvision

    with stub_torchvision():
        from segment_anything import SamPredictor
    return SamPredictor(segment_anything_lite_medsam(pixel_mean, pixel_std))


# LiteMedSAM predicts IoUs of 0.1 to 0.2 for points. SAM's threshold of 0.88 would keep no mask to
# filter, upsample or compare.
AUTOMATIC = {"pred_iou_thresh": 0.1, "stability_score_thresh": 0.5, "points_per_batch": 64}


def jax_automatic(points: int) -> Work:
    """Runs `AutomaticMaskGenerator` with a grid of points on a CT-like slice."""
    from medsam_jax.inference.automatic_mask_generator import AutomaticMaskGenerator

    model = jax_lite_medsam().bind(jax_lite_medsam().arrays)
    generator = AutomaticMaskGenerator(model, points_per_side=points, prompts="points", **AUTOMATIC)
    image, _ = ct_slice(SIDE)
    return Work(lambda i: _best(generator.generate(image)), items=points**2)


def torch_automatic(points: int) -> Work:
    """Runs `SamAutomaticMaskGenerator` with the same model on our resized image."""
    from medsam_jax.data.preprocess import resize_image
    from medsam_jax.data.recipes import get_recipe
    from tests.parity.torch_models import stub_torchvision

    with stub_torchvision():
        from segment_anything import SamAutomaticMaskGenerator
    image, _ = ct_slice(SIDE)
    resized, _ = resize_image(image, get_recipe("lite"))
    low, high = float(resized.min()), float(resized.max())
    model = segment_anything_lite_medsam(low, high - low)
    generator = SamAutomaticMaskGenerator(model, points_per_side=points, **AUTOMATIC)
    generator.predictor.transform.apply_image = lambda image: resized
    colours = np.repeat(image[:, :, None], 3, axis=-1)
    return Work(lambda i: _best(generator.generate(colours)), items=points**2)


def _best(records: list[dict], count: int = 8) -> np.ndarray:
    """Returns the highest predicted IoUs; masks near a threshold may be kept by one side only."""
    found = sorted((record["predicted_iou"] for record in records), reverse=True)
    return np.array((found + [0.0] * count)[:count])


def _both(name: str, function: str, arguments: dict, *, kept: bool = False) -> tuple:
    contenders = [
        Contender("medsam_jax", f"benchmarks.decoder:jax_{function}", arguments),
        Contender("PyTorch", f"benchmarks.decoder:torch_{function}", arguments),
    ]
    if kept:
        contenders.append(
            Contender("PyTorch, buffers kept", contenders[1].setup, arguments, KEEP_BUFFERS)
        )
    return name, "cpu", tuple(contenders)


def _decoder_row(prompts: int, targets: dict[str, float]) -> Row:
    name = f"decoder, {prompts} point prompts on one embedding"
    return Row(
        *_both(name, "decoder", {"prompts": prompts}, kept=True),
        targets=targets,
        memory_targets={"PyTorch": 1.0},
    )


def automatic_row(points: int) -> Row:
    """Returns the row of automatic masks with `points` per side; SAM's default is 32."""
    return Row(
        *_both(f"automatic masks, {points} x {points} points", "automatic", {"points": points}),
        targets={"PyTorch": 0.5},
        memory_targets={"PyTorch": 1.0},
        tolerance=0.05,  # see `_best`
        rounds=1,  # PyTorch takes more than a minute
    )


ROWS = (
    *map(partial(_decoder_row, targets={}), (1, 16)),
    _decoder_row(64, {"PyTorch": 0.5}),
    Row(*_both("a box on an image that is set", "prediction", {}), targets={"PyTorch": 1.0}),
)
