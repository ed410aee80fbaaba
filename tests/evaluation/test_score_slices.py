"""The data set route: scores of a known model, resuming, refusals."""

import collections
import csv
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsam_jax.data.preprocess import stored_grid_logits
from medsam_jax.data.prompts import Prompt
from medsam_jax.errors import UserError
from medsam_jax.evaluation import base, run, score_slices, scorers
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.hub import resolve
from medsam_jax.inference.slice_predictor import SlicePredictor, SliceTask
from medsam_jax.metrics import dice, hausdorff_distance, iou, normalized_surface_dice
from medsam_jax.models.checkpoint import abstract_model, build_model
from medsam_jax.models.functional import Functional, flatten_state
from medsam_jax.models.sam import SamConfig
from tests.evaluation.fakes import BrightInBox, disc, discs, fake_dataset

MODELS = {"low": 0.2, "high": 0.6, "broken": float("nan")}


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """Checkpoint names stand for thresholds; loads are counted."""
    loaded = []

    def load(name):
        loaded.append(name)
        return BrightInBox(MODELS[name])

    monkeypatch.setattr(base, "load_model", load)
    monkeypatch.setattr(scorers, "resolve", lambda name: name)
    monkeypatch.setattr(scorers, "read_config", lambda name: BrightInBox(MODELS[name]).config)
    monkeypatch.setattr(scorers, "read_metadata", lambda name: {})
    return loaded


@pytest.fixture
def make(monkeypatch, tmp_path):
    def make(records=None, shifts=(0,), tolerance=2.0, prompt="box", batch_size=2):
        dataset = fake_dataset(records or discs(), tmp_path)
        monkeypatch.setattr(score_slices, "open_dataset", lambda *_: dataset)
        protocols = [Protocol(prompt, shift) for shift in shifts]
        output = tmp_path / "out"
        return score_slices.SplitEvaluation(
            "data", "validation", protocols, tolerance, batch_size, output
        )

    return make


def test_scores_are_those_of_the_masks(make):
    rows = make().evaluate("low")
    names = [(row.case_id, row.slice_index, row.label) for row in rows]
    assert names == [("a", 0, 1), ("a", 1, 1), ("a", 1, 2), ("b", 0, 1), ("b", 1, 1), ("c", 0, 1)]
    one, two = disc(20, 60, 60), disc(12, 150, 180)
    # The model cannot answer outside the box, here the truth's own.
    boxed = disc(12, 152, 180)
    boxed[163:] = False
    expected = [
        (one, one),
        (disc(18, 60, 60), one),
        (boxed, two),
        (disc(22, 60, 60) & _box(one), one),
        (two, two),
        (np.zeros_like(two), two),
    ]
    for row, (prediction, truth) in zip(rows, expected, strict=True):
        assert row.truth_size == truth.sum()
        assert row.predicted_size == prediction.sum()
        assert row.scores["dice"] == dice(prediction, truth)
        assert row.scores["iou"] == iou(prediction, truth)
        assert row.scores["nsd"] == normalized_surface_dice(prediction, truth, (1, 1), 2)
        assert row.scores["hd95"] == hausdorff_distance(prediction, truth, (1, 1))
    assert rows[-1].scores["dice"] == rows[-1].scores["nsd"] == 0
    assert rows[-1].scores["hd95"] == np.inf


def _box(mask):
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = np.zeros_like(mask)
    box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return box


def test_batch_size_changes_nothing(make, tmp_path):
    small = make(shifts=(0, 7), batch_size=1).evaluate("low")
    for path in (tmp_path / "out" / "parts").iterdir():
        path.unlink()
    assert make(shifts=(0, 7), batch_size=16).evaluate("low") == small


def test_checkpoints_answer_the_same_prompts(make):
    evaluation = make(shifts=(9,))
    low, high = evaluation.evaluate("low"), evaluation.evaluate("high")
    assert [row.box for row in low] == [row.box for row in high]
    assert low != high


def test_a_killed_run_goes_on(make, monkeypatch, models, tmp_path):
    whole = make(shifts=(0, 5)).evaluate("low")
    parts = next((tmp_path / "out" / "parts").iterdir())
    lines = parts.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:2]) + lines[2][:40])  # a kill while the second batch is written

    scored = []
    original = base.mask_scores
    monkeypatch.setattr(base, "mask_scores", lambda *args: scored.append(0) or original(*args))
    assert make(shifts=(0, 5)).evaluate("low") == whole
    assert len(scored) == len(whole) - 6
    models.clear()
    assert make(shifts=(0, 5)).evaluate("low") == whole
    assert not models, "a finished evaluation needs no model"


