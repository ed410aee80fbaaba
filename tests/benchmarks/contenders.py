"""Contenders of invented rows; their worker processes import this module by name."""

import time

import numpy as np

from benchmarks.harness import Work


def sleeper(seconds: float, value: float = 1.0) -> Work:
    def run(index):
        time.sleep(seconds)
        return np.array([value, 2.0])

    return Work(run, operations=4e9)


def dies() -> Work:
    raise RuntimeError("no such library")
