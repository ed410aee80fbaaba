"""The report of a run: what it shows, of whom, and the runs that have none."""

import base64
import csv
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from datasets.medical_slices import building, slices
from medsam_jax.data.datasets import find_dataset
from medsam_jax.errors import UserError
from medsam_jax.evaluation import run
from medsam_jax.evaluation.base import ObjectScore
from medsam_jax.evaluation.training_report import split_to_report, worst, write_report
from medsam_jax.io.files import write_json
from medsam_jax.models.checkpoint import read_config, read_params, save_model
from medsam_jax.models.functional import flatten_state
from medsam_jax.models.unet import UNetConfig
from medsam_jax.training.loop import train_and_evaluate
from tests.models.test_unet import build
from tests.training.runs import ROOT, command, values

SHORT = {"num_steps": 2, "eval_every": 2, "checkpoint_every": 2}


def report_again(*arguments: str) -> subprocess.CompletedProcess:
    main = [sys.executable, "-m", "medsam_jax.report", *arguments]
    return subprocess.run(main, cwd=ROOT, capture_output=True, encoding="utf-8")


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Returns the cells below the first table after a heading."""
    table = page.split(f"<h2>{heading}</h2>")[1].split("</table>")[0]
    rows = [re.findall("<td>(.*?)</td>", line) for line in table.splitlines()]
    return [row for row in rows if row]


@pytest.fixture(scope="module")
def reported(fields, tmp_path_factory):
    """A run by the command, from cached embeddings, of boxes and points; what it printed."""
    workdir = tmp_path_factory.mktemp("reported") / "a run"
    cached = {"embedding_cache": str(workdir.parent / "cache"), "mask_threshold": -0.5}
    given = fields | SHORT | cached | {"report": True, "point_share": 0.5}
    done = subprocess.run(
        command(workdir, given),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    return SimpleNamespace(workdir=workdir, printed=done.stdout.splitlines())


@pytest.fixture(scope="module")
def page(reported) -> str:
    return (reported.workdir / "report.html").read_text(encoding="utf-8")


def test_the_end_of_a_run_names_curves_and_report(reported):
    workdir = reported.workdir
    assert reported.printed[-1] == str(workdir / "report.html")
    assert f"curves: tensorboard --logdir '{workdir}/tensorboard' (" in "\n".join(reported.printed)


def test_the_page_is_self_contained(page):
    assert "://" not in page
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    pngs = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert len(pngs) == 1 + 3 * (page.count("<figure>") - 1) > 1
    for png in pngs:
        image = cv2.imdecode(np.frombuffer(base64.b64decode(png), np.uint8), cv2.IMREAD_COLOR)
        assert image.std() > 0
    assert "color-scheme: light dark" in page


@pytest.mark.parametrize("prompt", ["box", "point"])
def test_scores_are_those_of_evaluate(reported, page, built, tiny_checkpoint, tmp_path, prompt):
    """Before: the arrays that the run started from, under the contract that it trained for."""
    best = reported.workdir / "best"
    before = tmp_path / "before"
    save_model(before, read_params(tiny_checkpoint), read_config(best), {})
    assert read_config(best).preprocessing.mask_threshold == -0.5
    run.evaluate([str(before), str(best)], tmp_path / "out", data_dir=str(built), prompt=prompt)
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {
        (row["task"], name, row["checkpoint"]): float(row[f"{name}_mean"])
        for row in rows
        for name in ("dice", "nsd")
    }
    shown = [row for row in table_rows(page, "Before and after") if row[0] == prompt]
    assert {row[1] for row in shown} == {row["task"] for row in rows}
    for _, task, _, patients, objects, *numbers in shown:
        (one,) = [row for row in rows if row["task"] == task and row["checkpoint"] == str(best)]
        assert (patients, objects) == (one["cases"], one["n"])
        pairs = [(name, str(place)) for name in ("dice", "nsd") for place in (before, best)]
        wanted = [expected[task, *pair] for pair in pairs]
        np.testing.assert_allclose([float(x) for x in numbers], wanted, atol=5.1e-5)  # 4 digits


def test_the_patients_are_not_those_of_the_run(reported, page, built):
    info = find_dataset(built)
    held_out = {c["case_id"] for c in info.record["cases"] if c["split"] == "validation"}
    captions = re.findall("<figcaption>(.*?), .*? slice", page)
    assert set(captions) == held_out
    assert "The run neither trained on these patients nor chose its best step by them." in page
    positions, _ = info.objects("validation")
    count = len(set(positions.tolist()))
    assert f"the objects of {count} of {count} slices, evenly from each patient of the" in page


def test_a_report_written_again_scores_nothing_twice(reported, page):
    kept = {path: path.read_bytes() for path in (reported.workdir / "report").rglob("*.jsonl")}
    assert len(kept) == 2, "two models"
    (reported.workdir / "report.html").unlink()
    done = report_again(str(reported.workdir))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(reported.workdir / "report.html")
    assert (reported.workdir / "report.html").read_text(encoding="utf-8") == page
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_run_that_has_not_ended_has_no_report(reported, tmp_path):
    starts = json.loads((reported.workdir / "run.json").read_text())
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    del starts[-1]["best"]
    write_json(interrupted / "run.json", starts)
    done = report_again(str(interrupted))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {interrupted}: the run has not come to its last step, 2; the command that started "
        "it (python -m medsam_jax.train) resumes it\n"
    )
    assert [path.name for path in interrupted.iterdir()] == ["run.json"]
    with pytest.raises(UserError, match="holds no training run; give the --workdir of one"):
        write_report(tmp_path)
    assert report_again().stderr == "error: no WORKDIR given; see --help\n"


def test_another_data_set_in_the_same_place_is_refused(reported, tmp_path):
    starts = json.loads((reported.workdir / "run.json").read_text())
    starts[-1]["data_set"]["sha256"] = "0" * 64
    write_json(tmp_path / "run.json", starts)
    with pytest.raises(UserError, match="not the data set that .* was trained on; build that"):
        write_report(tmp_path)


def test_a_field_turns_it_off(undisturbed):
    assert not (undisturbed / "report.html").exists()


def test_a_unet_without_validation_patients(hospital, config, tmp_path, capsys):
    """The tune split is shown, and called what it is."""
    manifest = hospital.with_name("no_validation.csv")
    manifest.write_text(hospital.read_text().replace(",validation", ",tune"))
    data = tmp_path / "data"
    building.build(building.Request(str(manifest), str(data), slices.Options(recipe="lite")))
    manifest.unlink()
    unet = UNetConfig.tiny()
    save_model(tmp_path / "unet", flatten_state(build(unet)), unet, {})
    config.update(SHORT | {"checkpoint": str(tmp_path / "unet"), "data_dir": str(data)})
    config.update({"frozen": (), "early_stop_evals": 0})
    train_and_evaluate(config, tmp_path / "run")
    write_report(tmp_path / "run")
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'run' / 'report.html'}\n")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No patient was left for a validation split" in page
    assert "nor chose its best step by" not in page
    assert set(re.findall("<figcaption>(.*?), .*? slice", page)) <= {"p2", "p3"}
    start, *_, end = values(tmp_path / "run", "tune/dice").values()
    assert ("untrained model" in page) == (start >= end)


def test_a_task_without_validation_patients(built):
    info = find_dataset(built)
    assert split_to_report(info, "") == split_to_report(info, "organs") == "validation"
    assert split_to_report(info, "mass") == "tune"


def test_the_worst_object_of_each_patient_and_label():
    def row(case, label, dice):
        names = {"case_id": case, "task": "t", "modality": "CT", "label": label, "unit": "px"}
        names |= {"reference": "", "prompt": "box", "box_shift": 0, "slice_index": 0}
        return ObjectScore(truth_size=1, predicted_size=1, scores={"dice": dice}, **names)

    rows = [row("a", 1, 0.9), row("a", 1, 0.4), row("b", 1, 0.2), row("a", 2, 0.3)]
    assert [one.scores["dice"] for one in worst(rows)] == [0.2, 0.3, 0.4]
