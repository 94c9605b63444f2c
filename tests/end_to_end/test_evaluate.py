"""`sightline evaluate` on the splits by time and by row; the cold split is in tests/unit/test_evaluation.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sightline.cli import app

OLD, NEW = 16, 4


@pytest.fixture(scope="module")
def even(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 items of the catalogue, shown equally often, and 4 more without text, shown in the last tenth of the time."""
    folder = tmp_path_factory.mktemp("even")
    shutil.copy(catalogue / "dataset.json", folder)
    items = pq.read_table(catalogue / "items.parquet").slice(0, OLD + NEW)
    text = pa.array([*items["text"].to_pylist()[:OLD], *[None] * NEW], pa.string())
    at = items.schema.get_field_index("text")
    pq.write_table(items.set_column(at, items.schema.field("text"), text), folder / "items.parquet")
    rows = pa.concat_tables(3 * [pq.read_table(catalogue / "interactions.parquet")]).sort_by("timestamp")
    rng = np.random.default_rng(0)
    late = np.arange(len(rows)) > 0.9 * len(rows)
    item = 1 + rng.integers(0, np.where(late, OLD + NEW, OLD))
    columns = {"item_id": pa.array(item), "label": pa.array(rng.integers(0, 2, len(rows)), pa.float32())}
    for name, values in columns.items():
        at = rows.schema.get_field_index(name)
        rows = rows.set_column(at, rows.schema.field(name), values)
    pq.write_table(rows, folder / "interactions.parquet")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of both splits, whose captioners are fitted on the same items: the second finds the first one's."""
    return tmp_path_factory.mktemp("work")


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # after so few steps, pictures look alike
@pytest.mark.parametrize(("split", "cuts"), [("temporal", {"all", "tail", "cold"}), ("warm", {"all", "tail"})])
def test_a_split_with_one_fold(even: Path, work: Path, tmp_path: Path, split: str, cuts: set[str]) -> None:
    """Captioners and two rankers of a few steps, tested on the last or on a random tenth of 9600 rows."""
    argv = ["evaluate", "--data", str(even), "--split", split, "--small", "--folds", "3", "--seeds", "1",
            "--arm", "ids", "--arm", "oracle", "--work", str(work), "--out", str(tmp_path / "report")]  # fmt: skip
    result = CliRunner().invoke(app, argv, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["split"], report["folds"]) == (split, 1)
    assert set(report["arms"]) == {"ids", "oracle"}
    rows = report["rows"]
    assert rows["all"] == pytest.approx(960, abs=60)
    assert rows["all"] == sum(count for cut, count in rows.items() if cut != "all")
    assert set(rows) >= cuts
    assert rows.get("cold", 0) == pytest.approx(960 * NEW / (OLD + NEW) if "cold" in cuts else 0, abs=40)
    assert len(list(work.glob("captioner-*"))) == 3
    assert json.loads((tmp_path / "report" / "report.json").read_text())["arms"] == report["arms"]
