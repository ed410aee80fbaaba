"""Functions that the launchers share: the command of a process, checks of flags, submission."""

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags

from medsam_jax.cli import config_file
from medsam_jax.errors import UserError

# The module of each command. All of them but `build` share their work among processes.
COMMANDS = {
    "train": "medsam_jax.train",
    "embed": "medsam_jax.train",
    "evaluate": "medsam_jax.evaluate",
    "predict": "medsam_jax.predict",
    "build": "datasets.build",
}
ARGUMENTS = 10_000  # most arguments after `--`

_COMMAND = flags.DEFINE_enum(
    "command",
    "train",
    list(COMMANDS),
    "What to start. train and embed, which fills config.embedding_cache, take --config, --data_dir "
    "and --set; the flags of the others follow after a lone --.",
)
_CONFIG = flags.DEFINE_string("config", None, "Recipe: a file, or the name of one in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "As of medsam_jax.train, on a disk all hosts see.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data set, on a disk all hosts see.")
_SET = flags.DEFINE_multi_string("set", [], "NAME=VALUE of a further config field; repeatable.")
_PYTHON = flags.DEFINE_string("python", "python", "Interpreter on the hosts.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be submitted, and stop.")

_OF_TRAINING = ("config", "workdir", "data_dir")


def command_name() -> str:
    """Returns the key of `COMMANDS` that is started."""
    return _COMMAND.value


def command(arguments: Sequence[str], devices: int, place: Sequence[str] = ()) -> list[str]:
    """Returns the command of a process; checks its flags, and its configuration for `devices`.

    Args:
      arguments: flags of evaluate, predict or build.
      devices: number on all hosts together.
      place: flags that give a process its rank and the address of process 0.

    Raises:
      UserError: wrong or missing flags, an unknown config or field, or a batch size that the
        devices do not divide.
    """
    name = _COMMAND.value
    start = [_PYTHON.value, "-m", COMMANDS[name]]
    if name not in ("train", "embed"):
        for flag in (*_OF_TRAINING, "set"):
            if flags.FLAGS[flag].value:
                raise UserError(f"--{flag}: for train and embed; give flags of {name} after --")
        _check_flags(name, arguments)
        return [*start, *arguments, *place]
    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; change config fields with --set")
    needed = [flag for flag in _OF_TRAINING if (name, flag) != ("embed", "workdir")]
    if missing := [f"--{flag}" for flag in needed if flags.FLAGS[flag].value is None]:
        raise UserError(f"command line: {', '.join(sorted(missing))} missing; see --help")
    fields = [f"data_dir={_DATA_DIR.value}", *_SET.value]
    _check(_read_config(Path(config_file(_CONFIG.value))), fields, devices)
    start += ["--config", _CONFIG.value]
    start += ["--embed_only"] if name == "embed" else ["--workdir", _WORKDIR.value]
    return [*start, *(f"--config.{field}" for field in fields), *place]


def dry_run() -> bool:
    """Returns whether to print what would be started, and stop."""
    return _DRY_RUN.value


def check_one_process(flag: str) -> None:
    """Raises an error where several of `flag` would start `build` more than once."""
    if _COMMAND.value == "build" and flags.FLAGS[flag].value > 1:
        raise UserError(
            f"--{flag}: {flags.FLAGS[flag].value} given; build is one process, which spreads its "
            "work by --num_workers or the runner of Beam: give 1"
        )


def _check_flags(name: str, arguments: Sequence[str]) -> None:
    check = [sys.executable, "-m", COMMANDS[name], *arguments, "--only_check_args"]
    run = subprocess.run(check, capture_output=True, text=True)
    if run.returncode:
        line = run.stderr.strip().splitlines()[-1].removeprefix("error: command line: ")
        raise UserError(f"{name}: {line}; give its flags after --")


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
