"""Prompts from JSON: what is read, and how each mistake is named."""

import json

import pytest

from medsam_jax.errors import UserError
from medsam_jax.inference.prompt_file import arguments, from_json

BOX = [1, 2, 9, 8]


def write(path, prompts) -> str:
    path.write_text(json.dumps({"a.png": prompts}))
    return str(path)


def test_prompts_of_one_label_are_one_object(tmp_path):
    prompts = [
        {"label": 5, "name": "liver", "slice": 3, "box": BOX},
        {"points": [[4, 5, 1], [6, 7, 0]]},
        {"label": 5, "slice": 7, "box": BOX, "points": [[1, 1, 0]]},
    ]
    liver, second = from_json(write(tmp_path / "p.json", prompts))["a.png"]
    assert (liver.label, liver.name, sorted(liver.slices)) == (5, "liver", [3, 7])
    assert (second.label, second.name, list(second.slices)) == (2, None, [None])
    given = arguments(second.slices[None])
    assert given["point_coords"].tolist() == [[4, 5], [6, 7]]
    assert given["point_labels"].tolist() == [1, 0]
    assert sorted(arguments(liver.slices[7])) == ["box", "point_coords", "point_labels"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "list of prompts is empty"),
        ([BOX], "prompt 1: .* give an object with box or points"),
        ([{"label": 1}], "has neither box nor points"),
        ([{"boxes": BOX}], "unknown field 'boxes'; use label, name, slice, box, points"),
        ([{"box": [1, 2, 3]}], "give .x0, y0, x1, y1."),
        ([{"box": "1,2,3,4"}], "box '1,2,3,4'"),
        ([{"points": [[1, 2]]}], "give .*label 1 or 0"),
        ([{"box": BOX, "label": 0}], "label 0; give a whole number from 1"),
        ([{"box": BOX, "label": 70000}], "label 70000"),
        ([{"box": BOX, "slice": -1}], "slice -1; give a whole number from 0"),
        ([{"box": BOX, "slice": True}], "slice True"),
        ([{"box": BOX, "label": 1}, {"box": BOX, "label": 1}], "prompt 2: label 1 has a prompt"),
    ],
)
def test_mistakes_are_named(tmp_path, prompts, message):
    with pytest.raises(UserError, match=f"p.json: a.png.*{message}"):
        from_json(write(tmp_path / "p.json", prompts))
