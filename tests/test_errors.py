"""Tests of a failing command's message and exit status."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from medsam_jax import __version__
from medsam_jax.errors import UserError, check_name
from medsam_jax.io.files import require_space

ROOT = str(Path(__file__).parents[1])


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("UserError('f.csv: no rows; add one')", 1, "error: f.csv: no rows; add one"),
        ("KeyboardInterrupt", 130, "interrupted"),
        (
            "OSError(28, 'No space left on device')",
            1,
            "error: output: the disk is full; free some space and give the same command again",
        ),
    ],
)
def test_one_line_and_a_status(raised, status, line):
    program = f"""
from medsam_jax.cli import run
from medsam_jax.errors import UserError
def main(_):
    raise {raised}
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr.splitlines() == [line]


def test_ctrl_c_while_the_garbage_collector_is_at_work_is_not_lost():
    program = """
import gc, signal, time
from medsam_jax.cli import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
def main(_):
    asked = []
    def callback(phase, info):
        if not asked:
            asked.append(phase)
            signal.raise_signal(signal.SIGINT)
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(20)
    print("went on")
run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["interrupted"]


def test_ctrl_c_neither_waits_for_children_nor_takes_the_interpreter_apart():
    program = """
import atexit, multiprocessing, os, time
from medsam_jax.cli import run
def main(_):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print("what was printed", child.pid)
    atexit.register(os.abort)
    raise KeyboardInterrupt
run(main)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130
    assert done.stdout.startswith("what was printed")
    assert done.stderr.splitlines() == ["interrupted"]


def test_too_little_space_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    require_space(tmp_path, 2**29, "embeddings")
    with pytest.raises(UserError, match=r"embeddings need 1.00 GiB and 0.50 are free"):
        require_space(tmp_path, 2**30, "embeddings")


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_loading_is_said_on_a_terminal_and_erased(on_a_terminal):
    reader, writer = os.openpty() if on_a_terminal else os.pipe()
    program = "import medsam_jax.cli as c\nwith c.loading(): pass\nc.sys.stderr.write('done')"
    subprocess.run([sys.executable, "-c", program], stderr=writer, cwd=ROOT, check=True)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    assert said == ("loading libraries\r\x1b[Kdone" if on_a_terminal else "done")


PROGRAM = """
from medsam_jax.cli import progress, run
def main(_):
    for number in progress(range(3000), "numbers"):
        print("line", number)
    open("done", "w").close()
run(main)
"""


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "| true"])
def test_work_is_done_without_readers_of_its_output(tmp_path, redirection):
    line = f'"$0" -c "$1" {redirection}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line, sys.executable, PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def failing(code: str, *arguments: str | bytes, **environment: str) -> list[str]:
    """Returns the lines of a command with a flag --x; its status is not 0."""
    program = (
        "from absl import flags\nfrom medsam_jax.cli import run\n"
        "from medsam_jax.errors import UserError\nX = flags.DEFINE_string('x', '', '')\n"
        f"def main(_):\n    {code}\nrun(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": ROOT} | environment,
        capture_output=True,
    )
    assert done.returncode == 1
    return done.stderr.decode().splitlines()


@pytest.mark.parametrize("module", ["medsam_jax.train", "launch.slurm"])
def test_help_and_version_end_with_status_0(module):
    for flag, line in (("--help", "--[no]version: "), ("--version", f"medsam_jax {__version__}\n")):
        command = [sys.executable, "-m", module, flag]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert line in done.stdout
    done = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: command line: --config, (--data_dir, )?--workdir missing; see --help\n",
        done.stderr,
    )


def test_a_full_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        program = "from medsam_jax.cli import run\nrun(lambda _: print('a'))"
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: output: the disk is full")
    assert "Traceback" not in done.stderr


def test_what_the_system_refuses_is_one_line(tmp_path):
    (line,) = failing(f"open({str(tmp_path / 'x' / 'y')!r})")
    assert line.startswith(f"error: {tmp_path}/x/y: No such file or directory; ")


def test_line_breaks_in_names_are_escaped():
    assert failing("raise UserError(f'{X.value}/f: no')", "--x=a\nb") == [r"error: a\nb/f: no"]


def test_names_that_cannot_be_handed_to_libraries_are_refused():
    c_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    code = "raise UserError('main')"
    assert failing(code, "--x=d", **c_locale) == ["error: main"]
    for name in (b"d\xe9", "d\u00e9".encode()):
        (line,) = failing(code, b"--x=" + name, **c_locale)
        assert line.endswith("names are read as ascii here; set PYTHONUTF8=1 for UTF-8")
    (line,) = failing(code, b"--x=d\xe9", PYTHONUTF8="1")
    assert line == r"error: --x=d\udce9: the name is not UTF-8; rename it"


@pytest.mark.parametrize("name", ["a b", "\u00e9", "plain"])
def test_names_in_utf_8_are_taken(name):
    check_name(name)


def test_a_name_of_other_bytes_is_named_in_ascii():
    with pytest.raises(UserError, match=r"d.udce9: the name is not UTF-8; rename it"):
        check_name("d\udce9")


def test_users_without_a_name_own_files(tmp_path):
    program = """
import os, pwd, grp
from pathlib import Path
from etils import epath
from medsam_jax.cli import run
def main(_):
    Path("file").touch()
    if os.getuid() == 0:
        os.chown("file", 987654, 987654)
        assert epath.Path("file").stat().owner == "987654"
    assert (pwd.getpwuid(987654).pw_name, grp.getgrgid(987654).gr_name) == ("987654", "987654")
    del os.environ["HOME"]
    os.getuid = lambda: 987654
    try:
        Path.home()
    except RuntimeError:
        print("no home")
run(main)
"""
    environment = os.environ | {"PYTHONPATH": ROOT}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (done.stdout, done.returncode) == (b"no home\n", 0), done.stderr


@pytest.mark.parametrize("terminal", [False, True])
def test_log_lines_do_not_run_into_the_bar(terminal):
    program = """
import logging, sys
from absl import logging as absl_logging
from medsam_jax.cli import progress, run
def main(_):
    for number in progress(range(3), "numbers"):
        logging.getLogger("medsam_jax").warning("line %d", number)
run(main)
"""
    command = [sys.executable, "-c", program]
    if terminal:
        reader, writer = os.openpty()
        subprocess.run(command, stderr=writer, check=True)
        os.close(writer)
        text = b""
        with contextlib.suppress(OSError):  # the end of a terminal on Linux
            while part := os.read(reader, 4096):
                text += part
        os.close(reader)
        lines = text.decode().splitlines()
    else:
        lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
        assert all(line.startswith(("numbers: ", "W")) for line in lines)
    for number in range(3):
        (line,) = (line for line in lines if f"line {number}" in line)
        assert "numbers" not in line.rpartition("\r")[2]
