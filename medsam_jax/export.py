"""Writes a model as StableHLO programs that run without this library; see docs/export.md.

Example:
  python -m medsam_jax.export --checkpoint lite_medsam --output exported/lite_medsam \\
      --platforms cpu,cuda --prompts 4
"""

import os
from pathlib import Path

from absl import flags

from medsam_jax import cli, errors
from medsam_jax.io.files import check_writable

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Checkpoint directory or name of known weights."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write; it must not be there.")
_PLATFORMS = flags.DEFINE_list(
    "platforms", ["cpu", "cuda", "tpu"], "Where the programs shall run: cpu, cuda, rocm, tpu."
)
_PROMPTS = flags.DEFINE_integer("prompts", 1, "Places for prompts in one call.")
_POINTS = flags.DEFINE_integer("points", 8, "Places for points in a prompt.")
_MATMUL_PRECISION = flags.DEFINE_string(
    "matmul_precision", "highest", "Of float32 products: highest, high or default."
)


def main(_) -> None:
    output = Path(_OUTPUT.value)
    if os.path.lexists(output):
        raise errors.UserError(f"{output}: exists; choose another --output")
    check_writable(output.parent)
    with cli.loading():
        from medsam_jax.hub import load_model
        from medsam_jax.inference.stablehlo import export_model
        from medsam_jax.models.sam import Sam

    model = load_model(_CHECKPOINT.value)
    if not isinstance(model, Sam):
        raise errors.UserError(f"{_CHECKPOINT.value}: a {type(model).__name__}; export takes SAM")
    print(f"tracing the programs of {_CHECKPOINT.value}", flush=True)
    places = _PROMPTS.value, _POINTS.value
    export_model(model, _OUTPUT.value, _PLATFORMS.value, *places, _MATMUL_PRECISION.value)
    print(f"{_OUTPUT.value}: written for {', '.join(_PLATFORMS.value)}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "output"])
    cli.run(main)
