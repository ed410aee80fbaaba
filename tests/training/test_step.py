"""Tests of the training step on boxes and points: losses, scores and gradients of each prompt."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.input_pipeline import eval_objects, train_loader
from medsam_jax.hub import load_model
from medsam_jax.metrics.registry import METRICS, Metric
from medsam_jax.models.checkpoint import read_config, read_metadata, read_params
from medsam_jax.models.functional import Functional
from medsam_jax.ops.form import CPU
from medsam_jax.training import optimizer as opt
from medsam_jax.training import step
from medsam_jax.training.config import base_config, validate
from medsam_jax.training.loop import train_and_evaluate
from medsam_jax.training.losses import LOSSES, Loss, answer_weights, iou_loss, score_weights
from medsam_jax.training.setup import set_up
from medsam_jax.training.sharding import make_mesh, model_inputs
from medsam_jax.training.step import make_eval_step, make_loss, parts_of_batch
from medsam_jax.training.validation import TuneResult
from tests.tiny import tiny_sam
from tests.training.runs import values

BOX, ONE, TWO = [-2, -2], [1, -2], [1, 0]


def test_one_point_trains_the_single_mask_and_the_best_of_three():
    losses = jnp.array([[[0.1, 0.9, 0.3, 0.5]] * 3])
    labels = jnp.array([[BOX, ONE, TWO]])
    single = [1, 0, 0, 0]
    assert answer_weights(losses, labels, True)[0].tolist() == [single, [0.5, 0, 0.5, 0], single]
    assert answer_weights(losses, labels, False)[0].tolist() == [single] * 3
    assert answer_weights(losses[..., :1], None, True)[0].tolist() == [[1]] * 3
    assert score_weights(losses, labels, True)[0].tolist() == [single, [0.25] * 4, single]


def test_iou_loss_is_against_the_thresholded_mask_without_padding():
    prediction = jnp.zeros((1, 4, 4), bool).at[0, :2].set(True)  # 8 pixels
    target = jnp.zeros((1, 4, 4), bool).at[0, 1:3].set(True)  # 4 in both, 12 in any
    valid = jnp.ones((1, 4, 4), bool).at[0, 3].set(False)
    loss = iou_loss(jnp.array([0.5]), prediction, target, valid)
    np.testing.assert_allclose(loss, [(0.5 - 4 / 12) ** 2], rtol=1e-6)


def test_the_score_is_the_mean_of_what_is_trained():
    assert TuneResult({"tune/dice": 0.8}, {}).score == 0.8
    assert TuneResult({"tune/dice": 0.8, "tune/point_dice": 0.6}, {}).score == pytest.approx(0.7)


@pytest.fixture(scope="module")
def functional():
    return Functional(tiny_sam())


def with_embeddings(batch, seed=0):
    """Random embeddings in place of the images: compiling an encoder twice takes half a minute."""
    inputs = {name: x for name, x in model_inputs(batch).items() if name != "image"}
    rng = np.random.default_rng(seed)
    shape = (len(inputs["mask"]), 16, 16, 32)
    return inputs | {"embedding": rng.normal(size=shape).astype(np.float32)}


def test_a_batch_in_parts_makes_the_same_step(functional, monkeypatch):
    config = base_config()
    on_this_cpu = parts_of_batch(functional.bind(functional.arrays), config, CPU, 1)
    assert on_this_cpu == config.batch_size

    def loss(arrays, batch):
        value = jnp.mean((batch["x"] @ arrays["a.kernel"]) ** 2)
        return value, {"loss": value}

    monkeypatch.setattr(step, "make_loss", lambda functional, config: loss)
    rng = np.random.default_rng(0)
    arrays = {"a.kernel": jnp.asarray(rng.normal(size=(3, 2)))}
    labels = {"a.kernel": opt.DECAYED}
    tx = opt.make_optimizer(config, labels)
    state = step.init_state(arrays, labels, tx, config)
    batch = {"x": jnp.asarray(rng.normal(size=(8, 3)))}
    (whole, scalars), (parts, scalars_of_parts) = (
        step.make_train_step(functional, tx, labels, config, parts)(state, batch)
        for parts in (1, 4)
    )
    np.testing.assert_allclose(parts.arrays["a.kernel"], whole.arrays["a.kernel"], rtol=1e-6)
    for name in scalars:
        np.testing.assert_allclose(scalars_of_parts[name], scalars[name], rtol=1e-6, err_msg=name)


def test_accumulation_equals_one_batch(config, built):
    """With the steps for a GPU: a CPU's step takes one image at a time in any case."""
    stored, params = read_config(config.checkpoint), read_params(config.checkpoint)
    loader = train_loader(built, "train", batch_size=4, seed=0, box_jitter=5)
    batches = [with_embeddings(next(loader), seed) for seed in range(8)]
    losses, programs = [], []
    for config.accumulation_steps in (1, 2):
        run = set_up(config, stored, make_mesh(config), params, platform="gpu")
        state = run.first_state()
        lowered = run.train_step.lower(state, batches[0])
        programs.append(lowered.as_text())
        step = lowered.compile()
        losses.append([])
        for batch in batches:
            state, scalars = step(state, jax.device_put(batch, run.by_item))
            losses[-1].append(scalars["loss"])
    loops = [program.count("stablehlo.while") for program in programs]
    assert loops[1] == loops[0] + 1, "one program loops over the parts of a batch"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_loss_is_one_function_and_one_row(functional, built, monkeypatch):
    """A new row has a weight in the configuration, a term in the loss and a curve."""

    def area_loss(logits, target, valid):
        return jnp.mean(jax.nn.sigmoid(logits) * valid, axis=(-2, -1))

    loader = train_loader(built, "train", batch_size=2, seed=3, box_jitter=5)
    batch = with_embeddings(next(loader))
    plain = jax.jit(make_loss(functional, base_config()))(functional.arrays, batch)[1]
    monkeypatch.setitem(LOSSES, "area", Loss(area_loss, "area_loss"))
    config = base_config()
    config.data_dir, config.losses.area, config.losses.dice = "somewhere", 3.0, 0.0
    validate(config)
    found = jax.jit(make_loss(functional, config))(functional.arrays, batch)[1]
    assert found.keys() == {"loss", "area_loss", "cross_entropy"}, "a weight of 0 is not computed"
    np.testing.assert_allclose(found["cross_entropy"], plain["cross_entropy"], rtol=1e-6)
    expected = found["cross_entropy"] + 3.0 * found["area_loss"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)
    assert found["area_loss"] > 0


