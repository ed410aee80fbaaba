"""Starts a command on all hosts of a Cloud TPU VM or pod slice by `gcloud ... ssh --worker=all`.

Examples:
  python -m launch.tpu_vm --tpu=v5e-16 --zone=us-west4-a --chips=16 --directory=medsam_jax \\
      --config=configs/medsam_v2.py --workdir=/mnt/shared/v2 --data_dir=/mnt/shared/data \\
      --set=eval_batch_size=16 --dry_run
  python -m launch.tpu_vm --tpu=v5e-16 --zone=us-west4-a --chips=16 --command=evaluate --dry_run \\
      -- --checkpoint=/mnt/shared/v2/best --data_dir=/mnt/shared/data --output=/mnt/shared/scores

Every host needs the repository at --directory, installed with `pip install -e . "jax[tpu]"`. The
workdir and the data set must be on a file system that all hosts share (Filestore, or a bucket
through gcsfuse). After a preemption, create the slice again and repeat the command: the run resumes
from its last checkpoint. SIGTERM to one host (maintenance) makes all hosts save and exit with
status 143; where one is lost the others exit so too. `build` runs on one host.
"""

import shlex
from collections.abc import Sequence

from absl import flags

from launch import common
from medsam_jax import cli

_TPU = flags.DEFINE_string("tpu", None, "Name of the TPU VM.")
_ZONE = flags.DEFINE_string("zone", None, "Its zone.")
_PROJECT = flags.DEFINE_string("project", None, "Its project; gcloud's own where not given.")
_CHIPS = flags.DEFINE_integer("chips", None, "Devices of all hosts together, to check the batch.")
_DIRECTORY = flags.DEFINE_string("directory", "medsam_jax", "The repository on the hosts.")


def main(argv: Sequence[str]) -> None:
    common.check_positive("chips")
    alone = common.command_name() == "build"
    command = common.command(argv[1:], _CHIPS.value, [] if alone else ["--multihost"])
    # exec: a signal to the ssh shell must reach the process.
    remote = f"cd {shlex.quote(_DIRECTORY.value)} && exec {shlex.join(command)}"
    command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", _TPU.value, f"--zone={_ZONE.value}"]
    if _PROJECT.value:
        command.append(f"--project={_PROJECT.value}")
    common.submit([*command, f"--worker={0 if alone else 'all'}", f"--command={remote}"])


if __name__ == "__main__":
    flags.mark_flags_as_required(["tpu", "zone", "chips"])
    cli.run(main, positional=common.ARGUMENTS)
