"""TFDS builder of `medical_slices`: slices of scans with label maps, in ArrayRecord files.

Runs without TensorFlow: images are handed over as PNG bytes, and shards are written one by one,
because TFDS's shuffling writer needs TensorFlow as soon as a data set outgrows its memory buffer.
The input pipeline shuffles by random access, so the stored order does not matter; it is the same
for any number of workers.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import split_builder as split_builder_lib
from tensorflow_datasets.core import splits as splits_lib
from tensorflow_datasets.core import writer as writer_lib
from tensorflow_datasets.proto import tf_example_pb2

from medsam_jax.data.manifest import SPLITS, Case
from medsam_jax.data.recipes import RECIPES, get_recipe

from . import slices

SHARD_BYTES = 128 << 20  # a shard's examples are held in memory while it is written
Examples = list[tuple[str, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Input of a build after every row was checked. Picklable, for Beam's workers."""

    cases: tuple[Case, ...]
    slices: tuple[int, ...]  # stored slices of each case
    tables: dict[str, dict[int, int]]  # task -> original label -> stored id
    options: slices.Options
    report_dir: str

    def shards(self, split: str) -> list[tuple[Case, ...]]:
        """The cases of each shard of a split, in manifest order; depends on nothing else."""
        bytes_per_slice = get_recipe(self.options.recipe).size ** 2 // 3  # PNG of a CT slice
        shards: list[list[Case]] = []
        room = 0
        for case, count in zip(self.cases, self.slices, strict=True):
            if case.split != split or count == 0:
                continue
            if room <= 0:
                shards.append([])
                room = SHARD_BYTES
            shards[-1].append(case)
            room -= count * bytes_per_slice
        return [tuple(shard) for shard in shards]

    def ordered_cases(self) -> list[Case]:
        """Every case with slices, in the order in which shards are written."""
        return [case for split in SPLITS for shard in self.shards(split) for case in shard]


def build_case(plan: Plan, case: Case) -> Examples:
    """The examples of a case; its report is written to the plan's report folder."""
    examples, report = slices.case_examples(case, plan.tables[case.task], plan.options)
    path = pathlib.Path(plan.report_dir) / f"row-{case.row:08d}.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    return examples


def _shard_examples(build: Callable[[Case], Examples], cases: Iterable[Case]) -> Iterator[Any]:
    for case in cases:
        yield from build(case)


class _CanonicalWriter(writer_lib.ExampleWriter):
    """Writes the map inside each `tf.Example` in sorted order; protobuf's own changes by run."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        canonical = (
            (key, tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True))
            for key, data in examples
        )
        return super().write(path, canonical)


class _DatasetInfo(tfds.core.DatasetInfo):
    """TFDS's description of a data set that no server has a copy of."""

    def initialize_from_bucket(self) -> None:
        """Does nothing; TFDS would ask the server, and leave an empty temporary folder."""


class Builder(tfds.core.ShardBasedBuilder):
    """Image slices with label maps; training draws boxes from the masks."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent  # TFDS would derive it from the package's name
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, description=f"MedSAM protocol {name!r}")
        for name in RECIPES
    ]

    def __init__(
        self, *, plan: Plan | None = None, build: Callable[[Case], Examples] | None = None, **kwargs
    ):
        """Args: `plan` of a build, and `build` to make a case's examples (`build_case` itself)."""
        super().__init__(**kwargs)
        self._plan = plan
        self._build = build or (functools.partial(build_case, plan) if plan else None)

    def _info(self) -> tfds.core.DatasetInfo:
        size = get_recipe(self.builder_config.name).size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "mask": tfds.features.Image(shape=(size, size, 1), encoding_format="png"),
            "case_id": tfds.features.Text(),
            "task": tfds.features.Text(),
            "modality": tfds.features.Text(),
            "slice_index": np.int32,
            "spacing": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            "original_shape": tfds.features.Tensor(shape=(2,), dtype=np.int32),
            "valid_shape": tfds.features.Tensor(shape=(2,), dtype=np.int32),
        }
        return _DatasetInfo(
            builder=self,
            description="Slices of medical scans with label maps; see medical_slices.json.",
            features=tfds.features.FeaturesDict(features),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Any]]]:
        del dl_manager  # the files are the user's own
        return {
            split: [
                functools.partial(_shard_examples, self._build, cases)
                for cases in self._plan.shards(split)
            ]
            for split in SPLITS
            if self._plan.shards(split)
        }

    def _example_writer(self) -> writer_lib.ExampleWriter:
        return _CanonicalWriter(file_format=self.info.file_format)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Does as TFDS's, with a `SplitBuilder` for each split.

        TFDS keeps one, whose Beam pipeline would run the earlier splits again.
        """
        config = download_config or tfds.download.DownloadConfig()
        infos = []
        for split, shards in self._shard_iterators_per_split(dl_manager).items():
            builder = split_builder_lib.SplitBuilder(
                split_dict=self.info.splits,
                features=self.info.features,
                dataset_size=self.info.dataset_size,
                beam_options=config.beam_options,
                beam_runner=config.beam_runner,
                example_writer=self._example_writer(),
                ignore_duplicates=None,
                max_examples_per_split=None,
                shard_config=None,
            )
            future = builder.submit_shard_based_generation(
                split_name=split,
                example_gen_per_shard=shards,
                filename_template=self._get_filename_template(split_name=split),
            )
            infos.append(future.result())
        self.info.set_splits(splits_lib.SplitDict(infos))
