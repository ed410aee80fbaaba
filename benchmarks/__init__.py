"""Side-by-side timings of this library and its peers: `python -m benchmarks.run --help`."""
