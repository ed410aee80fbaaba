"""Makes the small files of tests/golden/pth with PyTorch itself: `python tests/golden/make_pth.py`.

Made with torch 2.13.0. Their values follow the formulas in `tests/weights_converter/test_pth.py`.
"""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "pth"


def tensors() -> OrderedDict:
    """Every element type, a scalar, a transposed view and two views of one storage."""
    ramp = torch.arange(24, dtype=torch.float32) / 7
    return OrderedDict(
        f32=ramp.reshape(2, 3, 4).clone(),
        f16=ramp.to(torch.float16),
        bf16=ramp.to(torch.bfloat16),
        f64=ramp.to(torch.float64) / 3,
        i64=torch.tensor(2**40 + 1),
        i32=torch.arange(-3, 3, dtype=torch.int32),
        u8=torch.arange(250, 256, dtype=torch.uint8),
        flag=torch.tensor([True, False, True]),
        transposed=ramp.reshape(4, 6).t(),
        tail=ramp[20:],
    )


def training_checkpoint() -> dict:
    """Returns a training script's checkpoint, with a wrapped DistributedDataParallel model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6).reshape(2, 3) / 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6).reshape(2, 3) / 5)
    state = OrderedDict((f"module.{name}", value) for name, value in model.state_dict().items())
    return {
        "epoch": 3,
        "best_dice": np.float64(0.875),
        "note": "über",
        "model": state,
        "optimizer": optimizer.state_dict(),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    torch.save(tensors(), FOLDER / "zip.pth")
    torch.save(tensors(), FOLDER / "protocol4.pth", pickle_protocol=4)
    torch.save(tensors(), FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(training_checkpoint(), FOLDER / "training.pth")
    torch.save(
        training_checkpoint(), FOLDER / "training_legacy.pth", _use_new_zipfile_serialization=False
    )
    torch.save({"state_dict": {"a": torch.nn.Parameter(torch.ones(2))}}, FOLDER / "parameter.pth")
    torch.serialization.set_crc32_options(False)
    torch.save(tensors(), FOLDER / "no_checksums.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), FOLDER / "torchscript.pt")


if __name__ == "__main__":
    main()
