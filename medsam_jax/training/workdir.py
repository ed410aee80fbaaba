"""Records of a run in its workdir: `config.json`, and `run.json` with an entry for each start.

A start in a workdir that holds a run must be able to resume it: `check_same_run`.
"""

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medsam_jax.data.datasets import DatasetInfo
from medsam_jax.data.manifest import case_hashes
from medsam_jax.errors import UserError
from medsam_jax.io.files import versions, write_json
from medsam_jax.training.config import base_config

_PACKAGES = ("medsam-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Fields that a resumed run may change, since they change no step: the length of a run and what it
# writes. The data set and the type of the embeddings must stay, see `check_same_run`.
MAY_CHANGE = (
    "data_dir",
    "embedding_cache",
    "embedding_dtype",
    "num_workers",
    "mesh",
    "eval_every",
    "eval_overlays",
    "report",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "profile_steps",
    "early_stop_evals",
)


def check_same_run(config: ml_collections.ConfigDict, workdir: Path, info: DatasetInfo) -> None:
    """Refuses a workdir that was begun with another configuration or data set.

    The data set may have moved. A cache may be turned on or off if the decoder still gets
    embeddings of the same type.

    Raises:
      UserError: naming the first field that differs, or both fingerprints of the data.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    now, before = _fields(config), _current(json.loads(path.read_text()))
    may_change = MAY_CHANGE + (("num_steps",) if config.schedule.startswith("constant") else ())
    for name in sorted(before.keys() | now.keys()):
        if name not in may_change and before.get(name) != now.get(name):
            raise UserError(
                f"config.{name}: {now.get(name)!r}, but {workdir} was begun with "
                f"{before.get(name)!r}; use that value or another --workdir"
            )
    if _embedding_type(now) != _embedding_type(before):
        raise UserError(
            f"config.embedding_cache: the decoder would get {_embedding_type(now)} embeddings, but "
            f"{workdir} was begun with {_embedding_type(before)} ones; use embedding_cache="
            f"{before['embedding_cache']!r} and embedding_dtype={before['embedding_dtype']!r}, or "
            "another --workdir"
        )
    starts = _starts(workdir)
    begun = starts[-1]["data_set"]["sha256"] if starts else info.fingerprint
    if begun != info.fingerprint:
        raise UserError(
            f"{info.directory}: data set {info.fingerprint[:12]}, but {workdir} was begun "
            f"with {begun[:12]} in {starts[-1]['data_set']['directory']}; give that data set by "
            "config.data_dir or use another --workdir"
        )


def _fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _current(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of an earlier `config.json` under today's names.

    A field that is missing there has the effect of its default. Once `dice_weight`,
    `cross_entropy_weight` and `iou_weight` were what `losses.dice`, `losses.cross_entropy` and
    `losses.iou` are, and `beta1` and `beta2` what `optimizer_args` holds as `b1` and `b2`.
    """
    defaults = _fields(base_config())
    fields = defaults | fields
    fields["losses"] = defaults["losses"] | fields["losses"]
    for name in defaults["losses"]:
        if f"{name}_weight" in fields:
            fields["losses"][name] = fields.pop(f"{name}_weight")
    betas = {"b1": fields.pop("beta1", 0.9), "b2": fields.pop("beta2", 0.999)}
    if betas != {"b1": 0.9, "b2": 0.999}:
        fields["optimizer_args"] = betas
    return fields


def _embedding_type(fields: dict[str, Any]) -> str:
    """Returns the type whose rounding the decoder's embeddings have."""
    types = {fields["dtype"], fields["embedding_dtype"] if fields["embedding_cache"] else "float32"}
    return "bfloat16" if "bfloat16" in types else "float32"


def _starts(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "run.json"
    return json.loads(path.read_text()) if path.exists() else []


def record_start(
    config: ml_collections.ConfigDict, workdir: Path, info: DatasetInfo, step: int
) -> None:
    """Writes `config.json` and appends this start to `run.json`, in process 0 alone.

    Args:
      step: the step that training continues from.
    """
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    fields = _fields(config)
    write_json(workdir / "config.json", fields)
    starts = _starts(workdir)
    starts.append(
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "command": sys.argv,
            "config": fields,
            "data_set": {
                "directory": str(info.directory),
                "sha256": info.fingerprint,
                "counts": info.counts,
                "cases": case_hashes(info.record, config.task),
            },
            "versions": {"python": platform.python_version()} | versions(_PACKAGES),
            "git": _git_commit(),
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "host": platform.platform(),
        }
    )
    write_json(workdir / "run.json", starts)


def record_end(workdir: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to the record of this start in `run.json`, in process 0 alone."""
    if jax.process_index() == 0:
        starts = _starts(workdir)
        starts[-1] |= facts
        write_json(workdir / "run.json", starts)


def finished_run(workdir: Path) -> dict[str, Any]:
    """Returns the last entry of `run.json` of a run that came to its end.

    Its `config` has today's names.

    Raises:
      UserError: there is no run, or its last start has not ended.
    """
    starts = _starts(workdir)
    if not starts:
        raise UserError(f"{workdir}: holds no training run; give the --workdir of one")
    if "best" not in starts[-1]:
        steps = starts[-1]["config"]["num_steps"]
        raise UserError(
            f"{workdir}: the run has not come to its last step, {steps}; the command that started "
            "it (python -m medsam_jax.train) resumes it"
        )
    return starts[-1] | {"config": _current(starts[-1]["config"])}


def record_best(workdir: Path, progress: Mapping[str, Any]) -> str:
    """Adds the best model's step and scores to this start in `run.json`; returns them as a line.

    Args:
      progress: of the training checkpoints; those of an earlier version hold the score alone.
    """
    best = progress.get("best", {"score": progress["best_score"]})
    best = best | {"no_better_than_the_start": best.get("step") == 0}
    record_end(workdir, {"best": best})
    return describe_best(best)


def describe_best(best: Mapping[str, Any]) -> str:
    """Returns the `best` of a finished run as a line."""
    parts = " and ".join(f"{name} {value:.4f}" for name, value in best.get("parts", {}).items())
    line = f"best tune score {best['score']:.4f}"
    line += f" (mean of {parts})" if " and " in parts else f" ({parts})" if parts else ""
    line += f" at step {best['step']}" if "step" in best else ""
    if best["no_better_than_the_start"]:
        line += ": no better than the start, the model is untrained"
    return line


def _git_commit() -> dict[str, Any] | None:
    """Returns the commit of the repository that holds this file, None outside of one."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None
