"""Exported programs against the model they came from, in the places for prompts that they have."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.inference.stablehlo import ExportedModel, export_model
from medsam_jax.models.checkpoint import save_model
from medsam_jax.models.functional import flatten_state


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """By the command line, from a checkpoint."""
    folder = tmp_path_factory.mktemp("export")
    save_model(folder / "checkpoint", flatten_state(model), model.config, {})
    command = [sys.executable, "-m", "medsam_jax.export", "--prompts=3", "--points=2"]
    command += [f"--checkpoint={folder / 'checkpoint'}", f"--output={folder / 'exported'}"]
    subprocess.run(command, check=True)
    return folder / "exported"


@pytest.fixture(scope="module")
def exported(directory):
    return ExportedModel(directory)


def test_others_may_read_what_was_written(directory):
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in directory.parent.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"weights.safetensors", "image_encoder.stablehlo"}
    assert [p for p in files if p.stat().st_mode & 0o777 != 0o666 & ~mask] == []


def test_equals_the_model(model, exported):
    """Two prompts in three places: a box with a point beside one with an earlier mask."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1, 256, 256, 3), np.uint8)
    valid_shape = np.array([[200, 256]])
    embedding = exported.encode(images, valid_shape)
    prompts = {
        "coords": rng.uniform(0, 50, (2, 1, 2)).astype(np.float32),
        "labels": np.array([[1], [0]], np.int32),
        "boxes": np.array([[3, 4, 40, 50], [10, 10, 30, 20]], np.float32),
        "masks": rng.normal(0, 3, (2, 64, 64)).astype(np.float32),
    }
    logits, scores = exported.decode(embedding, **prompts)

    @jax.jit
    def by_model(images, valid_shape, coords, labels, boxes, masks):
        return model.decode(
            model.encode(images, valid_shape),
            points=(coords[None], labels[None]),
            boxes=boxes[None],
            masks=masks[None],
            multimask_output=None,
        )

    expected_logits, expected_scores = by_model(images, valid_shape, **prompts)
    assert logits.shape == (2, 4, 64, 64)
    bound = 1e-5 * np.abs(expected_logits).max()
    np.testing.assert_allclose(logits, expected_logits[0], atol=bound, rtol=0)
    np.testing.assert_allclose(scores, expected_scores[0], atol=1e-5)


def test_each_platform_runs_its_own_form(model, tmp_path):
    """On a CPU one prompt after another, elsewhere all at once, whatever machine exports."""
    loops = {}
    for platforms in (["cpu"], ["cuda"], ["tpu"], ["cpu", "cuda"]):
        directory = tmp_path / "_".join(platforms)
        export_model(model, directory, platforms, prompts=3)
        program = jax.export.deserialize(
            bytearray((directory / "mask_decoder.stablehlo").read_bytes())
        )
        loops["_".join(platforms)] = program.mlir_module().count("stablehlo.while")
    assert loops["cuda"] == loops["tpu"] == 0
    assert loops["cpu_cuda"] == loops["cpu"] > 0


@pytest.mark.usefixtures("unchecked")
def test_places_and_bad_prompts(exported):
    assert exported.description["prompts"] == 3
    embedding = np.zeros((1, 16, 16, 32), np.float32)
    with pytest.raises(UserError, match="nothing given"):
        exported.decode(embedding)
    with pytest.raises(UserError, match="4 prompts .* exported for 3 with up to 2 points"):
        exported.decode(embedding, boxes=np.zeros((4, 4)))
    with pytest.raises(UserError, match="1 prompts .* up to 2 points"):
        exported.decode(embedding, coords=np.zeros((1, 3, 2)), labels=np.ones((1, 3)))
    with pytest.raises(UserError, match="coords, labels: one given without the other"):
        exported.decode(embedding, coords=np.zeros((1, 2, 2)))


def test_bad_exports(model, directory, tmp_path):
    with pytest.raises(UserError, match="exists; choose another"):
        export_model(model, directory)
    with pytest.raises(UserError, match="platforms: metal given"):
        export_model(model, tmp_path / "new", platforms=["metal"])
    with pytest.raises(UserError, match="0, 8 given"):
        export_model(model, tmp_path / "new", prompts=0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no exported model"):
        ExportedModel(tmp_path)
    text = (directory / "model.json").read_text()
    for name in ("image_encoder.stablehlo", "mask_decoder.stablehlo", "weights.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    (tmp_path / "model.json").write_text(text.replace('"cpu"', '"rocm"', 1))
    with pytest.raises(UserError, match="exported for rocm, cuda, tpu, this is cpu"):
        ExportedModel(tmp_path)
