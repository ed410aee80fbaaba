"""Timings of this library and its peers side by side: `python -m benchmarks.run --help`."""
