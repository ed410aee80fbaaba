"""Reads damaged files in child processes: each is a right scan or an error of one line.

`python -m tests.io.fuzz NUMBER` writes that mutation to the current folder and reads it.
`FUZZ_NAMES='dcm|series' make fuzz` reads only samples of such names (a regular expression).
"""

import json
import os
import re
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from medsam_jax.errors import UserError
from medsam_jax.io.scans import read_mask, read_scan
from tests.io.mutations import Sample, mutate, samples

SECONDS = 5.0  # for one file
TIMES = 4  # an honest file's bytes, that reading may allocate
# Arenas of C libraries, and 64 MB of pixels that are never doubted: a picture of one colour
# takes a few bytes.
SLACK = 96 << 20
SEED = 19
ROOT = Path(__file__).parents[2]
# One thread and one heap: others reserve address space when they first come into use.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT)}


def damaged(number: int, known: dict[str, Sample]) -> tuple[str, Sample, bytes, str]:
    """Returns name and sample, damaged bytes and what was done, of the mutation of that number."""
    name = list(known)[number % len(known)]
    others = list(known.values())
    content, done = mutate(known[name], others, np.random.default_rng([SEED, number]))
    return name, known[name], content, done


def write(sample: Sample, content: bytes, folder: Path) -> Path:
    """Writes a sample's files, its own with these bytes; returns what a user would name."""
    for name, data in {**sample.beside, sample.name: content}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    path = folder / sample.name
    return path.parent if sample.name.startswith("series") else path


def fault(path: Path, content: bytes, sample: Sample, original: object, as_mask: bool) -> str:
    """Reads a damaged file; returns what is wrong with the answer, or ""."""
    try:
        if as_mask:
            labels = read_mask(path, original)
            right = labels.dtype == np.int32 and labels.shape == original.array.shape[:3]
            return "" if right else f"labels are {labels.dtype} {labels.shape}"
        scan = read_scan(path)
    except UserError as error:
        text = str(error)
        named = str(path.with_suffix("")) in text  # or the other file of a pair
        if not named or not text.isprintable():
            return f"message {text!r}"
        if re.search("alloc|out of memory", text, re.IGNORECASE):
            return f"message {text!r}"
        return ""
    except BaseException as error:  # whatever it is, no user should see it
        return f"{type(error).__name__}: {error}"[:300]
    return _fault_of(scan) or _fault_of_voxels(scan, content, sample, original)


def _fault_of(scan) -> str:
    array, spacing = scan.array, np.array(scan.spacing)
    if array.ndim not in (3, 4) or not array.size or array.dtype.kind not in "iuf":
        return f"array {array.dtype} {array.shape}"
    if array.ndim == 4 and array.shape[3] != 3:
        return f"array {array.shape}"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "values that are not finite"
    if not (np.isnan(spacing) | ((spacing > 0) & np.isfinite(spacing))).all():
        return f"spacing {scan.spacing}"
    if scan.affine is not None and not np.isfinite(np.concatenate(scan.affine)).all():
        return f"affine {scan.affine}"
    return ""


def _fault_of_voxels(scan, content: bytes, sample: Sample, original) -> str:
    """Compares voxels that are stored plainly, where only those were changed."""
    if sample.voxels is None or len(content) != len(sample.content):
        return ""
    offset, dtype = sample.voxels
    end = offset + original.array.size * np.dtype(dtype).itemsize
    kept = content[:offset] == sample.content[:offset] and content[end:] == sample.content[end:]
    if not kept:
        return ""
    stored = np.frombuffer(content[offset:end], dtype).reshape(original.array.shape)
    if scan.affine != original.affine or not np.array_equal(scan.array, stored):
        return "other voxels than the file's"
    return ""


