"""`import medsam_jax` is quick because it loads little; benchmarks/startup.py times it."""

import subprocess
import sys
from pathlib import Path

import pytest

LAZY = ("SimpleITK", "tensorflow_datasets", "grain", "matplotlib", "scipy", "cv2", "orbax", "torch")
EVERY_PUBLIC_NAME = "import medsam_jax; [getattr(medsam_jax, name) for name in medsam_jax.__all__]"


@pytest.mark.parametrize("code", ["import medsam_jax", EVERY_PUBLIC_NAME])
def test_no_heavy_library_is_loaded(code):
    code += f"; import sys; print([name for name in {LAZY} if name in sys.modules])"
    root = Path(__file__).parents[1]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[]"
