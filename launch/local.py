"""Starts a command as several processes on this machine; restarts all when one is lost.

Examples:
  python -m launch.local --processes=2 --devices=1 --config=configs/lite_medsam.py \\
      --workdir=runs/two --data_dir=data --dry_run
  python -m launch.local --processes=4 --devices=1 --command=evaluate --dry_run -- \\
      --checkpoint=lite_medsam --data_dir=data --output=scores

For a machine with several GPUs, of which each process gets --devices, or to try a run over several
hosts. A process that is killed ends the others with status 143, and all start again, up
to --max_restarts times; so they do elsewhere under SLURM or a JobSet. SIGTERM goes to all
processes: training saves its state, and this program ends with status 143.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from launch import common
from medsam_jax import cli
from medsam_jax.distributed import LOST_AFTER

_PROCESSES = flags.DEFINE_integer("processes", 2, "How many.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices of each, to check the batch.")
_RESTARTS = flags.DEFINE_integer("max_restarts", 100, "Before this program gives up.")
_POLL_SECONDS = 0.1


def main(argv: Sequence[str]) -> None:
    common.check_positive("processes", "devices", "max_restarts")
    common.check_one_process("processes")
    devices = _PROCESSES.value * _DEVICES.value
    command = common.command(argv[1:], devices)
    if common.dry_run():
        print(f"# would run {_PROCESSES.value} times: {shlex.join(command)}")
        return
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(143))
    for start in range(_RESTARTS.value + 1):
        status = _run(command, stopped)
        if status != 143 or stopped:
            break
        print(f"processes were lost; restart {start + 1} of {_RESTARTS.value}", file=sys.stderr)
    sys.exit(status)


def _run(command: Sequence[str], stopped: list[int]) -> int:
    """Runs all processes to their end; returns 0, 143 where they can go on, or a failure's status.

    A process that a signal ended can go on.
    """
    count = _PROCESSES.value
    place = [] if count == 1 else [f"--coordinator=127.0.0.1:{_free_port()}"]
    processes = []
    for number in range(count):
        more = [f"--num_processes={count}", f"--process_id={number}"] if place else []
        own = range(number * _DEVICES.value, (number + 1) * _DEVICES.value)  # on GPUs
        env = os.environ | {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))} if place else None
        processes.append(subprocess.Popen([*command, *place, *more], env=env))
        print(f"process {number}: pid {processes[-1].pid}", file=sys.stderr, flush=True)
    told, ending = False, None  # whether SIGTERM was passed on; when the first one ended
    try:
        while None in (states := [process.poll() for process in processes]):
            if stopped and not told:
                told = True
                for process in processes:
                    process.terminate()
            if any(states) and ending is None:
                ending = time.monotonic()
            if ending is not None and time.monotonic() > ending + 2 * LOST_AFTER:
                break  # those left have not noticed
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    statuses = {143 if state is None or state < 0 else state for state in states}
    return min(statuses - {0, 143}, default=max(statuses))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    cli.run(main, positional=common.ARGUMENTS)
