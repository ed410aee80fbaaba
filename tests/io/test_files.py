"""Files and directories appear whole or not at all; hashes; versions; compiled programs."""

import hashlib
import importlib.metadata
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from medsam_jax.errors import OutputError, UserError
from medsam_jax.io import files
from tests.names import AWKWARD

CODE = """
import jax
from medsam_jax.io.files import keep_compiled_programs
keep_compiled_programs()
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
"""


def compiled_files(folder: Path) -> set[str]:
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["MEDSAM_JAX_CACHE"] = str(folder)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # quick ones too
    subprocess.run([sys.executable, "-c", CODE], cwd=root, check=True, env=environment)
    return {path.name for path in folder.rglob("*-cache")}


def test_a_second_process_compiles_nothing_anew(tmp_path):
    first = compiled_files(tmp_path)
    assert first
    assert compiled_files(tmp_path) == first


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "first")

    def fail(partial):
        partial.write_text("half")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        files.write_whole(path, fail)
    assert path.read_text() == "first"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(OutputError, match="a.txt: cannot be written"):
        files.write_text(path / "below", "x")


def test_json_holds_null_for_what_is_not_finite(tmp_path):
    files.write_json(tmp_path / "a.json", {1: (float("nan"), 2.5), "b": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"1": [None, 2.5], "b": None}


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    with files.replacing(tmp_path / "d", overwrite=False) as new:
        (new / "x").write_text("1")
    with pytest.raises(UserError, match="d: exists"), files.replacing(tmp_path / "d", False):
        pass

    def fail():
        with files.replacing(tmp_path / "d", overwrite=True) as new:
            (new / "x").write_text("2")
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert (tmp_path / "d" / "x").read_text() == "1"
    with files.replacing(tmp_path / "d", overwrite=True) as new:
        (new / "y").write_text("3")
    assert [one.name for one in (tmp_path / "d").iterdir()] == ["y"]
    assert [one.name for one in tmp_path.iterdir()] == ["d"]


def test_hashes_and_versions(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert files.sha256_of_json({"b": 1, "a": [2]}) == files.sha256_of_json({"a": (2,), "b": 1})
    found = files.versions(("numpy", "no-such-package"))
    assert found == {"numpy": importlib.metadata.version("numpy")}


@pytest.mark.parametrize("name", AWKWARD)
def test_a_plain_path_leads_to_the_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    plain = files.plain_path(folder)
    assert not set("[]*?\\\n\"'") & set(str(plain))
    (plain / "x").write_text("1")
    assert (folder / "x").read_text() == "1"
    assert files.plain_path(folder) == plain


def test_links_are_removed_when_the_process_ends(tmp_path):
    (tmp_path / "[a]").mkdir()
    code = "import sys; from medsam_jax.io.files import plain_path; print(plain_path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "[a]")]
    root = Path(__file__).parents[2]
    link = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert link.strip() != str(tmp_path / "[a]")
    assert not Path(link.strip()).parent.exists()


def test_plain_folders_need_no_link(tmp_path):
    assert files.plain_path(tmp_path) == tmp_path


def test_a_series_is_chosen_only_in_a_folder(tmp_path):
    folder = tmp_path / "study #3"
    folder.mkdir()
    (folder / "ct.nii").touch()
    (folder / "a#1.2").touch()
    for path in (folder, folder / "ct.nii", folder / "a#1.2", folder / "gone#1.2", "x#y"):
        assert files.split_series(str(path)) == (str(path), "")
    assert files.split_series(f"{folder}#1.2.3") == (str(folder), "1.2.3")


@pytest.mark.parametrize("name", ["x" * 250 + ".txt", "\u00e9" * 125 + ".txt"])
def test_the_longest_names_are_written(tmp_path, name):
    files.write_text(tmp_path / name, "1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with files.replacing(tmp_path / name[:-4], overwrite=False) as new:
        (new / "a").touch()
    assert (tmp_path / name[:-4] / "a").exists()
    with pytest.raises(OutputError, match="use a shorter name"):
        files.write_text(tmp_path / (name + "y" * 10), "1")


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    files.check_writable(tmp_path / "new" / "deep")
    for place, reason in (
        ("file/x", "file is a file"),
        ("link/x", "link is a link to nothing"),
        ("x" * 300, "the name is too long"),
    ):
        with pytest.raises(OutputError, match=f"cannot be written .*{reason}"):
            files.check_writable(tmp_path / place)


def test_no_home_needs_a_variable(tmp_path, monkeypatch):
    def unknown(_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("MEDSAM_JAX_CACHE", raising=False)
    with pytest.raises(UserError, match="no home directory; set MEDSAM_JAX_CACHE"):
        files.cache_directory()
    monkeypatch.setenv("MEDSAM_JAX_CACHE", str(tmp_path))
    assert files.writable_cache() == tmp_path


def test_without_a_cache_programs_are_compiled_and_a_line_says_so(tmp_path):
    (tmp_path / "file").touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["MEDSAM_JAX_CACHE"] = str(tmp_path / "file")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", CODE]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: programs are compiled at every start: ")
    assert "the cache cannot be written" in line
