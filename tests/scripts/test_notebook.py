"""The quickstart notebook's imports from this library; `make notebook` runs the whole of it."""

import ast
import importlib
import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def test_imported_names_exist():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    names = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("medsam_jax")
        for alias in node.names
    ]
    assert len(names) > 4
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
