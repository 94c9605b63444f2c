"""Items that an older captioner described, under another token spec, for a new ranker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from build.ranker_onnx import export_ranker
from sightline.commands import store as commands
from sightline.errors import ReleaseError
from sightline.features import Versions, carry_over, item_schema
from sightline.item_path import ItemPath
from sightline.store import FeatureStore, Items, Status, open_store
from sightline.tokens import TokenSpec
from tests.factories import CAPTIONS, tiny_ranker

OLD = TokenSpec.fit([*CAPTIONS, "a heavy green plate"], families=("word",), length=6, min_count=1, rows=32)
HASH = "ab" * 32


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_ranker(tmp_path_factory.mktemp("ranker"))


def described(store: FeatureStore, captioner: str, spec: TokenSpec, captions: dict[int, str]) -> str:
    schema = item_schema(captioner, spec.version, spec.length)
    store.register(schema)
    store.write_items(schema.version, Items(
        ids=np.array(list(captions)), tokens=spec.encode_batch(list(captions.values())),
        captions=list(captions.values()), media_hashes=[HASH] * len(captions),
    ))  # fmt: skip
    return schema.version


def test_what_an_older_captioner_said_is_read_in_the_new_tokens(location: str, ranker: Path) -> None:
    versions, spec = Versions.read(ranker), TokenSpec.load(ranker / "token_spec.json")
    captions = dict(enumerate(CAPTIONS, 100))
    with open_store(location) as store:
        before = described(store, "older-captioner", OLD, captions)
        own = described(store, "test-captioner", spec, {101: "a red mug"})
        missing = store.read_items(list(captions), versions.accept(store)).status == Status.missing
        assert missing.sum() == len(captions) - 1

        seen = list[int]()
        (target,) = carry_over(store, versions, spec, seen.append)
        assert sum(seen) == len(captions)
        assert versions.accept(store) == [own, target]
        batch = store.read_items(list(captions), versions.accept(store))
        fresh = np.array(list(captions)) == 101
        assert batch.status.tolist() == [Status.fresh if own else Status.stale_version for own in fresh]
        expected = spec.encode_batch([captions[item] if item != 101 else "a red mug" for item in captions])
        np.testing.assert_array_equal(batch.tokens, expected)
        (details,) = store.read_details([100], [target])
        assert details is not None
        assert (details.caption, details.media_hash) == (captions[100], HASH)
        # Again: nothing; a later caption of the new captioner goes before.
        assert carry_over(store, versions, spec) == {}
        described(store, "test-captioner", spec, {100: "two yellow mugs"})
        assert store.read_items([100], versions.accept(store)).status.tolist() == [Status.fresh]
        assert store.read_items([100], [before]).status.tolist() == [Status.fresh]  # the old ranker's stay


def test_the_item_path_ranks_by_them(ranker: Path, tmp_path: Path) -> None:
    """An item of the old captioner scores as if the new one had said the same."""
    versions, spec = Versions.read(ranker), TokenSpec.load(ranker / "token_spec.json")
    export_ranker(ranker, tmp_path / "graphs")
    for name in ("ranker.json", "users.parquet", "items.parquet"):
        shutil.copy(ranker / name, tmp_path / "graphs")
    with open_store(str(tmp_path / "store")) as store:
        described(store, "older-captioner", OLD, {700: CAPTIONS[0], 701: CAPTIONS[1]})
        described(store, "test-captioner", spec, {800: CAPTIONS[0], 801: CAPTIONS[1]})
        path = ItemPath(tmp_path / "graphs", store)
        items, context = np.array([700, 701, 800, 801]), np.zeros(2, np.int64)
        assert path(7, items, context).status.tolist() == [Status.missing] * 2 + [Status.fresh] * 2
        carry_over(store, versions, spec)
        found = path(7, items, context)  # the same path: it hears of the change
        assert found.status.tolist() == [Status.stale_version] * 2 + [Status.fresh] * 2
        np.testing.assert_array_equal(found.scores[:2], found.scores[2:])
        assert found.scores[0] != found.scores[1]


def test_another_token_spec_is_refused(ranker: Path, tmp_path: Path) -> None:
    with open_store(str(tmp_path / "store")) as store, pytest.raises(ReleaseError, match="that of the ranker"):
        carry_over(store, Versions.read(ranker), OLD)


def test_the_command(ranker: Path, tmp_path: Path) -> None:
    models = tmp_path / "releases" / "r1" / "model_repository"
    for model, name in (("lookup", "ranker.json"), ("tokenize", "token_spec.json")):
        (models / model / "1").mkdir(parents=True)
        (models / model / "1" / name).write_bytes((ranker / name).read_bytes())
    location = str(tmp_path / "store")
    with open_store(location) as store:
        described(store, "older-captioner", OLD, {5: CAPTIONS[0]})
    arguments = ["carry-over", "--release", "r1", "--releases", str(tmp_path / "releases"), "--store", location]
    done = CliRunner().invoke(commands.app, arguments)
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout.splitlines()[-1])["written"].values()) == [1]
