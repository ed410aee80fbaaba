"""What a workdir says of the run in it: its configuration, which a resumed run has to share."""

import json
import os
from pathlib import Path

import jax
import ml_collections

from medsam_jax.errors import UserError
from medsam_jax.training.config import base_config

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
    """Writes the configuration into a new workdir; refuses one that was begun with another."""
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    if path.exists():
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
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(temporary, path)
