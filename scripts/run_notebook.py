"""Runs a notebook from top to bottom; fails if a cell fails or the file is too large.

    python scripts/run_notebook.py --notebook docs/quickstart.ipynb [--write]

With `--write` the new outputs are written to the file. Without it the file is not changed; the run
is only a check.
"""

import re
import time
from pathlib import Path

from absl import flags

from medsam_jax.cli import run
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text

_NOTEBOOK = flags.DEFINE_string("notebook", "docs/quickstart.ipynb", "File to run.")
_WRITE = flags.DEFINE_bool("write", False, "Keep the outputs.")

LARGEST = 1_500_000  # bytes including outputs, as the repository stores them


def main(argv) -> None:
    del argv
    try:
        import nbclient
        import nbformat
    except ImportError:
        raise UserError("nbclient: is not installed; pip install -e '.[notebook]'") from None
    path = Path(_NOTEBOOK.value)
    notebook = nbformat.read(path, as_version=4)
    root = str(Path(__file__).resolve().parents[1])
    print(f"running {path}", flush=True)
    start = time.monotonic()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": root}}
    )
    try:
        client.execute()
    except nbclient.exceptions.CellExecutionError as error:
        raise UserError(f"{path}: a cell failed\n{error}") from None
    print(f"{path}: ran in {time.monotonic() - start:.0f} s")
    _tidy(notebook, root)
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > LARGEST:
        raise UserError(f"{path}: {len(text.encode())} bytes with outputs; show less")
    if _WRITE.value:
        write_text(path, text)


def _tidy(notebook, root: str) -> None:
    """Removes output that differs between runs and machines: progress bars, times, paths."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        kept = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in kept:
            if "text" in output:
                output["text"] = re.sub(re.escape(root) + "/?", "", output["text"])
        cell.outputs = kept
    notebook.metadata["language_info"] = {"name": "python"}


if __name__ == "__main__":
    run(main)
