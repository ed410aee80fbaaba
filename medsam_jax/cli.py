"""Command lines: one-line errors, Ctrl-C, and progress of long loops."""

import contextlib
import gc
import grp
import importlib.util
import logging
import multiprocessing
import os
import pwd
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

from absl import app, flags
from tqdm import tqdm

import medsam_jax
from medsam_jax.errors import UserError, check_name, disk_space

T = TypeVar("T")

# Called before a main that failed ends the process; the others of a run over several are told so.
before_failure: list[Callable[[], None]] = []


def progress(iterable: Iterable[T], desc: str, total: int | None = None) -> Iterator[T]:
    """Yields the items of `iterable`, drawing a bar with rate and time left on stderr.

    Without a terminal (a job's log file) it prints a line every ten seconds instead of redrawing.
    Log records get lines of their own.
    """
    terminal = sys.stderr.isatty()
    bar = tqdm(
        iterable,
        desc=desc,
        total=total,
        mininterval=0.1 if terminal else 10.0,
        dynamic_ncols=True,
        file=sys.stderr if terminal else _Lines(sys.stderr),
    )
    root = logging.getLogger()
    handlers = root.handlers
    if terminal and handlers:
        root.handlers = [_AboveBars(handlers)]
    try:
        yield from bar
    finally:
        root.handlers = handlers


class _AboveBars(logging.Handler):
    """Passes records on to other handlers, with the bars off the screen meanwhile."""

    def __init__(self, handlers: Sequence[logging.Handler]):
        super().__init__()
        self._handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            for handler in self._handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Says on a terminal, until the end, that libraries are loaded, which takes a second or two."""
    is_shown = sys.stderr.isatty()
    if is_shown:
        print("loading libraries", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # erases the line


def run(main: Callable[[Sequence[str]], None], positional: int = 0) -> None:
    """Runs an absl `main`; a `UserError` becomes one line on stderr and exit status 1, Ctrl-C 130.

    So does a file or folder that the system refuses. Any other exception keeps its traceback: it
    is a defect of ours, not of the input. Without a reader of stdout or stderr the work goes on.
    More than `positional` arguments that are no flags are an error. `--help` and `--version` print
    and end with status 0.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1 + positional:
            _fail(f"unexpected argument {argv[1 + positional]!r}; see --help")
        try:
            for argument in (*sys.argv[1:], os.getcwd()):
                check_name(argument)
            with disk_space("output"):
                main(argv)
                sys.stdout.flush()
        except UserError as error:
            _fail(str(error))
        except OSError as error:
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}; correct the path or its permissions")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            leave_at_once(130)  # what shells report for SIGINT
        except Exception:
            if not before_failure:
                raise
            _run_before_failure()
            traceback.print_exc()
            leave_at_once(1)

    _mend_streams()
    _name_unknown_users()
    flags.DEFINE_flag(_VersionFlag(), module_name=sys.argv[0])  # `--help` lists it, as main's own
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _interrupt)
    app.run(guarded, flags_parser=_parse_flags)


def config_file(name: str) -> str:
    """Returns `name`, or the path of the package's config of that name if there is no such file."""
    if not os.path.exists(name) and name.isidentifier():
        config = importlib.util.find_spec(f"medsam_jax.configs.{name}")
        return config.origin if config else name
    return name


class _VersionFlag(flags.BooleanFlag):
    """`--version`: prints the package's version and ends the program."""

    def __init__(self):
        super().__init__("version", False, "Print the version and stop.")

    def parse(self, arg: Any) -> None:
        if self._parse(arg):
            print(f"medsam_jax {medsam_jax.__version__}")
            sys.exit(0)


def _fail(message: str) -> NoReturn:
    """Prints one line on stderr, in which names with line breaks are escaped; exits with 1."""
    _run_before_failure()
    for argument in sys.argv[1:]:
        name = argument.partition("=")[2] if argument.startswith("-") else argument
        if not name.isprintable():
            message = message.replace(name, repr(name)[1:-1])
    print(f"error: {message}", file=sys.stderr)
    if before_failure:
        leave_at_once(1)  # at the interpreter's end jax would wait for the other processes
    sys.exit(1)


