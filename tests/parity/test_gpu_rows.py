"""The benchmarks' rows for a GPU, run on a CPU with a small encoder: both sides agree."""

import pytest

from benchmarks.gpu import row
from benchmarks.harness import measure

EAGER = {"backend": "eager"}  # the C++ that torch.compile would write takes minutes to compile


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("encoder", {}), ("step", {"trained": "full"}), ("step", {"trained": "decoder"})],
)
def test_rows_run(function, arguments):
    tried = row("a row", function, 1.0, peer=EAGER, encoder="small", batch=2, **arguments)
    ours, theirs = measure(tried, rounds=1, seconds=1, cores=2)
    assert ours.operations > 0
    assert theirs.difference <= tried.tolerance
    assert len(ours.seconds) == len(theirs.seconds) == 1
