"""Checks every row, then builds the data set in a temporary folder and renames it into place."""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import io
import pathlib
import shlex
import shutil
from collections.abc import Iterator
from typing import Any

from absl import logging

from medsam_jax.cli import progress
from medsam_jax.data.datasets import find_dataset
from medsam_jax.data.manifest import (
    DATA_SET,
    Case,
    annotator_columns,
    read_manifest,
    write_manifest,
)
from medsam_jax.data.recipes import get_recipe
from medsam_jax.data.splits import SEEN
from medsam_jax.errors import UserError, disk_space
from medsam_jax.io.files import check_writable, plain_path, require_space, sha256_of
from medsam_jax.io.notes import summarise_notes

from . import card, metadata, slices
from .medical_slices_dataset_builder import (
    Builder,
    Examples,
    Plan,
    build_case,
)
from .workers import OrderedMap, workers

MANIFEST_FILE = "cases.csv"  # of a data set: the rows that it was built from, with their splits
_OLD = "old"  # in the temporary folder: the data set that is being replaced
_CACHED = " --config.embedding_cache=runs/embeddings"
_CONFIGS = {  # for a checkpoint of the recipe: its config and further flags
    "lite": ("lite_medsam", _CACHED),
    "v1": ("medsam_v1", _CACHED),
    "v2": ("medsam_v2", ""),
    "sam": ("medsam_v1", " --config.preprocessing=sam" + _CACHED),
}
_INSTALLED = __name__.startswith("medsam_jax.")  # or `datasets` of a clone
_TRAIN = (
    "medsam-jax train --config {}"
    if _INSTALLED
    else "python -m medsam_jax.train --config configs/{}.py"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """Arguments of a build, as the command line gives them."""

    manifest: str
    data_dir: str
    options: slices.Options
    name: str = DATA_SET  # enters the split hash
    num_workers: int = 1
    on_error: str = "fail"  # or "skip"
    overwrite: bool = False  # an earlier data set, once the new one is whole
    beam_runner: str | None = None
    beam_options: tuple[str, ...] = ()


def build(request: Request) -> pathlib.Path:
    """Builds `medical_slices` from a manifest; returns the folder of the finished data set.

    Raises:
      UserError: rows that cannot be used (one line each), a data set that is already there or
        under construction, too little disk space, nothing left to store.
    """
    final = pathlib.Path(request.data_dir) / "medical_slices" / request.options.recipe
    final = final / str(Builder.VERSION)
    check_writable(pathlib.Path(request.data_dir))
    if final.exists() and not request.overwrite:
        raise UserError(
            f"{final}: is a finished data set and is not overwritten; use it, choose another "
            "--data_dir, or give --overwrite to build it again"
        )
    with workers(request.num_workers) as ordered_map:
        return _build(request, final, ordered_map)


def _build(request: Request, final: pathlib.Path, ordered_map: OrderedMap) -> pathlib.Path:
    """Check, plan, write, describe, rename; see `build`."""
    good, problems, warnings = _checked_cases(request, ordered_map)
    with _temporary_folder(request, final) as temporary:
        plan = _plan(request.options, good, temporary / "reports")
        _check_disk(plan, temporary)
        built = _write_shards(request, plan, temporary, ordered_map)
        manifest = {"path": request.manifest, "sha256": sha256_of(request.manifest)}
        provenance = {"name": request.name, "manifest": manifest}
        record = metadata.collect(plan, good, problems, warnings, provenance)
        record = metadata.write(built, record)
        print("drawing the data card", flush=True)
        card.write(built, record)
        write_manifest(built / MANIFEST_FILE, (item.case.to_row() for item in good))
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(temporary / _OLD)
        built.rename(final)
    return final


def report(directory: pathlib.Path, data_dir: str) -> str:
    """Returns lines on a finished data set: its counts by split, its manifest, the next command."""
    info = find_dataset(directory)
    names = ("cases", "slices", "objects")
    lines = [f"{'split':<12}" + "".join(f"{name:>9}" for name in names)]
    for split, counts in info.counts.items():
        lines.append(f"{split:<12}" + "".join(f"{counts[name]:>9}" for name in names))
    if empty := [split for split, counts in info.counts.items() if not counts["slices"]]:
        lines.append(f"empty: {', '.join(empty)}; assign cases in the manifest's column split")
    lines.append(f"the cases with their splits: {directory / MANIFEST_FILE}")
    if set(empty) & set(SEEN):
        return "\n".join(lines)
    config, more = _CONFIGS[info.recipe]
    command = f"{_TRAIN.format(config)}{more} --workdir runs/first"
    lines.append(f"next: {command} --config.data_dir={shlex.quote(data_dir)}")
    return "\n".join(lines)


def _checked_cases(
    request: Request, ordered_map: OrderedMap
) -> tuple[list[slices.Checked], list[str], list[str]]:
    """Reads all files of all rows before any work: usable rows, skipped rows, warnings."""
    cases, problems = read_manifest(request.manifest, request.name)
    check = functools.partial(slices.check_case, options=request.options)
    checked = list(progress(ordered_map(check, cases), "checking cases", total=len(cases)))
    problems += [f"{request.manifest} {line}" for item in checked for line in item.problems]
    if problems and request.on_error == "fail":
        raise UserError(
            "\n".join(problems)
            + f"\n{request.manifest}: {len(problems)} rows cannot be used (above); correct them or "
            "leave them out with --on_error=skip"
        )
    good = [item for item in checked if not item.problems]
    warnings = [line for item in good for line in item.warnings] + _same_image_twice(good)
    if others := annotator_columns(request.manifest):
        warnings.append(
            f"{request.manifest}: {', '.join(others)}: further annotators are not stored, every "
            "slice has the objects of column mask; medsam_jax.evaluate --manifest scores them all"
        )
    for line in problems + warnings:
        print(f"warning: {line}", flush=True)
    for line in summarise_notes((item.case.row_name, item.notes) for item in good):
        print(f"note: {line}", flush=True)
    _check_content(request, good)
    return good, problems, warnings


def _same_image_twice(checked: list[slices.Checked]) -> list[str]:
    """One line for each image that appears under two case ids: it may be in two splits."""
    lines, first = [], {}
    for item in checked:
        other = first.setdefault(item.image_sha256, item.case)
        if other.case_id != item.case.case_id:
            where = "" if other.split == item.case.split else ", in different splits"
            lines.append(
                f"{item.case.row_name}: the same image as {other.row_name}{where}; give both rows "
                f"one case id ({item.case.image})"
            )
    return lines


def _check_content(request: Request, checked: list[slices.Checked]) -> None:
    if not sum(item.slices for item in checked):
        raise UserError(
            f"{request.manifest}: no slice is left after the rules of recipe "
            f"{request.options.recipe} for small objects and --labels; nothing was built"
        )
    present = {label for item in checked for label in item.labels}
    asked = {label for _, label, _ in request.options.labels} | (
        {request.options.instances} if request.options.instances is not None else set()
    )
    if asked - present:
        raise UserError(
            f"--labels/--instances: no mask has the labels {sorted(asked - present)}; "
            f"they have {sorted(present)[:20]}"
        )


def _plan(options: slices.Options, checked: list[slices.Checked], reports: pathlib.Path) -> Plan:
    """Numbers the labels of each task: as they are while they fit a byte, else from 1 on."""
    labels: dict[str, set[int]] = collections.defaultdict(set)
    for item in checked:
        labels[item.case.task].update(item.labels)
    tables = {}
    for task, present in labels.items():
        if len(present) > 255:
            raise UserError(f"task {task}: has {len(present)} labels, 255 fit; choose by --labels")
        fits = not present or max(present) <= 255
        tables[task] = {
            label: label if fits else rank + 1 for rank, label in enumerate(sorted(present))
        }
    reports.mkdir()
    return Plan(
        cases=tuple(item.case for item in checked),
        slices=tuple(item.slices for item in checked),
        tables=tables,
        options=options,
        report_dir=str(reports),
    )


@contextlib.contextmanager
def _temporary_folder(request: Request, final: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a hidden folder in the data directory and removes it at the end; one build at a time.

    A killed build leaves the folder; the next build removes it first, and puts a data set back
    that the kill caught between its two renames.
    """
    root = pathlib.Path(request.data_dir).absolute()  # Beam's workers may have another folder
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".building-medical_slices-{request.options.recipe}"
    with open(f"{temporary}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{root}: another build is writing here; wait for it") from None
        try:
            if (temporary / _OLD).exists() and not final.exists():
                (temporary / _OLD).rename(final)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            with disk_space(root):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            pathlib.Path(lock.name).unlink(missing_ok=True)


def _check_disk(plan: Plan, folder: pathlib.Path) -> None:
    """Raises UserError where the disk cannot hold the PNGs: about a third of a byte a pixel."""
    needed = sum(plan.slices) * get_recipe(plan.options.recipe).size ** 2 // 3
    require_space(folder.parent, needed, "slices")


def _write_shards(
    request: Request, plan: Plan, temporary: pathlib.Path, ordered_map: OrderedMap
) -> pathlib.Path:
    """Runs the TFDS builder, in worker processes or under Beam; returns the version folder."""
    import tensorflow_datasets as tfds

    config: dict[str, Any] = {}
    make, stream = None, iter(())
    if request.beam_runner:
        config = _beam_config(request)
    else:
        cases = plan.ordered_cases()
        results = ordered_map(functools.partial(build_case, plan), cases)
        stream = progress(results, "building cases", total=len(cases))

        def make(case: Case) -> Examples:
            del case  # the stream is in the order of the shards
            return next(stream)

    builder = Builder(
        plan=plan,
        build=make,
        data_dir=plain_path(temporary),
        config=request.options.recipe,
        file_format="array_record",
    )
    with _quiet_tfds(tfds):
        builder.download_and_prepare(
            download_dir=temporary / "downloads",
            download_config=tfds.download.DownloadConfig(**config),
        )
        for _ in stream:
            raise AssertionError("more cases were built than the shards took")
    built = temporary / pathlib.Path(builder.data_dir).relative_to(plain_path(temporary))
    for leftover in built.glob("*.shard_infos.json"):  # TFDS's notes under Beam
        leftover.unlink()
    return built


@contextlib.contextmanager
def _quiet_tfds(tfds: Any) -> Iterator[None]:
    """Hides TFDS's own bars and its messages, which name a folder that will be renamed."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.enable_progress_bar()


def _beam_config(request: Request) -> dict[str, Any]:
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--beam_runner: Apache Beam is not installed; pip install 'medsam_jax[beam]'"
        ) from None
    return {
        "beam_runner": request.beam_runner,
        "beam_options": PipelineOptions(list(request.beam_options)),
    }
