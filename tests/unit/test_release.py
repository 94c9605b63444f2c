"""Verification names the file; publishing and rolling back are atomic; killed builds leave nothing."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sightline import release
from sightline.cli import app
from sightline.errors import ReleaseError

MODEL = "model_repository/embed/1/model.onnx"


def stage(folder: Path, content: str) -> str:
    """Fill a staged release with three small files and a manifest; returns its id."""
    for name in (MODEL, "model_repository/tokenize/1/token_spec.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} {content}")
    bearers = [folder / name for name in release.ID_BEARERS]
    for bearer in bearers:
        bearer.parent.mkdir(parents=True, exist_ok=True)
        bearer.write_text(f"release: {release.UNPUBLISHED}")
    identity = release.release_id("cpu", folder)
    for bearer in bearers:
        bearer.write_text(f"release: {identity}")
    manifest = release.Manifest(
        release=identity, created_at=datetime.now(UTC), lane="cpu", stand_ins=[],
        components=release.Components(captioner="c", token_spec="t", ranker="r"),
        limits=release.Limits(batch_size=1, media_bytes=1, media_pixels=1, video_frames=1, caption_tokens=1),
        built_with={}, files=release.hash_files(folder),
    )  # fmt: skip
    (folder / release.MANIFEST).write_text(manifest.model_dump_json())
    return identity


def publish(releases: Path, content: str) -> str:
    with release.staging(releases) as staged:
        stage(staged, content)
        return release.publish(staged, releases)


def test_published_release_is_verified_listed_and_current(tmp_path: Path) -> None:
    identity = publish(tmp_path, "one")
    assert release.verify(tmp_path / identity).release == identity
    assert release.current(tmp_path) == (tmp_path / identity).resolve()
    assert [manifest.release for manifest in release.list_releases(tmp_path)] == [identity]


def test_id_follows_from_content(tmp_path: Path) -> None:
    first, second, again = publish(tmp_path, "one"), publish(tmp_path, "two"), publish(tmp_path, "one")
    assert first == again != second
    assert release.current(tmp_path).name == first


@pytest.mark.parametrize("name", [MODEL, *release.ID_BEARERS])
def test_changed_file_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / publish(tmp_path, "one")
    (folder / name).write_text("tampered")
    with pytest.raises(ReleaseError, match=f"{name}: changed"):
        release.verify(folder)


def test_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / publish(tmp_path, "one")
    (folder / MODEL).rename(folder / "model_repository" / "embed" / "1" / "other.onnx")
    with pytest.raises(ReleaseError, match=f"{MODEL}: missing") as caught:
        release.verify(folder)
    assert "model_repository/embed/1/other.onnx: not part of the release" in str(caught.value)


def test_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / publish(tmp_path, "one")
    (folder / "model_repository" / "link").symlink_to(folder / MODEL)
    with pytest.raises(ReleaseError, match="link: a release holds plain files only"):
        release.verify(folder)


def test_mix_with_a_rewritten_manifest_is_refused(tmp_path: Path) -> None:
    one, two = (tmp_path / publish(tmp_path, content) for content in ("one", "two"))
    shutil.copy(two / MODEL, one / MODEL)
    manifest = release.read_manifest(one).model_dump(mode="json") | {"files": release.hash_files(one)}
    (one / release.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ReleaseError, match="put together from different releases"):
        release.verify(one)


@pytest.mark.parametrize("content", [None, "{", '{"release": "x"}'])
def test_manifest_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / publish(tmp_path, "one")
    (folder / release.MANIFEST).unlink()
    if content is not None:
        (folder / release.MANIFEST).write_text(content)
    with pytest.raises(ReleaseError, match=r"manifest\.json"):
        release.verify(folder)


def test_rollback_goes_back_one_publication_at_a_time(tmp_path: Path) -> None:
    first, second, third = (publish(tmp_path, content) for content in ("one", "two", "three"))
    assert release.rollback(tmp_path) == second
    assert release.rollback(tmp_path) == first
    with pytest.raises(ReleaseError, match="no release to go back to"):
        release.rollback(tmp_path)
    assert release.current(tmp_path).name == first
    assert (tmp_path / third).is_dir()
    actions = [json.loads(line)["action"] for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert actions == ["publish"] * 3 + ["rollback"] * 2
    publish(tmp_path, "three")
    assert release.rollback(tmp_path) == first


def test_rollback_refuses_a_damaged_release(tmp_path: Path) -> None:
    first, second = publish(tmp_path, "one"), publish(tmp_path, "two")
    (tmp_path / first / MODEL).unlink()
    with pytest.raises(ReleaseError, match=f"{MODEL}: missing"):
        release.rollback(tmp_path)
    assert release.current(tmp_path).name == second


def test_nothing_published(tmp_path: Path) -> None:
    assert release.list_releases(tmp_path) == []
    with pytest.raises(ReleaseError, match="no release is published"):
        release.current(tmp_path)


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with release.staging(tmp_path) as staged:
            stage(staged, "one")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_killed_build_is_invisible_and_swept_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from sightline import release\n"
        "from tests.unit.test_release import stage\n"
        "with release.staging(Path(sys.argv[1])) as staged:\n"
        "    stage(staged, 'one'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    leftover = next(tmp_path.iterdir())
    assert (leftover / release.MANIFEST).exists()
    assert release.list_releases(tmp_path) == []
    with release.staging(tmp_path) as mine, release.staging(tmp_path) as other:
        assert not leftover.exists()
        assert mine.exists(), "a build that is under way is not a leftover"
        assert other.exists()


def test_command_line(tmp_path: Path) -> None:
    first, second = publish(tmp_path, "one"), publish(tmp_path, "two")
    where = ["--releases", str(tmp_path)]
    listed = CliRunner().invoke(app, ["release", "list", *where]).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [[first, listed[0].split()[1]], ["*", second]]
    assert second in CliRunner().invoke(app, ["release", "verify", *where]).stdout
    assert CliRunner().invoke(app, ["release", "rollback", *where]).stdout.strip() == first
    result = CliRunner().invoke(app, ["release", "rollback", *where])
    assert isinstance(result.exception, ReleaseError)
