"""Damaged files of every format: each is a right scan or one line; none crashes, hangs or bloats.

`make fuzz` reads $FUZZ_MUTATIONS of them, 20,000 by default; this file a sample.
"""

import os

from medsam_jax.io.scans import read_scan
from tests.io import fuzz
from tests.io.mutations import samples

SAMPLE = 600


def test_undamaged_samples_are_read(tmp_path):
    for label, sample in samples().items():
        folder = tmp_path / label.replace("/", "_")
        scan = read_scan(fuzz.write(sample, sample.content, folder))
        assert fuzz._fault_of_voxels(scan, sample.content, sample, scan) == ""
        repacked = sample.pack(sample.unpack(sample.content))
        again = read_scan(fuzz.write(sample, repacked, folder))
        assert (again.array == scan.array).all(), label


def test_mutations_are_the_same_in_every_process():
    first, second = samples(), samples()
    for number in range(len(first)):
        assert fuzz.damaged(number, first)[2:] == fuzz.damaged(number, second)[2:]


def test_damaged_files():
    count = int(os.environ.get("FUZZ_MUTATIONS", SAMPLE))
    faults = fuzz.run(count, processes=min(os.cpu_count() or 1, 2 if count <= SAMPLE else 16))
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults[:60])
