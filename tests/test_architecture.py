"""docs/architecture.md shows the code as it is: the tables beside Meta's, and the list of seams."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Returns the cells of the last table under a heading, without its head."""
    (section,) = (
        part for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE) if part.startswith(heading)
    )
    rows = re.findall(r"^\| (.*) \|$", section.rsplit("\n|---", 1)[1], re.MULTILINE)
    return [row.split(" | ") for row in rows]


def function(file: str, path: str) -> tuple[ast.FunctionDef, str]:
    source = (ROOT / "medsam_jax" / "models" / file).read_text(encoding="utf-8")
    node = ast.parse(source)
    for name in path.split("."):
        node = next(part for part in node.body if getattr(part, "name", None) == name)
    return node, source


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("image_encoder.py", "Block.__call__"),
        ("image_encoder.py", "Attention.__call__"),
        ("mask_decoder.py", "MaskDecoder.predict_masks"),
    ],
)
def test_the_right_column_is_the_code(file, path):
    shown = [row[1].strip("`") for row in table(f"`{path}` of `{file}`")]
    node, source = function(file, path)
    body = node.body[ast.get_docstring(node) is not None :]
    code = "\n".join(source.splitlines()[body[0].lineno - 1 : node.end_lineno])
    code = re.sub(r"#.*", "", code)  # none of these lines has a # in a string
    assert re.sub(r"\s", "", "".join(shown)) == re.sub(r"\s", "", code)


def test_every_seam_is_listed():
    """Seams are the public functions of `ops` that take a form."""
    seams = {
        node.name
        for path in (ROOT / "medsam_jax" / "ops").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and "form" in {argument.arg for argument in node.args.args}
    }
    assert {row[0].strip("`") for row in table("The form of an operation")} == seams


def test_files_that_the_page_names_are_there():
    named = set(re.findall(r"`([\w/]+/\w+\.py)`", PAGE))
    assert len(named) > 10
    roots = (ROOT, ROOT / "medsam_jax")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []
