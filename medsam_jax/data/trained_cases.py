"""Hashes of the cases that a checkpoint was trained on, so that an evaluation can warn.

`model.json` of a trained checkpoint holds them at `training.cases`, `run.json` of its workdir at
`data_set.cases`: `{"train": [HASH, ...], "tune": [HASH, ...]}`, each list sorted. HASH is the start
of the SHA-256 of "DATA SET NAME|CASE ID", the pair that also decides a case's split; the name is
that of `datasets.build --name`. The hashes keep case ids out of published checkpoints. They are no
protection against someone who can guess the ids.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

SPLITS = ("train", "tune")


def case_hash(data_set: str, case_id: str) -> str:
    """Returns 16 hexadecimal digits for a case of the data set of that name."""
    return hashlib.sha256(f"{data_set}|{case_id}".encode()).hexdigest()[:16]


def case_hashes(record: Mapping[str, Any], task: str = "") -> dict[str, list[str]]:
    """Returns the hashes of the cases that a run sees, from a data set's record.

    Args:
      record: `DatasetInfo.record`.
      task: the only task that is trained; "": all.
    """
    return {
        split: sorted(
            {
                case_hash(record["name"], case["case_id"])
                for case in record["cases"]
                if case["split"] == split and task in ("", case["task"])
            }
        )
        for split in SPLITS
    }


def trained_cases(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the split, "train" or "tune", of each case hash that a checkpoint has seen.

    Empty for a checkpoint that says nothing of its cases, such as a released one.

    Args:
      metadata: of `models.checkpoint.read_metadata`.
    """
    cases = metadata.get("training", {}).get("cases", {})
    return {one: split for split in reversed(SPLITS) for one in cases.get(split, ())}