def address_space(field: str) -> int:
    """Returns the size of this process's address space, "VmSize" or "VmPeak", in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) << 10


def work(first: int, step: int, stop: int) -> None:
    """Reads every `step`-th mutation from `first` on; prints its number before, its fault after.

    After a file that took too much memory the process starts itself again: the peak would hide the
    next one.
    """
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    known = samples()
    answers = os.fdopen(os.dup(1), "w")
    number = stop
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile() as noise:
        folder = Path(name)
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)  # of C libraries too
        originals = {
            label: read_scan(write(sample, sample.content, folder))
            for label, sample in known.items()
            if re.search(os.environ.get("FUZZ_NAMES", ""), label)
        }
        import cv2  # noqa: F401 (readers import it when they need it)

        limit = address_space("VmPeak") + (2 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for number in range(first, stop, step):
            label, sample, content, done = damaged(number, known)
            if label not in originals:
                continue
            path = write(sample, content, folder)
            print(f"> {number} {label}: {done}", file=answers, flush=True)
            noise.seek(0)
            noise.truncate()
            with _Watch(originals[label].array.nbytes + len(content)) as watch:
                found = fault(path, content, sample, originals[label], as_mask=number % 5 == 4)
            noise.seek(0)
            found = found or watch.fault or (said := noise.read()) and f"printed {said[:200]!r}"
            if found:
                print(f"! {json.dumps(found)}", file=answers, flush=True)
            if watch.is_bloated:
                break
        else:
            number = stop
    if number == stop:
        print(f"> {stop} end", file=answers, flush=True)
        return
    os.dup2(answers.fileno(), 1)
    command = [sys.executable, "-m", "tests.io.fuzz", *map(str, (number + step, step, stop))]
    os.execv(sys.executable, command)


class _Watch:
    """Measures time and address space while a file of so many bytes is read."""

    fault, is_bloated = "", False

    def __init__(self, honest: int):
        self._honest = honest

    def __enter__(self) -> "_Watch":
        self._size, self._peak = address_space("VmSize"), address_space("VmPeak")
        self._start = time.monotonic()
        return self

    def __exit__(self, *_) -> None:
        taken, peak = time.monotonic() - self._start, address_space("VmPeak")
        if taken > SECONDS:
            self.fault = f"took {taken:.1f} s"
        if peak > self._peak and peak - self._size > TIMES * self._honest + SLACK:
            self.fault = f"took {(peak - self._size) >> 20} MB for {self._honest >> 10} KB"
            self.is_bloated = True


class _Child:
    """A process at work on its share of the mutations, and what it said last."""

    def __init__(self, first: int, step: int, stop: int):
        command = [sys.executable, "-m", "tests.io.fuzz", *map(str, (first, step, stop))]
        environment = {**os.environ, **ENVIRONMENT}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        self.current, self.since, self._rest = "", time.monotonic(), b""

    def lines(self) -> list[str]:
        """Returns the whole lines that have come; [] at the end."""
        while (data := os.read(self.process.stdout.fileno(), 1 << 16)) and b"\n" not in data:
            self._rest += data
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.since = time.monotonic()
        return [line.decode() for line in lines]

    def hangs(self) -> bool:
        limit = 3 * SECONDS if self.current else 120  # imports come before the first
        return time.monotonic() - self.since > limit


def run(count: int, processes: int, begin: int = 0) -> list[str]:
    """Reads `count` mutations in child processes; returns a line for each fault.

    A child that crashes or hangs is a fault of its mutation; another one goes on after it.
    """
    faults: list[str] = []
    stop, selector = begin + count, selectors.DefaultSelector()

    def start(first: int) -> None:
        child = _Child(first, processes, stop)
        selector.register(child.process.stdout, selectors.EVENT_READ, child)

    def end(child: _Child, why: str) -> None:
        selector.unregister(child.process.stdout)
        child.process.stdout.close()
        if child.current == f"{stop} end":
            return
        if not child.current:
            raise RuntimeError(f"a child {why} before it read any damaged file")
        faults.append(f"{child.current}: {why}")
        start(int(child.current.split()[0]) + processes)

    for first in range(begin, begin + min(processes, count)):
        start(first)
    while selector.get_map():
        for key, _ in selector.select(timeout=1):
            lines = key.data.lines()
            for line in lines:
                if line.startswith("> "):
                    key.data.current = line[2:]
                else:
                    faults.append(f"{key.data.current}: {json.loads(line[2:])}")
            if not lines:
                end(key.data, f"ended with status {key.data.process.wait()}")
        for child in [key.data for key in selector.get_map().values()]:
            if child.hangs():
                child.process.kill()
                child.process.wait()
                end(child, "hung")
    return faults


def _show(number: int) -> None:
    known = samples()
    label, sample, content, done = damaged(number, known)
    with tempfile.TemporaryDirectory() as folder:
        original = read_scan(write(sample, sample.content, Path(folder)))
    path = write(sample, content, Path.cwd() / f"mutation-{number}")
    print(f"{path} ({label}: {done})", flush=True)
    print(fault(path, content, sample, original, number % 5 == 4) or "no fault")
    print(read_scan(path))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        _show(int(sys.argv[1]))
    else:
        work(*map(int, sys.argv[1:]))
