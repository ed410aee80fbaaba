import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "input").write_text("a")
    return tmp_path


def _run(folder):
    command = [sys.executable, "-m", "tests.scripts.fake_demo", "--folder", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _logs(folder):
    return [(folder / name / "log").read_text() for name in ("first", "second")]


def test_steps_run_once_and_commands_are_printed(folder):
    first = _run(folder)
    assert first.returncode == 0, first.stderr
    second = _run(folder)
    assert second.stdout.count("already done") == 2
    assert _logs(folder) == ["1", "2"]
    for result in (first, second):
        assert f"Report: {folder / 'report.html'}" in result.stdout
        assert (folder / "commands.txt").read_text() in result.stdout


def test_a_changed_input_repeats_its_step_and_all_later_ones_from_the_start(folder):
    _run(folder)
    (folder / "input").write_text("b")
    result = _run(folder)
    assert "already done" not in result.stdout
    assert _logs(folder) == ["1", "2"]  # not "11": outputs of the old input were removed


def test_a_failed_step_is_one_line_and_goes_on_where_it_stopped(folder):
    (folder / "broken").touch()
    failed = _run(folder)
    assert failed.returncode == 1
    assert failed.stderr == "error: one: the command above ended with status 1\n"
    assert not (folder / "second").exists()

    (folder / "broken").unlink()
    assert _run(folder).returncode == 0
    assert _logs(folder) == ["11", "2"]  # what it had written was kept