def test_other_settings_do_not_take_up_old_rows(make):
    make(tolerance=2.0).evaluate("low")
    strict = make(tolerance=0.0).evaluate("low")
    assert strict[1].scores["nsd"] < make(tolerance=2.0).evaluate("low")[1].scores["nsd"]


def test_box_shifts_are_those_asked_for_in_the_order_given(make):
    """The first makes the main tables; rows of an earlier run with more shifts stay out."""
    both = make(shifts=(5, 0)).evaluate("low")
    assert [row.box_shift for row in both[:2]] == [5, 0]
    assert {row.box_shift for row in make(shifts=(0,)).evaluate("low")} == {0}


def test_points_reach_the_model(make):
    rows = make(prompt="points").evaluate("low")
    assert all(row.box is None and len(row.points) == 6 for row in rows)
    assert rows[0].scores["dice"] == 1


def test_output_that_is_not_finite_is_refused_by_name(make):
    with pytest.raises(UserError, match="case a, slice 0, label 1.*not finite"):
        make().evaluate("broken")


def test_label_without_pixels_is_refused_by_name(make):
    evaluation = make()
    evaluation._labels = np.where(evaluation._positions == 3, 9, evaluation._labels)
    with pytest.raises(UserError, match="case b, slice 1: label 9"):
        evaluation.evaluate("low")


def test_another_recipe_is_refused_by_name(make, monkeypatch):
    evaluation = make()
    monkeypatch.setattr(base, "load_model", lambda name: BrightInBox(0.5, recipe="sam"))
    with pytest.raises(UserError, match="low: recipe: .*'lite'.*'sam'"):
        evaluation.evaluate("low")


def test_another_ct_window_is_pointed_out(make, monkeypatch, tmp_path, capsys):
    contracts = {}
    for name, windows in (("released", ()), ("several", ("lung", "wide")), ("lung", ("lung",))):
        config = BrightInBox(0.5).config
        config.preprocessing = dataclasses.replace(config.preprocessing, ct_windows=windows)
        contracts[name] = config
        MODELS[name] = 0.5
    monkeypatch.setattr(scorers, "read_config", contracts.get)
    make()
    run.evaluate(list(contracts), tmp_path / "out", data_dir="data")
    note = "CT is shown in window wide, expected in lung"
    assert [line for line in capsys.readouterr().out.splitlines() if "note" in line] == [
        f"note: lung: {note}"
    ]
    assert (tmp_path / "out" / "summary.md").read_text().count(note) == 1


def test_every_checkpoint_is_checked_before_the_first_is_scored(make, monkeypatch, tmp_path):
    make()
    configs = {"low": BrightInBox(0.2).config, "odd": BrightInBox(0.2, recipe="sam").config}
    monkeypatch.setattr(scorers, "read_config", configs.get)
    with pytest.raises(UserError, match="odd: recipe: .*'lite'.*'sam'"):
        run.evaluate(["low", "odd"], tmp_path / "out", data_dir="data")
    monkeypatch.setattr(scorers, "resolve", lambda name: name if name in configs else resolve(name))
    with pytest.raises(UserError, match="no_such_model"):
        run.evaluate(["low", "no_such_model"], tmp_path / "out", data_dir="data")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(make, models, tmp_path):
    make()
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"out|file: cannot be written .*is a file"):
            run.evaluate(["low"], output, data_dir="data")
    assert not models


def test_picture_shows_the_object(make):
    evaluation = make()
    row = evaluation.evaluate("low")[1]
    picture = evaluation.picture(row)
    assert picture.shape[0] >= 512
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert {(0, 200, 150), (235, 110, 20), (240, 228, 66)} <= colours


def test_predictor_answers_many_prompts_on_one_slice():
    """More prompts than the batch holds; each answer is cut to its own box."""
    image = np.full((256, 256, 3), 255, np.uint8)
    boxes = [np.array([10 * i, 5, 10 * i + 8, 20], np.float32) for i in range(7)]
    prompts = [Prompt(box=box) for box in boxes]
    tasks = [
        SliceTask("one", image, (100, 256), prompts),
        SliceTask("two", image, (256, 50), prompts[:1]),
    ]
    predictor = SlicePredictor(BrightInBox(0.5), batch_size=3)
    first, second = itertools.chain.from_iterable(predictor.run(tasks))
    assert [mask.shape for mask in first] == [(100, 256)] * 7
    for mask, box in zip(first, boxes, strict=True):
        assert mask.sum() == 9 * 16
        assert mask[5:21, int(box[0]) : int(box[2]) + 1].all()
    assert [mask.shape for mask in second] == [(256, 50)]


