"""The examples of docs/extending.md, run as they stand there."""

import dataclasses
import importlib
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datasets.medical_slices import building, slices
from medsam_jax.data import modality
from medsam_jax.data.datasets import open_dataset
from medsam_jax.data.manifest import read_manifest
from medsam_jax.data.preprocess import normalise_intensity
from medsam_jax.data.recipes import PREPROCESSING, RECIPES
from medsam_jax.evaluation.tables import summary_table
from medsam_jax.inference.predictor import Predictor
from medsam_jax.metrics import mask_scores, registry
from medsam_jax.models import sam
from medsam_jax.models.checkpoint import abstract_model, read_config, save_model
from medsam_jax.models.functional import Functional, flatten_state
from medsam_jax.ops.form import CPU
from medsam_jax.training import losses
from medsam_jax.training import optimizer as opt
from medsam_jax.training.config import base_config, validate
from medsam_jax.training.setup import set_up
from medsam_jax.training.step import batch_metrics, make_loss
from tests.datasets.scans import make_mr
from tests.tiny import tiny_sam

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TABLES = [
    (losses, "LOSSES"),
    (registry, "METRICS"),
    (modality, "RULES"),
    (sam, "ENCODERS"),
]


def blocks(heading: str) -> list[tuple[str, str]]:
    """Returns file and code of each Python block of a section."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    found = re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == text.count("```python")
    return found


@pytest.fixture
def apply(tmp_path, monkeypatch):
    """Adds what a section shows, for one test; returns the names that its blocks define."""

    def add(heading: str) -> dict:
        names = {}
        found = blocks(heading)
        assert 1 <= len({file for file, _ in found}) <= 2, "one or two files"
        for file, code in found:
            name = file.removesuffix(".py").replace("/", ".")
            if (ROOT / file).exists():
                scope = dict(vars(importlib.import_module(name)))
                exec(compile(code, file, "exec"), scope)
                names |= scope
            else:
                path = tmp_path / Path(file).name
                path.write_text(code, encoding="utf-8")
                spec = importlib.util.spec_from_file_location(name, path)
                module = importlib.util.module_from_spec(spec)
                monkeypatch.setitem(importlib.sys.modules, name, module)
                spec.loader.exec_module(module)
                names |= vars(module)
        return names

    kept = [(table := getattr(module, name), dict(table)) for module, name in TABLES]
    yield add
    for table, rows in kept:
        table.clear()
        table.update(rows)


def batch(config) -> dict[str, jax.Array]:
    """Two objects with their boxes, on random embeddings."""
    rng = np.random.default_rng(0)
    grid = config.embedding_size
    mask = np.zeros((2, 256, 256), np.uint8)
    mask[0, 40:120, 60:200] = mask[1, 100:220, 20:90] = 1
    return {
        "embedding": jnp.asarray(rng.normal(size=(2, grid, grid, config.embed_dim)), jnp.float32),
        "mask": jnp.asarray(mask),
        "box": jnp.array([[60.0, 40, 200, 120], [20, 100, 90, 220]]),
        "valid_shape": jnp.array([[256, 256], [240, 256]]),
    }


def test_a_loss(apply):
    focal_loss = apply("A loss")["focal_loss"]
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 8, 8)).astype(np.float32)
    target, valid = rng.random((2, 2, 8, 8)) < 0.5
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    p = np.where(target, p, 1 - p)
    focal = -((1 - p) ** 2) * np.log(p)
    expected = [one[where].mean() for one, where in zip(focal, valid, strict=True)]
    np.testing.assert_allclose(focal_loss(logits, target, valid), expected, rtol=1e-5)

    config = base_config()
    assert config.losses.focal == 0.0
    config.losses.update({"focal": 20.0, "dice": 1.0, "cross_entropy": 0.0})
    config.data_dir = "somewhere"
    validate(config)
    functional = Functional(tiny_sam())
    model_config = functional.bind(functional.arrays).config
    found = jax.jit(make_loss(functional, config))(functional.arrays, batch(model_config))[1]
    assert found.keys() == {"loss", "dice_loss", "focal_loss"}
    expected = found["dice_loss"] + 20 * found["focal_loss"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-6)


def test_an_optimiser_and_a_schedule(apply):
    config = apply("An optimiser and a schedule")["get_config"]()
    config.data_dir = "somewhere"
    validate(config)
    rate = opt.learning_rate_schedule(config)
    after = 0.25 * (config.num_steps - config.warmup_steps)
    found = rate(config.warmup_steps + after), rate(config.num_steps)
    np.testing.assert_allclose(found, [3e-5 * 0.75**0.9, 0], rtol=1e-5)

    config.warmup_steps = 0
    arrays = {"a.kernel": jnp.ones(2), "a.bias": jnp.ones(2)}
    tx = opt.make_optimizer(config, opt.label_parameters(arrays, arrays, ()))
    gradients = {name: jnp.array([3.0, -0.1]) for name in arrays}
    new, state, _ = opt.apply_gradients(tx, arrays, gradients, tx.init(arrays))
    # Lion steps by the sign alone, and only kernels decay.
    step = {name: np.asarray(1 - new[name]) / 3e-5 for name in arrays}
    np.testing.assert_allclose(step["a.bias"], [1, -1], rtol=5e-3)  # 1 - 3e-5 in float32
    np.testing.assert_allclose(step["a.kernel"], [1.1, -0.9], rtol=5e-3)


def test_a_metric(apply):
    apply("A metric")
    target = np.zeros((3, 4, 4), bool)
    target[0, :2] = True
    pred = np.zeros_like(target)
    pred[0, 1:, 1:] = pred[1, 0, 0] = True
    expected = [3 / 8, 0.0, math.nan]
    scores = [mask_scores(*pair, (1.0, 1.0), 2.0) for pair in zip(pred, target, strict=True)]
    np.testing.assert_allclose([one["recall"] for one in scores], expected)
    jitted = jax.jit(lambda p, t: batch_metrics()["recall"](p, t, (1.0, 1.0), 2.0))
    np.testing.assert_allclose(jitted(pred, target), expected, rtol=1e-6)
    headings, _ = summary_table([], 2.0)
    assert "Recall median (IQR)" in headings


def test_a_modality(apply):
    volume = np.array([[0.0, 2.5], [10.0, 40.0]])
    recipe = RECIPES["lite"]
    before = normalise_intensity(volume, "PET", recipe)
    apply("A modality")
    for name in ("PET", "pet"):
        assert normalise_intensity(volume, name, recipe).tolist() == [[0, 63], [255, 255]]
    assert normalise_intensity(volume, "SPECT", recipe).tolist() == before.tolist()
    assert before.tolist() != [[0, 63], [255, 255]]


def test_an_image_encoder(apply, tmp_path):
    names = apply("An image encoder")
    encoder = names["ConvEncoderConfig"](embed_dim=8, depth=2, patch_size=8)
    preprocessing = dataclasses.replace(PREPROCESSING["lite"], image_size=64)
    config = sam.SamConfig(
        "conv_sam", encoder, 64, preprocessing, 16, decoder_num_heads=2, decoder_mlp_dim=16
    )
    model = tiny_sam(config=config)
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)), jnp.float32)
    plain = model.image_encoder(pixels)
    assert plain.shape == (2, 8, 8, 16)
    functional = Functional(model, CPU)
    on_cpu = functional.bind(functional.arrays).image_encoder(pixels)
    np.testing.assert_allclose(on_cpu, plain, atol=1e-5 * np.abs(plain).max())

    save_model(tmp_path / "init", flatten_state(model), config, {"licence": "Apache-2.0"})
    assert read_config(tmp_path / "init") == config
    predictor = Predictor(model)
    predictor.set_image(np.arange(80 * 60, dtype=np.uint8).reshape(80, 60))
    masks, _, logits = predictor.predict(box=[10, 10, 40, 50])
    assert masks.shape == (3, 80, 60)
    assert np.isfinite(logits).all()

    training = base_config()
    training.frozen = ()
    run = set_up(training, config)
    assert run.labels["image_encoder.convs.0.kernel"] == opt.DECAYED
    state, scalars = jax.eval_shape(run.train_step, run.state, run.train_batch())
    assert state.arrays.keys() == flatten_state(abstract_model(config)).keys()
    assert "loss" in scalars


def test_a_data_set(apply, tmp_path):
    main = apply("A data set")["main"]
    for patient in range(3):
        folder = tmp_path / "scans" / f"p{patient}"
        folder.mkdir(parents=True)
        for name in ("t1", "flair"):
            make_mr(folder, name, seed=patient)
        (folder / "t1_mask.nrrd").rename(folder / "tumour.nrrd")
    main(tmp_path / "scans", tmp_path / "cases.csv")
    cases, problems = read_manifest(tmp_path / "cases.csv")
    assert problems == []
    assert [(case.case_id, case.modality) for case in cases][:2] == [
        ("p0", "MR T1"),
        ("p0", "MR FLAIR"),
    ]
    options = slices.Options(recipe="lite")
    building.build(building.Request(str(tmp_path / "cases.csv"), str(tmp_path / "data"), options))
    records, info = open_dataset(tmp_path / "data", cases[0].split)
    assert sum(counts["cases"] for counts in info.counts.values()) == 3
    assert records[0]["mask"].max() == 1
