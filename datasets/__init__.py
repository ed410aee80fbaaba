"""TFDS builders by folder and the commands that build and inspect them.

In a clone the package is `datasets`; setup.py installs it as `medsam_jax.datasets`, so that it does
not hide another distribution's `datasets`. Imports within it are relative, to hold for both names.
"""