def _run_before_failure() -> None:
    for call in before_failure:
        call()


class _Stream:
    """stdout or stderr; what is written after its reader has left is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        """Leads the stream to nowhere, with what it still holds."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class _Lines(_Stream):
    """A stream on which each state of a bar is a line of its own."""

    def write(self, text: str) -> int:
        if line := text.replace("\x1b[A", "").strip():  # bars within bars move the cursor up
            super().write(f"{line}\n")
        return len(text)


def _mend_streams() -> None:
    """Replaces stdout and stderr that are closed, and lets their readers leave early.

    A closed one also leaves its number to the next file that is opened, in which a library's
    messages would then end up.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        setattr(sys, name, _Stream(getattr(sys, name)))


def _name_unknown_users() -> None:
    """Gives a user or group without an entry, as in a container, its number as a name.

    TFDS and Orbax look up the owners of files, and end with a KeyError where one has no name.
    """
    known_user, known_group = pwd.getpwuid, grp.getgrgid

    def user(number: int) -> pwd.struct_passwd:
        try:
            return known_user(number)
        except KeyError:  # "~": such a user has no home directory
            return pwd.struct_passwd((str(number), "x", number, number, "", "~", ""))

    def group(number: int) -> grp.struct_group:
        try:
            return known_group(number)
        except KeyError:
            return grp.struct_group((str(number), "x", number, []))

    pwd.getpwuid, grp.getgrgid = user, group


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt; a moment later where the garbage collector would swallow it.

    jax has the collector call Python, and what is raised in there is printed and ignored: of 73
    interrupted predictions four went on.
    """
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in collecting:
            main = threading.main_thread().ident  # whose sleep the signal must end
            threading.Timer(0.01, signal.pthread_kill, [main, number]).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def leave_at_once(status: int) -> None:
    """Ends the process and its children, and does not take the interpreter apart.

    Beside threads of XLA that are still at work, that can end in a segmentation fault.
    """
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags, and turns what absl and ml_collections raise into one line."""
    try:
        arguments = flags.FLAGS(list(argv))
        for name in flags.FLAGS:
            # ml_collections raises for a config file that cannot be read when it is first used.
            getattr(flags.FLAGS[name].value, "lock", None)
        return arguments
    except SystemExit:
        sys.exit(0)  # absl ends with 1 after it has printed the help
    except (
        flags.Error,
        AttributeError,
        KeyError,
        SyntaxError,
        TypeError,
        ValueError,
        OSError,
    ) as error:
        message = _one_line(error, argv)
        remedy = "" if "; s" in message else "; see --help"
        print(f"error: command line: {message}{remedy}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception, argv: Sequence[str]) -> str:
    """Returns what is wrong with a command line; a field that a config lacks is named as given."""
    message = str(error).strip()
    if missing := re.findall(r"flag (--\w+)=None: .* must have a value", message):
        return f"{', '.join(sorted(missing))} missing"
    if missing := re.search(r"No such file or directory: (.*)", message):
        return f"{missing[1]}: no such file; start in the repository's root or give the whole path"
    hint = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    nearest, field = hint.groups() if hint else (None, None)
    if isinstance(error, KeyError | AttributeError) and re.fullmatch(r"[\"']*\w+[\"']*", message):
        field = message.strip("\"'")
    if field:
        given = next((one for one in argv if f".{field}" in one.partition("=")[0]), field)
        remedy = f"did you mean {nearest}?" if nearest else "see medsam_jax/training/config.py"
        return f"{given}: no field {field!r}; {remedy}"
    last = message.splitlines()[-1].strip() if message else type(error).__name__
    return re.sub(r"^(Configuration is not available .*load: )?(\[Errno \d+\] )?", "", last)
