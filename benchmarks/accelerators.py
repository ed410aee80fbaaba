"""Compiles this library's programs for TPUs and GPUs on any machine, and counts their work.

    make accelerators                                      # all rows
    make accelerators ONLY="encoder lite_medsam" CHIPS=v5e,h100
    python -m benchmarks.accelerators --program "train medsam_v2, batch 4" --chips v5e

`--list` prints the rows. Each program is compiled in a process of its own, so a compiler that
crashes, or takes longer than `--limit`, gives a row with the reason. Rows are kept in
`docs/accelerators.json`; a run replaces the rows that it compiles, and writes the tables of
docs/performance.md and docs/training.md. The exit status is 1 if a step does not fit its device.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags

from benchmarks import accelerator_tables as tables
from benchmarks import targets
from medsam_jax.cli import run
from medsam_jax.errors import UserError

_ONLY = flags.DEFINE_string("only", None, "Only rows whose name contains this.")
_CHIPS = flags.DEFINE_list("chips", None, "Only these targets, such as v5e,v5e-16,h100.")
_PROGRAM = flags.DEFINE_string("program", None, "One program by name, listed or not, on --chips.")
_LIST = flags.DEFINE_bool("list", False, "Print the names of the rows and end.")
_MISSING = flags.DEFINE_bool("missing", False, "Only rows that are not in the results yet.")
_LIMIT = flags.DEFINE_integer("limit", 600, "Seconds a program may take.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", "docs/accelerators.json", "Results; rows are replaced.")
_TEXT = flags.DEFINE_string("text", None, "Folder for the optimised programs' texts.")


def main(argv) -> None:
    """Compiles the chosen rows one after another."""
    del argv
    results = Path(_RESULTS.value)
    rows = _chosen(results)
    if _LIST.value:
        print("\n".join(f"{program} on {target}" for program, target in rows))
        return
    misfits = []
    for program, target in rows:
        found = compile_apart(program, target, _LIMIT.value, _TEXT.value)
        tables.merge(results, found)
        print(tables.summary(found), flush=True)
        if found["error"] and program.startswith(("train", "eval")):
            misfits.append(f"{program} on {target}: {found['error']}")
    if results.resolve().parent == tables.DOCS:
        tables.update(results)
    if misfits:
        raise UserError(f"{len(misfits)} of {len(rows)} rows failed: {'; '.join(misfits)}")


def _chosen(results: Path) -> list[tuple[str, str]]:
    targets.prepare()
    from benchmarks import programs

    chips = _CHIPS.value or []
    for name in chips:
        try:
            targets.Target.named(name)
        except (KeyError, ValueError):
            raise UserError(
                f"--chips={name}: no such target; use {', '.join(targets.CHIPS)}, or 4 or 16 TPUs "
                "as v5e-16"
            ) from None
    if _PROGRAM.value:
        if not chips:
            raise UserError("--program: give --chips too, such as --chips=v5e")
        return [(_PROGRAM.value, chip) for chip in chips]
    rows = [row for row in programs.names() if not chips or row[1] in chips]
    rows = [row for row in rows if _ONLY.value is None or _ONLY.value in " on ".join(row)]
    if _MISSING.value:
        done = {(row["program"], row["target"]) for row in tables.read(results)}
        rows = [row for row in rows if row not in done]
    if not rows and not _MISSING.value:
        raise UserError(f"--only={_ONLY.value}: no such row; --list prints all")
    return rows


def compile_apart(
    program: str, target: str, limit: float, text: str | None = None
) -> dict[str, Any]:
    """Compiles a program in a process of its own and returns its row.

    `error` is None, or the reason why there are no counts.
    """
    command = [sys.executable, "-m", "benchmarks.accelerators", "--child", program, target]
    row: dict[str, Any] = {"program": program, "target": target, "error": None}
    try:
        answer = subprocess.run(
            [*command, text or ""], capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return row | {"error": f"not compiled after {limit:g} s"}
    if answer.returncode == 0:
        return row | json.loads(answer.stdout.splitlines()[-1])
    return row | {"error": reason(answer.stderr, answer.returncode)}


def reason(stderr: str, status: int) -> str:
    """Returns one line that says why a compiler gave up."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for mark in ("RESOURCE_EXHAUSTED", "Error", "error:", "Check failed"):
        for line in reversed(lines):
            if mark in line:
                return line[line.index(mark) if mark.isupper() else 0 :][:300]
    return f"ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")


def counted(program: str, target_name: str, text_folder: str = "") -> dict[str, Any]:
    """Compiles a program in this process and returns its counts as JSON types."""
    import jax

    from benchmarks import hlo, programs
    from benchmarks.counting import operations

    target = targets.Target.named(target_name)
    built = programs.build(program, target)
    start = time.perf_counter()
    traced = built.function.trace(*built.arguments)
    lowered = traced.lower(lowering_platforms=(target.chip.platform,))
    lower_seconds = time.perf_counter() - start
    start, cpu = time.perf_counter(), time.process_time()
    compiled = lowered.compile(compiler_options=dict(target.compiler_options) or None)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    text = compiled.as_text()
    if text_folder:
        name = f"{program} on {target.name}.txt".replace(",", "").replace(" ", "_")
        Path(text_folder, name).write_text(text, encoding="utf-8")
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    row = dataclasses.asdict(hlo.count(text))
    row |= {
        "operations": {k: v / target.devices for k, v in operations(traced.jaxpr).items()},
        "arguments": arguments,
        "temporaries": temporaries,
        "peak": arguments + temporaries + outputs,
        "lower_seconds": lower_seconds,
        "compile_seconds": seconds,
        "compile_cpu_seconds": cpu,
        "jax": jax.__version__,
    }
    row["times"] = times(row, target.chip)
    if row["peak"] > target.chip.memory:
        have = target.chip.memory / targets.GIB
        row["error"] = f"needs {row['peak'] / targets.GIB:.1f} GiB, the device has {have:.1f}"
    return row


def times(row: dict[str, Any], chip: targets.Chip) -> dict[str, float]:
    """Returns the least seconds on a device by what they are spent on; the longest binds."""
    return {
        "products": sum(count / chip.rates[kind] for kind, count in row["operations"].items()),
        "memory": row["traffic"] / chip.bandwidth,
        "launches": row["kernels"] * chip.launch,
        "links": row["collective_bytes"] / chip.link_bandwidth,
    }


def child(program: str, target: str, text_folder: str) -> None:
    """Prints the counts of a program as the last line."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print to the other one
    os.dup2(2, 1)
    targets.prepare()
    print(json.dumps(counted(program, target, text_folder)), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5])
    else:
        run(main)
