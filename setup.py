"""Packages of a distribution; everything else is declared in pyproject.toml.

`datasets` and `configs` are top-level folders of a clone. A wheel has them in `medsam_jax`: a
top-level `datasets` would shadow another distribution of that name.
"""

from setuptools import find_packages, setup

MOVED = {"medsam_jax.datasets": "datasets", "medsam_jax.configs": "configs"}

setup(
    packages=sorted(
        {
            *find_packages(include=["medsam_jax*", "weights_converter*"]),
            *MOVED,
            *(f"medsam_jax.{name}" for name in find_packages(include=["datasets.*"])),
        }
    ),
    package_dir=MOVED,
)
