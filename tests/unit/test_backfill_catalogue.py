"""`--set catalogue` of benchmarks/backfill.py: two random captioners on a small data set, clicks as relevance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from scipy import sparse

from benchmarks.backfill import BackfillOptions, main
from benchmarks.backfill_catalogue import NEAREST, content_vectors, liked_alike
from benchmarks.backfill_catalogue import catalogue as case_of
from evaluation.splits import Log
from sightline import release
from sightline.content import LocalEncoder
from sightline.errors import ConfigError, DataError
from sightline.schema import MediaReader, read_interactions, read_items, read_record, write_dataset
from tests.factories import tiny_captioner
from trainer.splits import Split, micros, training_items


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("captioners")
    return [
        tiny_captioner(folder / name, version=name, noise=noise) for name, noise in (("old", 0.3), ("new", 0.0))
    ]


def with_labels(data: Path, out: Path, label: pa.Array) -> Path:
    rows = read_interactions(data)
    rows = rows.set_column(rows.schema.get_field_index("label"), "label", label.cast(pa.float32()))
    write_dataset(out, read_items(data), rows, read_record(data))
    return out


def test_the_program_measures_a_pair_of_captioners(
    catalogue: Path, captioners: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair, threads = ",".join(map(str, captioners)), torch.get_num_threads()
    assert main([
        "--set", "catalogue", "--data", str(catalogue), "--captioners", pair, "--seeds", "2", "--orders", "1",
        "--methods", "DRM;Procrustes;MCL;two-way", "--out", str(tmp_path),
    ]) == 0  # fmt: skip
    torch.set_num_threads(threads)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["relative_gain"]) == {"DRM", "Procrustes", "MCL", "two-way"}
    assert document["chosen"][0]["MCL"]["temperature"] in (0.1, 0.2, 0.4)
    assert 0 < document["reference"]["random"]["mAP"] < document["reference"]["attributes"]["mAP"] < 1
    report = json.loads((tmp_path / "catalogue" / "report.json").read_text())
    merged = report["methods"]["DRM"]["random"]
    assert (merged["runs"], merged["queries"]) == (2, document["sizes"]["test"])  # both seeds ask the same
    assert merged["mAP"]["curve"][-1] == pytest.approx(merged["mAP"]["new"], abs=1e-4)
    text = (tmp_path / "catalogue" / "report.md").read_text()
    assert "BCT is left out" in text
    assert "Without a model: random mAP" in text
    assert len(list((tmp_path / "catalogue" / "vectors").glob("*.npz"))) == 2


def test_a_case_is_split_by_time_and_item(catalogue: Path, captioners: list[Path], tmp_path: Path) -> None:
    case = case_of(catalogue, captioners, 0, tmp_path)
    rows, record = read_interactions(catalogue), read_record(catalogue)
    split = Split.of(record, micros(rows["timestamp"]))
    items = read_items(catalogue)
    seen = set(items["item_id"].to_numpy()[training_items(items, rows, record, split, 0)].tolist())
    late = pc.greater_equal(rows["timestamp"].cast(pa.int64()), split.test_from)
    after = rows.filter(pc.and_(late, pc.equal(rows["label"], 1)))
    ids, vectors = content_vectors(captioners[1], Log.read(catalogue), tmp_path)

    def items_of(new: np.ndarray) -> list[int]:
        found = (new @ vectors.T).argmax(1)
        assert np.array_equal(vectors[found], new)
        return [int(item) for item in ids[found]]

    test, fit, held = (items_of(one.new) for one in (case.test.queries, case.fit, case.validation.queries))
    assert set(test) == set(after["item_id"].to_pylist()) - seen
    assert set(fit) | set(held) <= seen
    assert not set(fit) & set(held)
    assert case.fit.old.shape == case.fit.new.shape == (len(fit), 32)
    assert set(case.fit.labels.tolist()) == set(range(len(case.head))) == set(range(case.sizes["classes"]))
    for asked in (case.validation, case.test):
        assert asked.queries is asked.gallery
        found = np.array([asked.relevance.row(query) for query in range(len(asked.queries.labels))])
        assert not found.diagonal().any()
        assert 1 <= found.sum(1).max() <= NEAREST

    other = case_of(catalogue, captioners, 1, tmp_path)
    assert not np.array_equal(other.fit.new, case.fit.new)
    assert np.array_equal(other.test.relevance.matrix, case.test.relevance.matrix)


def test_clicks_after_the_cut_say_nothing_but_what_is_relevant(
    catalogue: Path, captioners: list[Path], tmp_path: Path
) -> None:
    rows = read_interactions(catalogue)
    split = Split.of(read_record(catalogue), micros(rows["timestamp"]))
    after = pc.greater_equal(rows["timestamp"].cast(pa.int64()), split.test_from)
    swapped = with_labels(
        catalogue, tmp_path / "swapped", pc.if_else(after, pc.subtract(1, rows["label"]), rows["label"])
    )
    ours, theirs = (case_of(data, captioners, 0, tmp_path) for data in (catalogue, swapped))
    for name in ("old", "new", "labels"):
        assert np.array_equal(getattr(ours.fit, name), getattr(theirs.fit, name))
    assert np.array_equal(ours.head, theirs.head)
    assert np.array_equal(ours.validation.queries.new, theirs.validation.queries.new)
    assert np.array_equal(ours.validation.relevance.matrix, theirs.validation.relevance.matrix)
    assert ours.sizes["test"] != theirs.sizes["test"]
    assert ours.keys != theirs.keys

    quiet = with_labels(catalogue, tmp_path / "quiet", pc.if_else(after, 0.0, rows["label"]))
    with pytest.raises(DataError, match=r"appear after it and have clicks, got \d+ and 0"):
        case_of(quiet, captioners, 0, tmp_path)


def test_vectors_are_those_of_a_release(releases_dir: Path, parts: Path, catalogue: Path, tmp_path: Path) -> None:
    log = Log.read(catalogue)
    ids, vectors = content_vectors(parts / "captioner", log, tmp_path)
    assert ids.tolist() == log.described.tolist()
    media = MediaReader(catalogue, log.items)
    served = LocalEncoder(release.current(releases_dir), threads=1)([media[item] or b"" for item in ids[:20].tolist()])
    for ours, theirs in zip(vectors, served, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_items_are_alike_if_alike_users_clicked_them() -> None:
    """Two camps of users, six items each, no user clicked two of them: nothing but tastes tells which are alike."""
    camp, turned = np.repeat([0, 1], 6), np.linspace(0, 0.3, 12)
    tastes = np.stack([np.cos(camp * np.pi + turned), np.sin(camp * np.pi + turned)], 1)
    found = liked_alike(sparse.csr_matrix(np.eye(12)), tastes)
    got = np.array([found.row(query) for query in range(12)])
    assert np.array_equal(got, (camp[:, None] == camp) & ~np.eye(12, dtype=bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captioners": ""}, "--captioners ''"), ({"captioners": "one"}, "--captioners 'one'"),
        ({"data": ""}, "--data"),
        ({"set": "emoji"}, "--captioners 'a,b', expected none"), ({"methods": "BCT;DRM"}, "BCT"),
        ({"bf16": True}, "no backbone"), ({"quick": True}, "--quick"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    right = BackfillOptions(set="catalogue", data="x", captioners="a,b")
    assert "BCT" not in right.chosen
    with pytest.raises(ConfigError, match=message):
        replace(right, **options)  # type: ignore[arg-type]


def test_a_captioner_is_no_pair(catalogue: Path, captioners: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both folders hold captioner old"):
        case_of(catalogue, [captioners[0], captioners[0]], 0, tmp_path)
