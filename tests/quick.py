"""Compiler flags for tests: most programs of a test compile for longer than they run.

`make test` compiles with them, `make test-parity` and `make bench` as users do.
"""

import importlib.metadata

_FLAGS = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}
# From 0.11 on jaxlib may not know the second flag, and ends where it does not.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) >= (0, 11):
    del _FLAGS["xla_cpu_use_fusion_emitters"]
XLA_FLAGS = " ".join(f"--{name}={value}" for name, value in _FLAGS.items())
