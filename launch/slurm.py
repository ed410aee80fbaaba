"""Trains under SLURM on one or several nodes; a preempted or timed-out job requeues itself.

Examples:
  python -m launch.slurm --config=configs/lite_medsam.py --workdir=/scratch/me/run \\
      --data_dir=/scratch/me/data --gpus_per_node=1 --dry_run
  python -m launch.slurm --config=configs/medsam_v2.py --workdir=/scratch/me/v2 \\
      --data_dir=/scratch/me/data --nodes=2 --gpus_per_node=8 --option=--partition=gpu \\
      --set=eval_batch_size=16 --dry_run

Run it in the repository's root. On one node, one process uses all devices. On several nodes, each
GPU has its own process, because jax reads SLURM's variables. SLURM sends SIGTERM before the time
limit and before a preemption. Training then saves its state and exits with status 143, the job is
requeued, and the same command resumes from the saved state.
"""

import shlex
from pathlib import Path

from absl import flags

from launch import common
from medsam_jax import cli, errors

_NODES = flags.DEFINE_integer("nodes", 1, "How many.")
_GPUS = flags.DEFINE_integer("gpus_per_node", 1, "GPUs of each.")
_CPUS = flags.DEFINE_integer("cpus_per_gpu", 8, "CPU cores for each GPU.")
_TIME = flags.DEFINE_string("time", "24:00:00", "Limit of one start; a run may take several.")
_NOTICE = flags.DEFINE_integer("notice_seconds", 180, "How long before it SIGTERM comes.")
_NAME = flags.DEFINE_string("name", "medsam_jax", "Of the job.")
_OPTION = flags.DEFINE_multi_string("option", [], "Further option of sbatch; repeatable.")


def main(_) -> None:
    common.check_positive("nodes", "gpus_per_node", "cpus_per_gpu", "notice_seconds")
    for option in _OPTION.value:
        if not option.startswith("--") or "\n" in option:
            raise errors.UserError(f"--option: {option!r} given; use --option=--NAME=VALUE")
    common.submit(["sbatch"], job_script())


def job_script() -> str:
    """Returns the batch script."""
    many = _NODES.value > 1
    tasks = _GPUS.value if many else 1
    train = common.training_command(_NODES.value * _GPUS.value, ["--multihost"] if many else [])
    options = [
        f"--job-name={_NAME.value}",
        f"--nodes={_NODES.value}",
        f"--ntasks-per-node={tasks}",
        f"--gpus-per-node={_GPUS.value}",
        f"--cpus-per-task={_CPUS.value * _GPUS.value // tasks}",
        f"--time={_TIME.value}",
        f"--signal=TERM@{_NOTICE.value}",  # without B: the step gets it, not this script
        "--requeue",
        "--open-mode=append",
        *_OPTION.value,
    ]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options)]
    return "\n".join(lines) + _BODY.format(
        folder=shlex.quote(str(Path.cwd())), train=shlex.join(train)
    )


# A preemption signals the script too. The script must outlive the step to requeue the job. It sets
# a handler because the step would inherit an ignored signal.
_BODY = """
set -uo pipefail
trap : TERM
cd {folder}

srun --kill-on-bad-exit=1 {train}
status=$?

if [ "$status" -eq 143 ]; then
    echo "state saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


if __name__ == "__main__":
    flags.mark_flags_as_required(common.REQUIRED)
    cli.run(main)
