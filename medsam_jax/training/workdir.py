"""What a workdir says of the run in it: its configuration, which a resumed run has to share, and
under which circumstances it was started, each time (`run.json`)."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_collections

from medsam_jax.data.datasets import DatasetInfo
from medsam_jax.errors import UserError
from medsam_jax.training.config import base_config

_PACKAGES = ("medsam-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Fields that a resumed run may have other values of: they change how long it runs and what it
# writes, not what a step computes.
MAY_CHANGE = (
    "data_dir",
    "embedding_cache",
    "num_workers",
    "mesh",
    "eval_every",
    "eval_overlays",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "early_stop_evals",
)


def check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Refuses a workdir that was begun with another configuration.

    Raises:
      UserError: naming the first field that differs.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    now = json.loads(config.to_json_best_effort())
    # A field that this program has got since then had the effect of its default.
    defaults = json.loads(base_config().to_json_best_effort())
    before = defaults | json.loads(path.read_text())
    may_change = MAY_CHANGE + (("num_steps",) if config.schedule == "constant" else ())
    for name in sorted(before.keys() | now.keys()):
        if name not in may_change and before.get(name) != now.get(name):
            raise UserError(
                f"config.{name}: {now.get(name)!r}, but {workdir} was begun with "
                f"{before.get(name)!r}; use that value or another --workdir"
            )


def record_start(
    config: ml_collections.ConfigDict, workdir: Path, info: DatasetInfo, step: int
) -> None:
    """Writes `config.json`, and adds this start to the list in `run.json`; process 0 alone does.

    Args:
      step: the step that training goes on from.
    """
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    fields = json.loads(config.to_json_best_effort())
    _write_json(workdir / "config.json", fields)
    path = workdir / "run.json"
    starts = json.loads(path.read_text()) if path.exists() else []
    starts.append(
        {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "command": sys.argv,
            "config": fields,
            "data_set": {
                "directory": str(info.directory),
                "sha256": dataset_fingerprint(info),
                "counts": info.counts,
            },
            "versions": {"python": platform.python_version()} | _versions(),
            "git": _git_commit(),
            "devices": {
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
            "host": platform.platform(),
        }
    )
    _write_json(path, starts)


def dataset_fingerprint(info: DatasetInfo) -> str:
    """SHA-256 of a data set's record: recipe, cases with their counts, what was dropped."""
    return hashlib.sha256(json.dumps(info.record, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a clone that was not installed
    return found


def _git_commit() -> dict[str, Any] | None:
    """The commit of the repository that holds this file, None outside of one."""
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