def test_a_metric_of_the_registry_is_scored(functional, built, monkeypatch):
    def area(pred, target, spacing, tolerance):
        return jnp.mean(pred, axis=(-2, -1)) * tolerance

    row = Metric("area", "area", score=lambda masks: float(masks.pred.mean()), batch=area)
    monkeypatch.setitem(METRICS, "area", row)
    batch = next(iter(eval_objects(built, "validation", batch_size=2, box_jitter=3, seed=1)))
    found = jax.jit(make_eval_step(functional, 2.0))(functional.arrays, with_embeddings(batch))
    assert {"dice", "nsd", "iou", "area"} <= found.keys()
    np.testing.assert_allclose(found["area"], 2 * found["prediction"].mean((1, 2)), rtol=1e-6)


def test_a_mixed_batch_gives_each_prompt_the_loss_it_has_alone(functional, built):
    """Boxes and points in one step, P prompts an image: the mean of the prompts' own losses."""
    config = base_config()
    config.losses.iou = 1.0
    loss = jax.jit(make_loss(functional, config))
    loader = train_loader(
        built,
        "train",
        batch_size=2,
        seed=3,
        box_jitter=5,
        prompts_per_image=2,
        positive_points=2,
        negative_points=1,
        point_share=0.5,
    )
    batch = with_embeddings(next(loader))
    kinds = {tuple(row) for row in batch["point_labels"].reshape(4, 3).tolist()}
    assert len(kinds) >= 2
    whole = loss(functional.arrays, batch)[1]
    alone = []
    for item in range(2):
        for prompt in range(2):
            one = {name: x[item : item + 1] for name, x in batch.items()}
            one = {
                name: x[:, prompt] if name not in ("embedding", "valid_shape") else x
                for name, x in one.items()
            }
            alone.append(loss(functional.arrays, one)[1])
    for name in ("loss", "dice_loss", "cross_entropy", "iou_loss"):
        expected = np.mean([scalars[name] for scalars in alone])
        np.testing.assert_allclose(whole[name], expected, rtol=1e-5)


def test_a_point_beside_it_does_not_change_the_answer_to_a_box(functional, built):
    step = jax.jit(make_eval_step(functional, 2.0))
    settings = {"batch_size": 2, "box_jitter": 3, "seed": 1}
    boxes = next(iter(eval_objects(built, "validation", **settings)))
    both = next(iter(eval_objects(built, "validation", one_point=True, **settings)))
    for mask, point in zip(both["mask"], both["points"][:, 0].astype(int), strict=True):
        assert mask[point[1], point[0]] == 1
    plain, found = (step(functional.arrays, with_embeddings(batch)) for batch in (boxes, both))
    assert {"point_dice", "point_best_dice", "point_best_iou_error"} <= found.keys() - plain.keys()
    for name in ("dice", "nsd", "iou_error"):
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-5)


def test_a_run_with_points_and_adapters(config, tiny_checkpoint, tmp_path):
    """Scores and chooses by both prompts; the export is a plain model with other kernels."""
    config.update({"point_share": 0.5, "prompts_per_image": 2, "num_steps": 2})
    config.losses.iou = 1.0
    config.update({"frozen": (".*",), "learning_rates": ((r".*\.lora_a", 0.5),)})
    targets = r"mask_decoder\.transformer\.layers\.\d\.self_attn\.[qv]_proj\.kernel"
    config.lora.update({"rank": 2, "targets": (targets,)})
    config.embedding_cache = str(tmp_path / "cache")
    scalars = train_and_evaluate(config, tmp_path / "run")
    kinds = {"dice", "nsd", "point_dice", "point_nsd", "point_best_dice", "point_iou_error"}
    assert {f"tune/{kind}" for kind in kinds} <= scalars.keys()
    assert list(values(tmp_path / "run", "train/iou_loss")) == [1, 2]
    best = read_metadata(tmp_path / "run" / "best")["training"]
    box, point = (values(tmp_path / "run", name) for name in ("tune/dice", "tune/point_dice"))
    assert best["step"] == max(box, key=lambda step: box[step] + point[step])
    events = next((tmp_path / "run" / "tensorboard").iterdir()).read_bytes()
    assert b"tune/worst_point_0" in events

    assert load_model(tmp_path / "run" / "last").config.automatic_prompts == "points"
    before, after = read_params(tiny_checkpoint), read_params(tmp_path / "run" / "last")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if re.fullmatch(targets, name)}
