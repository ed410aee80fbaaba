"""Main module of a contender's process; `benchmarks.harness` starts it."""

import importlib
import importlib.metadata
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "torch",
    "onnxruntime",
    "transformers",
    "segment_anything",
    "monai",
    "numpy",
)


def main() -> None:
    cores = int(sys.argv[1])
    available = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, available[:cores])
    # Only answers may reach the parent's pipe; output of libraries goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    work = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "setup":
            work, answer = _setup(request)
        elif request["do"] == "run":
            start = time.perf_counter()
            work.run(request["index"])
            answer = {"seconds": time.perf_counter() - start}
        else:
            answer = {"peak_memory": (work.peak_memory or peak_memory)()}
        print(json.dumps(answer), file=answers, flush=True)


def _setup(request: dict):
    module, function = request["setup"].split(":")
    work = getattr(importlib.import_module(module), function)(**request["arguments"])
    start = time.perf_counter()
    outputs = work.run(0)
    first_call = time.perf_counter() - start
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    arrays = {f"{i:03d}": np.asarray(output) for i, output in enumerate(outputs)}
    np.savez(request["output"], **arrays)
    versions = {}
    for package in PACKAGES:
        if package in sys.modules:
            versions[package] = importlib.metadata.version(package)
    counted = {"operations": work.operations, "bytes": work.bytes, "items": work.items}
    return work, {"first_call": first_call, "versions": versions, **counted}


def peak_memory() -> int:
    """Returns this process's peak memory so far in bytes.

    getrusage's ru_maxrss is not used, because it starts at the peak of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status).group(1)) * 1024


if __name__ == "__main__":
    main()
