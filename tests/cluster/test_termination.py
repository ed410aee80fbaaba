"""SIGTERM to one of two processes: both save at the same step, end, and go on from there."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A loop like training's around one array, with a checkpoint at every other step.
LOOP = """
import sys, time
import grain.python as grain
import jax, jax.numpy as jnp
from pathlib import Path
from medsam_jax.distributed import join_processes
from medsam_jax.training.checkpoint import TrainCheckpoints
from medsam_jax.training.step import TrainState
from medsam_jax.training.monitor import termination

workdir, coordinator, process_id, last = sys.argv[1:]
join_processes(False, coordinator, 2, int(process_id))
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
zero = jax.device_put(jnp.zeros((), jnp.int32), everywhere)
state = TrainState(zero, {}, (), {})
add = jax.jit(lambda step: step + 1, out_shardings=everywhere)
data = iter(grain.MapDataset.range(10**6).to_iter_dataset())
checkpoints = TrainCheckpoints(Path(workdir) / "checkpoints", 2)
restored = checkpoints.restore_latest(state, data)
state = restored[0] if restored else state
print("begin", int(state.step), flush=True)
with termination() as stop_after:
    while int(state.step) < int(last):
        value = next(data)
        assert value == int(state.step), "data and state go together"
        state = TrainState(add(state.step), {}, (), {})
        step = int(state.step)
        due = stop_after(step)
        if step % 2 == 0 or due:
            checkpoints.save(step, state, data, {})
        if due:
            break
        time.sleep(0.05)
checkpoints.close()
print("end", int(state.step), flush=True)
sys.exit(143 if due else 0)
"""


def start(workdir: Path, process: int, port: int, last: int) -> subprocess.Popen:
    arguments = [str(workdir), f"127.0.0.1:{port}", str(process), str(last)]
    return subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_one_signal_stops_both_at_the_same_step(tmp_path):
    reached = 0
    for last, status in ((10**6, 143), (None, 0)):
        port = free_port()
        processes = [start(tmp_path, i, port, last or reached + 3) for i in range(2)]
        try:
            if status:
                checkpoint = tmp_path / "checkpoints" / "4"
                deadline = time.monotonic() + 200
                while not checkpoint.exists() and time.monotonic() < deadline:
                    time.sleep(0.02)
                processes[1].send_signal(signal.SIGTERM)
            told = [process.communicate(timeout=200) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [status, status], told
        lines = [re.findall("^(?:begin|end) .*", out, re.MULTILINE) for out, _ in told]
        assert lines[0] == lines[1]
        assert lines[0][0] == f"begin {reached}", "the second start goes on from where both stopped"
        reached = int(lines[0][1].removeprefix("end "))
        assert reached >= 4
