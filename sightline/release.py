"""Releases: what is served together, with a hash of every file; published and rolled back by one atomic swap.

<releases>/<release id>/manifest.json
<releases>/<release id>/model_repository/…
<releases>/current                     → the release that `sightline serve` starts
<releases>/history.jsonl               one line per publish and rollback
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sightline.errors import ReleaseError

__all__ = [
    "Components",
    "Engine",
    "Limits",
    "Manifest",
    "current",
    "hash_files",
    "list_releases",
    "publish",
    "read_manifest",
    "release_id",
    "rollback",
    "staging",
    "verify",
]

MANIFEST = "manifest.json"
# The file that carries the release's own id, for clients to ask for; and what stands there before.
ID_BEARERS = tuple(f"model_repository/{model}/config.pbtxt" for model in ("rank_media", "rank_items"))
UNPUBLISHED = "unpublished"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Components(_Record):
    """Versions of the parts that were trained together."""

    captioner: str
    token_spec: str
    ranker: str


class Limits(_Record):
    """What one request may hold."""

    batch_size: int
    media_bytes: int
    media_pixels: int
    video_frames: int
    caption_tokens: int


class Engine(_Record):
    """What a compiled decoder runs on, and what it can take."""

    gpu: str
    gpus: int
    """Number of them, for tensor parallelism."""
    capability: str
    """Compute capability, e.g. `9.0`."""
    tensorrt_llm: str
    tensorrt: str
    quantization: str
    dtype: str
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    images: int


class Manifest(_Record):
    """`manifest.json` of a release."""

    release: str
    created_at: datetime
    lane: Literal["cpu", "trtllm", "llmapi"]
    stand_ins: list[str]
    """Parts that stand in for faster ones of a GPU machine; figures taken with them say so."""
    components: Components
    limits: Limits
    engine: Engine | None = None
    """Lane `trtllm` only."""
    checks: dict[str, Any] = {}
    """What the build measured: errors of exports against eager models, cost of lower precision, the engine's node."""
    built_with: dict[str, str]
    """Package → version."""
    files: dict[str, str]
    """Path relative to the release folder → SHA-256; every file but the manifest itself."""


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` except the manifest, by path with forward slashes.

    Raises:
        ReleaseError: something that is neither a file nor a folder (a symlink, a socket) lies there.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ReleaseError(
                f"{path}: a release holds plain files only; replace the link by what it points to"
            )
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def release_id(lane: str, folder: Path, known: str = UNPUBLISHED) -> str:
    """The id follows from the content, so the same parts built twice are the same release.

    Some files carry the id itself; they count as they were before the id was `known`.
    """
    files = hash_files(folder)
    for name in ID_BEARERS:
        before = (folder / name).read_bytes().replace(known.encode(), UNPUBLISHED.encode())
        files[name] = hashlib.sha256(before).hexdigest()
    lines = [f"{name} {digest}\n" for name, digest in sorted(files.items())]
    return f"{lane}-{hashlib.sha256(''.join(lines).encode()).hexdigest()[:12]}"


def read_manifest(release_dir: Path) -> Manifest:
    """Raises ReleaseError where the folder has no readable manifest."""
    path = release_dir / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ReleaseError(
            f"{path}: missing; expected a release folder, as `sightline build` makes it"
        ) from error
    except (OSError, ValidationError) as error:
        raise ReleaseError(f"{path}: not a release manifest: {error}") from error


def verify(release_dir: Path) -> Manifest:
    """Compare every file with the manifest.

    Raises:
        ReleaseError: a file is missing, extra or changed (the message names it), or the files together are
            not the release that the manifest claims.
    """
    manifest = read_manifest(release_dir)
    found = hash_files(release_dir)
    problems = [
        *(f"{name}: missing" for name in manifest.files.keys() - found.keys()),
        *(f"{name}: not part of the release" for name in found.keys() - manifest.files.keys()),
        *(
            f"{name}: changed (SHA-256 {found[name][:12]}…, expected {digest[:12]}…)"
            for name, digest in manifest.files.items()
            if found.get(name, digest) != digest
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5]) + (
            f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        )
        raise ReleaseError(
            f"release {manifest.release} in {release_dir} is damaged: {shown}. Build it again or roll back"
        )
    if (actual := release_id(manifest.lane, release_dir, manifest.release)) != manifest.release:
        raise ReleaseError(
            f"{release_dir / MANIFEST}: the files are release {actual}, the manifest says "
            f"{manifest.release}; it was put together from different releases"
        )
    return manifest


@contextmanager
def staging(releases_dir: Path) -> Iterator[Path]:
    """A folder beside the releases to build one in; gone afterwards, like leftovers of killed builds.

    The holder keeps a lock on the folder: one without a holder is a leftover.
    """
    releases_dir.mkdir(parents=True, exist_ok=True)
    for leftover in releases_dir.glob(".staging-*"):
        with _locked(leftover, wait=False) as free:
            if free:
                shutil.rmtree(leftover)
    folder = Path(mkdtemp(prefix=".staging-", dir=releases_dir))
    folder.chmod(0o755)
    with _locked(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, releases_dir: Path) -> str:
    """Verify a staged release, move it to its place and make it current; returns its id.

    A release that is already there is kept (same id, same content) and made current.
    """
    manifest = verify(staged)
    target = releases_dir / manifest.release
    with _locked(releases_dir):
        if target.exists():
            verify(target)
        else:
            os.rename(staged, target)
        _switch(releases_dir, "publish", manifest.release)
    return manifest.release


def rollback(releases_dir: Path) -> str:
    """Make the release published before the current one current again; returns its id.

    Raises:
        ReleaseError: there is none, or it is damaged.
    """
    with _locked(releases_dir):
        stack = _published(releases_dir)
        if len(stack) < 2:
            raise ReleaseError(
                f"{releases_dir}: no release to go back to; published so far: {stack or 'none'}"
            )
        verify(releases_dir / stack[-2])
        _switch(releases_dir, "rollback", stack[-2])
        return stack[-2]


def current(releases_dir: Path) -> Path:
    """Folder of the current release. Raises ReleaseError where nothing was published."""
    link = releases_dir / "current"
    if not link.exists():
        raise ReleaseError(f"{link}: no release is published; run `sightline build` first")
    return link.resolve()


def list_releases(releases_dir: Path) -> list[Manifest]:
    """Manifests of all releases, oldest first."""
    folders = [path.parent for path in releases_dir.glob(f"*/{MANIFEST}")]
    manifests = [read_manifest(path) for path in folders if not path.is_symlink() and path.name[0] != "."]
    return sorted(manifests, key=lambda manifest: manifest.created_at)


def _published(releases_dir: Path) -> list[str]:
    """Releases that were current, oldest first; a rollback takes the last one off."""
    stack: list[str] = []
    history = releases_dir / "history.jsonl"
    for line in history.read_text().splitlines() if history.exists() else []:
        entry = json.loads(line)
        if entry["action"] == "rollback":
            stack.pop()
        elif stack[-1:] != [entry["release"]]:
            stack.append(entry["release"])
    return stack


def _switch(releases_dir: Path, action: str, release: str) -> None:
    link = releases_dir / ".current"
    link.unlink(missing_ok=True)
    link.symlink_to(release)
    os.replace(link, releases_dir / "current")
    entry = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "action": action, "release": release}
    with (releases_dir / "history.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Exclusive lock on a folder, freed when its holder dies. Without `wait`, yields whether it was free."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        os.close(descriptor)
