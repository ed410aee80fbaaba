"""Starts a command under SLURM on one or several nodes; an interrupted job requeues itself.

Examples:
  python -m launch.slurm --config=configs/lite_medsam.py --workdir=/scratch/me/run \\
      --data_dir=/scratch/me/data --gpus_per_node=1 --dry_run
  python -m launch.slurm --config=configs/medsam_v2.py --workdir=/scratch/me/v2 \\
      --data_dir=/scratch/me/data --nodes=2 --gpus_per_node=8 --option=--partition=gpu \\
      --set=eval_batch_size=16 --dry_run
  python -m launch.slurm --command=predict --nodes=2 --gpus_per_node=4 --dry_run -- \\
      --checkpoint=lite_medsam --image=scans --prompts=prompts.json --output=masks
  python -m launch.slurm --command=build --gpus_per_node=4 --dry_run -- \\
      --manifest=cases.csv --data_dir=data --num_workers=32

Run it in the repository's root. On one node, one process uses all devices. On several nodes, each
GPU has its own process, because jax reads SLURM's variables. `build` is one process without GPUs.
SLURM sends SIGTERM before the time limit and before a preemption. Training then saves its state and
exits with status 143, as do all processes where one is lost. The job is requeued, up to
--max_restarts times, and the same command resumes from what is saved.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from launch import common
from medsam_jax import cli, errors

_NODES = flags.DEFINE_integer("nodes", 1, "How many.")
_GPUS = flags.DEFINE_integer("gpus_per_node", 1, "GPUs of each.")
_CPUS = flags.DEFINE_integer("cpus_per_gpu", 8, "CPU cores for each GPU.")
_TIME = flags.DEFINE_string("time", "24:00:00", "Limit of one start; a run may take several.")
_NOTICE = flags.DEFINE_integer("notice_seconds", 180, "How long before it SIGTERM comes.")
_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Before the job is not requeued any more.")
_NAME = flags.DEFINE_string("name", "medsam_jax", "Of the job.")
_OPTION = flags.DEFINE_multi_string("option", [], "Further option of sbatch; repeatable.")


def main(argv: Sequence[str]) -> None:
    common.check_positive("nodes", "gpus_per_node", "cpus_per_gpu", "notice_seconds")
    common.check_one_process("nodes")
    for option in _OPTION.value:
        if not option.startswith("--") or "\n" in option:
            raise errors.UserError(f"--option: {option!r} given; use --option=--NAME=VALUE")
    common.submit(["sbatch"], job_script(argv[1:]))


def job_script(arguments: Sequence[str]) -> str:
    """Returns the batch script."""
    many = _NODES.value > 1
    tasks = _GPUS.value if many else 1
    place = ["--multihost"] if many else []
    command = common.command(arguments, _NODES.value * _GPUS.value, place)
    gpus = [] if common.command_name() == "build" else [f"--gpus-per-node={_GPUS.value}"]
    options = [
        f"--job-name={_NAME.value}",
        f"--nodes={_NODES.value}",
        f"--ntasks-per-node={tasks}",
        *gpus,
        f"--cpus-per-task={_CPUS.value * _GPUS.value // tasks}",
        f"--time={_TIME.value}",
        f"--signal=TERM@{_NOTICE.value}",  # without B: the step gets it, not this script
        "--requeue",
        "--open-mode=append",
        *_OPTION.value,
    ]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options)]
    return "\n".join(lines) + _BODY.format(
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join(command),
        restarts=_RESTARTS.value,
    )


# A preemption signals the script too. The script must outlive the step to requeue the job. It sets
# a handler because the step would inherit an ignored signal.
_BODY = """
set -uo pipefail
trap : TERM
cd {folder}

srun --kill-on-bad-exit=1 {command}
status=$?

if [ "$status" -eq 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    echo "state saved; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


if __name__ == "__main__":
    cli.run(main, positional=common.ARGUMENTS)
