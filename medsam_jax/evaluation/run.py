"""What `python -m medsam_jax.evaluate` does, as a function."""

from collections.abc import Sequence
from pathlib import Path

import jax

from medsam_jax.errors import UserError
from medsam_jax.evaluation.protocol import Protocol
from medsam_jax.evaluation.report import write_report
from medsam_jax.evaluation.split import JOURNAL_ONLY, SplitEvaluation


def evaluate(
    checkpoints: Sequence[str],
    data_dir: str,
    split: str,
    output: Path,
    *,
    prompt: str = "box",
    box_shifts: Sequence[int | str] = (0,),
    tolerance: float = 2.0,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Evaluates checkpoints side by side and writes tables and figures to `output`.

    See `medsam_jax.evaluate` for the arguments.

    Raises:
      UserError: bad arguments, data set or checkpoint; nothing has been computed then.
    """
    protocols = [Protocol(prompt, _whole(shift), seed) for shift in box_shifts]
    _check_arguments(checkpoints, protocols, tolerance, batch_size)
    evaluation = SplitEvaluation(data_dir, split, protocols, tolerance, batch_size, output)
    for checkpoint in checkpoints:
        evaluation.check(checkpoint)
    rows = []
    for checkpoint in checkpoints:
        print(f"scoring {checkpoint}", flush=True)
        rows += evaluation.evaluate(checkpoint)
    if jax.process_index() != 0:
        return
    print(f"writing tables and figures to {output}", flush=True)
    write_report(
        output,
        rows,
        title=evaluation.title,
        settings={
            "checkpoints": ", ".join(f"`{checkpoint}`" for checkpoint in checkpoints),
            "prompt": f"{prompt}, seed {seed}",
            "NSD tolerance": f"{tolerance:g} {evaluation.unit}, native 2D",
        },
        unit=evaluation.unit,
        tolerance=tolerance,
        draw=evaluation.picture,
        hidden=JOURNAL_ONLY,
    )
    print((output / "summary.md").resolve())


def _whole(shift: int | str) -> int:
    try:
        return int(shift)
    except ValueError:
        raise UserError(f"--box_shift: {shift!r} is no whole number of pixels") from None


def _check_arguments(
    checkpoints: Sequence[str], protocols: Sequence[Protocol], tolerance: float, batch_size: int
) -> None:
    if not checkpoints or not all(checkpoints):
        raise UserError("--checkpoint: empty; give directories or names, comma-separated")
    if len(set(checkpoints)) < len(checkpoints):
        raise UserError(f"--checkpoint: {','.join(checkpoints)} names one twice; leave it out")
    if len({protocol.box_shift for protocol in protocols}) < len(protocols):
        raise UserError("--box_shift: one value is given twice; leave it out")
    if not tolerance >= 0:
        raise UserError(f"--tolerance: {tolerance} given; use 0 or more pixels")
    if batch_size < 1:
        raise UserError(f"--batch_size: {batch_size} given; use 1 or more")
