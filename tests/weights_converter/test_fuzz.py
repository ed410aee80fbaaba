"""Thousands of damaged files: each is read, or refused by our own error; nothing else happens."""

import contextlib
import encodings.cp437  # noqa: F401  zipfile imports it when it meets an odd name
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from medsam_jax.errors import UserError
from medsam_jax.models.sam import SamConfig
from weights_converter.conversion import state_dict_from_file
from weights_converter.readers import read_file
from weights_converter.safetensors_io import write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "pth"
MUTATIONS = 2_600  # of each of the four files
SECONDS = 120  # for all of one file: about 5 are needed
WATCHED = {
    "compile",
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "pickle.find_class",
    "socket.connect",
    "subprocess.Popen",
}
_events: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple) -> None:
    if _watching and (event in WATCHED or (event == "open" and _writes(arguments))):
        _events.append(f"{event} {arguments!r:.200}")


def _writes(arguments: tuple) -> bool:
    return isinstance(arguments[1], str) and set(arguments[1]) & set("wax+") != set()


sys.addaudithook(_hook)  # cannot be removed; it sleeps while `_watching` is false


def _mutate(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place, size = int(rng.integers(len(mutated) + 1)), int(rng.integers(1, 32))
        match rng.integers(7):
            case 0 | 1:  # flip one bit
                mutated[place % len(mutated)] ^= 1 << int(rng.integers(8))
            case 2:  # another byte: another opcode
                mutated[place % len(mutated)] = int(rng.integers(256))
            case 3:  # a number gets enormous
                mutated[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff"])
            case 4:  # something is missing
                del mutated[place : place + size]
            case 5:  # something from elsewhere
                start = int(rng.integers(len(other)))
                mutated[place:place] = other[start : start + size]
            case 6:  # the file breaks off
                del mutated[max(1, len(mutated) - size * 20) :]
        if not mutated:
            return data[:1]
    return bytes(mutated)


@pytest.fixture
def safetensors_bytes(tmp_path, lazily) -> bytes:
    path = tmp_path / "a.safetensors"
    arrays = {"mask_decoder.iou_token.weight": np.ones((1, 32), np.float32), "b": np.arange(3)}
    write_safetensors(str(path), lazily(arrays))
    return path.read_bytes()


@pytest.mark.usefixtures("unchecked")  # checks take most of the time of ten thousand readings
@pytest.mark.parametrize(
    "name", ["no_checksums.pth", "legacy.pth", "training_legacy.pth", "safetensors"]
)
def test_no_mutation_does_more_than_raise_our_error(tmp_path, safetensors_bytes, name):
    # Without checksums, so that the mutations reach the pickle.
    original = safetensors_bytes if name == "safetensors" else (GOLDEN / name).read_bytes()
    other = (GOLDEN / "training_legacy.pth").read_bytes()
    rng = np.random.default_rng(0)
    path, config = tmp_path / "mutated", SamConfig.tiny()
    outcomes, unnamed = {True: 0, False: 0}, []

    def attempt(data: bytes) -> bool:
        path.write_bytes(data)
        global _watching
        _watching = True
        try:
            file = read_file(str(path))
            for tensor in file.tensors.values():
                tensor.read()
            if rng.integers(20) == 0:
                state_dict_from_file(file, config)
            return True
        except UserError as error:
            unnamed.extend([str(error)] * (not str(error).startswith(str(path))))
            return False
        finally:
            _watching = False

    def give_up(*_):
        raise TimeoutError(f"a mutation of {name} hangs")

    assert attempt(original)
    with contextlib.suppress(UserError):  # the model's own names, which are made once
        state_dict_from_file(read_file(str(path)), config)
    _events.clear()  # imports of the first reading
    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        for _ in range(MUTATIONS):
            outcomes[attempt(_mutate(original, other, rng))] += 1
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert _events == []
    assert unnamed == [], "every message begins with the file"
    assert outcomes[False] > MUTATIONS / 4, "most damage is noticed"
    assert outcomes[True] > MUTATIONS / 100, "some mutations get past the first checks"
