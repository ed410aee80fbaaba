"""Functions that the launchers share: training command, checks of flags, submission."""

import importlib.util
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags

from medsam_jax.cli import config_file
from medsam_jax.errors import UserError

_CONFIG = flags.DEFINE_string("config", None, "Recipe: a file, or the name of one in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "As of medsam_jax.train, on a disk all hosts see.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data set, on a disk all hosts see.")
_SET = flags.DEFINE_multi_string("set", [], "NAME=VALUE of a further config field; repeatable.")
_PYTHON = flags.DEFINE_string("python", "python", "Interpreter on the hosts.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be submitted, and stop.")

REQUIRED = ("config", "workdir", "data_dir")


def training_command(devices: int, more: Sequence[str]) -> list[str]:
    """Returns the `python -m medsam_jax.train` command; checks its configuration for `devices`.

    Args:
      devices: number on all hosts together.
      more: flags that give a process its rank and the address of process 0.

    Raises:
      UserError: unknown recipe or field, or a batch size that the devices do not divide.
    """
    fields = [f"data_dir={_DATA_DIR.value}", *_SET.value]
    _check(_read_config(Path(config_file(_CONFIG.value))), fields, devices)
    command = [_PYTHON.value, "-m", "medsam_jax.train", "--config", _CONFIG.value]
    command += ["--workdir", _WORKDIR.value, *(f"--config.{field}" for field in fields)]
    return [*command, *more]


def _read_config(path: Path) -> ml_collections.ConfigDict:
    if not path.is_file():
        raise UserError(f"--config: {path} is not a file; start in the repository's root")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _check(config: ml_collections.ConfigDict, fields: Sequence[str], devices: int) -> None:
    for field in fields:
        name, equals, value = field.partition("=")
        holder, _, leaf = name.rpartition(".")
        place = config[holder] if holder and holder in config else config
        if not equals or leaf not in place:
            raise UserError(f"--set: {field!r} names no field of {_CONFIG.value}; give NAME=VALUE")
        if isinstance(place[leaf], int) and value.isdigit():
            place[leaf] = int(value)
    sizes = {
        "batch_size / accumulation_steps": config.batch_size // config.accumulation_steps,
        "eval_batch_size": config.eval_batch_size,
    }
    for name, size in sizes.items():
        if size % devices:
            raise UserError(
                f"config.{name}: {size} is not a multiple of the {devices} devices; change it "
                "with --set"
            )


def check_positive(*names: str) -> None:
    """Raises an error for flags below 1."""
    for name in names:
        if flags.FLAGS[name].value < 1:
            raise UserError(f"--{name}: {flags.FLAGS[name].value} given; it must be at least 1")


def submit(command: Sequence[str], text: str = "") -> None:
    """Runs `command` with `text` on its standard input; with --dry_run only prints both.

    Raises:
      UserError: the command is not installed or fails.
    """
    if _DRY_RUN.value:
        print(f"# would run: {shlex.join(command)}" + (", with this input:" if text else ""))
        print(text, end="")
        return
    try:
        status = subprocess.run(command, input=text, text=True).returncode
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found on this machine; see --dry_run") from None
    if status:
        raise UserError(f"{shlex.join(command[:3])} ...: ended with status {status}")