def test_predictor_equals_the_model_called_alone():
    """A small Sam with random weights; two slices of which one is padded."""
    config = SamConfig.tiny()
    rng = np.random.default_rng(0)
    shapes = flatten_state(abstract_model(config))
    params = {
        name: np.abs(rng.normal(0, 0.3, leaf.shape))
        if name.endswith("var")
        else rng.normal(0, 0.3, leaf.shape)
        for name, leaf in shapes.items()
    }
    model = build_model(config, params, "test")
    images = rng.integers(0, 256, (2, 256, 256, 3), np.uint8)
    shapes = [(256, 256), (256, 120)]
    images[1, :, 120:] = 0
    mask = disc(20, 100, 60)
    drawn = Protocol("points").draw(mask, (0, 1))
    given = jnp.tile(drawn.points / 4, (2, 1, 1, 1)), jnp.tile(drawn.labels, (2, 1, 1))
    tasks = [SliceTask("t", i, s, [drawn]) for i, s in zip(images, shapes, strict=True)]
    answers = itertools.chain.from_iterable(SlicePredictor(model, 2).run(tasks))

    functional = Functional(model)

    @jax.jit
    def call(arrays, images, valid_shape, points):
        model = functional.bind(arrays)
        return model.decode(model.encode(images, valid_shape), points=points)[0]

    logits = call(functional.arrays, images, np.array(shapes, np.int32), given)
    logits = stored_grid_logits(logits[:, 0, 0], config.preprocessing)
    assert 0.01 < (logits > 0).mean() < 0.99
    for (answer,), expected, (height, width) in zip(answers, logits, shapes, strict=True):
        np.testing.assert_array_equal(answer, expected[:height, :width] > 0)


def test_evaluate_writes_all_tables(make, monkeypatch, tmp_path):
    make()
    output = tmp_path / "report"
    run.evaluate(["low", "high"], output, data_dir="data", box_shifts=["0", "6"])
    with (output / "per_object.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 6
    assert list(rows[0])[:5] == ["checkpoint", "unit", "prompt", "box_shift", "case_id"]
    assert not {"runs", "box"} & rows[0].keys()
    page = (output / "summary.md").read_text()
    for name in (
        "summary.csv",
        "comparisons.csv",
        "summary.tex",
        *(f"figures/{name}.png" for name in ("overview", "box_dice", "box_nsd", "box_shift")),
        *("figures/pictures_1.png", "figures/scatter_dice_1_2.png"),
    ):
        assert (output / name).stat().st_size > 0
        assert not name.startswith("figures") or name in page
    assert not list(output.rglob(".*")), "temporary files are left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": ["low", "low"]}, "names one twice"),
        ({"checkpoints": [""]}, "--checkpoint: empty"),
        ({"prompt": "circle"}, "--prompt: 'circle'"),
        ({"prompt": "point", "box_shifts": [5]}, "--box_shift: works with"),
        ({"box_shifts": ["a"]}, "--box_shift: 'a'"),
        ({"box_shifts": [-1]}, "--box_shift: -1"),
        ({"box_shifts": [3, 3]}, "given twice"),
        ({"tolerance": -1.0}, "--tolerance: -1.0"),
        ({"tolerance": float("inf")}, "--tolerance: inf"),
        ({"batch_size": 0}, "--batch_size: 0"),
        ({"with_burden": True}, "--burden: work with"),
        ({"manifest": "cases.csv"}, "give one of them"),
    ],
)
def test_bad_arguments_are_refused(make, tmp_path, arguments, message):
    make()
    given = {"checkpoints": ["low"], "data_dir": "d", "output": tmp_path / "out"}
    with pytest.raises(UserError, match=message):
        run.evaluate(**given | arguments)
    assert not (tmp_path / "out").exists()


def test_a_bounded_number_of_slices_is_spread_over_patients(tmp_path, built):
    settings = [Protocol()], 2.0, 1, tmp_path
    whole = score_slices.SplitEvaluation(str(built), "train", *settings)
    patients = {whole.patient_of(item) for item in whole.items()}
    most = 2 * len(patients)
    assert whole.slices == len(whole.items()) > most
    part = score_slices.SplitEvaluation(str(built), "train", *settings, most=most)
    items = list(part.items())
    assert set(items) < set(whole.items())
    assert items == sorted(items)
    assert part.slices == whole.slices
    counts = collections.Counter(map(part.patient_of, items))
    assert counts.keys() == patients
    assert max(counts.values()) == 2
    one = score_slices.SplitEvaluation(str(built), "train", *settings, most=1)
    assert len(one.items()) == 1, "fewer slices than patients"


def test_a_task_alone_is_scored(tmp_path, built):
    settings = [Protocol()], 2.0, 1, tmp_path
    part = score_slices.SplitEvaluation(str(built), "train", *settings, task="mass")
    assert len(part.items()) == 2
    assert {part.task(item)[0][0].fields["task"] for item in part.items()} == {"mass"}
