"""benchmarks/backfill.py as a program, in its smallest size: its document, its report, and what a second call keeps."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import backfill
from benchmarks.backfill import BackfillOptions, main
from benchmarks.backfill_data import emoji
from sightline.errors import ConfigError, DataError

METHODS = "no backfill;DRM;RQT;two-way"
SMALL = ["--quick", "--seeds", "1", "--orders", "2", "--methods", METHODS]


def test_the_program_measures_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.backfill", *SMALL, "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document["relative_gain"]) == METHODS.split(";")
    assert document["relative_gain"]["no backfill"]["random"] == pytest.approx(0, abs=1e-9)
    assert set(document["relative_gain"]["two-way"]) == {
        "random", "popularity", "farthest from class mean", "uncertainty", "spread",
    }  # fmt: skip
    folder = tmp_path / "generated-quick"
    report = json.loads((folder / "report.json").read_text())
    merged = report["methods"]["DRM"]["random"]
    assert merged["runs"] == 2
    assert len(merged["mAP"]["curve"]) == 22
    assert merged["mAP"]["curve"][0] == pytest.approx(merged["mAP"]["old"], abs=1e-4)
    assert merged["mAP"]["curve"][-1] == pytest.approx(merged["mAP"]["new"], abs=1e-4)
    assert (folder / "report.md").read_text().count("| DRM |") == 3
    assert (folder / "curves.png").stat().st_size > 10_000

    def never(*_: object) -> None:
        raise AssertionError("measured what was there")

    monkeypatch.setattr(backfill, "evaluate", never)
    threads = torch.get_num_threads()
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    for method, gains in document["relative_gain"].items():  # sums in another order on a busy machine
        assert again["relative_gain"][method] == pytest.approx(gains, rel=1e-2, abs=1e-3)


def test_emoji_are_asked_in_one_style_and_found_in_the_other(tmp_path: Path) -> None:
    rows = [(f"{group}{i}", group, "") for group in ("hat", "cat") for i in range(10)] + [("rare", "dog", "")]
    with (tmp_path / "emoji.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["hexcode", "subgroup", "skintone", "in_twemoji"])
        table.writerows([(*row, "1") for row in rows] + [("tinted", "hat", "3", "1"), ("own", "hat", "", "0")])
    for style, value in (("twemoji", 50), ("openmoji", 200)):
        (tmp_path / style).mkdir()
        for name, *_ in rows:
            Image.new("RGBA", (40, 40), (value, value, value, 255)).save(tmp_path / style / f"{name}.png")
    found = emoji(tmp_path, 0)
    assert found.classes == 2
    sizes = {name: len(part) for name, part in found.parts.items()}
    assert sizes == {
        "fit": 24, "validation queries": 2, "validation gallery": 2, "test queries": 6, "test gallery": 6,
    }  # fmt: skip
    assert np.unique(found.parts["test queries"].pixels).tolist() == [50]
    assert np.unique(found.parts["test gallery"].pixels).tolist() == [200]
    assert found.names("test") == ("test queries", "test gallery")
    with pytest.raises(DataError, match=r"emoji\.csv"):
        emoji(tmp_path / "nowhere", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": "mnist"}, "--set"), ({"set": "cifar100"}, "--data"), ({"data": "x"}, "no --data"),
        ({"set": "emoji", "data": "x", "quick": True}, "--quick"), ({"seeds": 0}, "--seeds"),
        ({"methods": "DRM;magic"}, "'magic' is none of"), ({"arch": "vgg"}, "--arch"),
    ],
)  # fmt: skip
def test_impossible_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackfillOptions(**options)  # type: ignore[arg-type]
