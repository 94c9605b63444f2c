"""benchmarks/gpu_captioner.py in full: on the CPU with a tiny shape, and on a GPU where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_captioner import VOCABULARY, WAYS, Captioner, GpuOptions, bench, parity
from sightline.errors import ConfigError

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_script_in_full(device: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_captioner", "--shape", "tiny", "--device", device, "--batches",
               "1", "3", "--new-tokens", "6", "--runs", "2", "--out", str(tmp_path)]  # fmt: skip
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    *said, last = ran.stdout.splitlines()
    assert said[0].startswith("How many images per second")
    document = json.loads(last)
    said = said[said.index(next(line for line in said if line.startswith("ceiling "))):]
    assert said[1].startswith("ceiling ")  # both before the first measurement
    assert said[2].startswith("batch 1 ")
    assert document["copy_gb_per_s"] > 0
    assert [ceiling["batch"] for ceiling in document["ceilings"]] == [1, 3]
    for ceiling in document["ceilings"]:
        seconds = (ceiling["step_weight_gb"] + ceiling["step_cache_gb"]) / document["copy_gb_per_s"]
        assert ceiling["step_ms"] == pytest.approx(seconds * 1e3, rel=1e-3)
    expected = [(batch, way) for batch in (1, 3) for way in WAYS[device]]
    assert [(row["batch"], row["way"]) for row in document["rows"]] == expected
    for row in document["rows"]:
        assert 0 < row["images_per_s_low"] <= row["images_per_s"] <= row["images_per_s_high"]
        assert row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"]
        assert (row["peak_gb"] is None) == (device == "cpu")
    assert document["left_out"] == {}
    exact, rounded = document["parity"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert exact["equal_captions"] == exact["distinct_captions"] == exact["prompts"]
    assert {"hardware", "versions", "commit", "command"} <= document.keys()
    page = (Path(document["report"]) / "report.md").read_text()
    assert "No figure here says anything about the 7b captioner on a GPU" in page
    assert json.loads((Path(document["report"]) / "report.json").read_text()) == document


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    document = bench(GpuOptions(shape="tiny", device="cpu", batches=(2,), runs=1, seconds=0, out=tmp_path),
                     progress=lambda line: None)  # fmt: skip
    assert document["rows"] == []
    assert "not begun within 0 s" in document["left_out"][2]
    assert "| 2 | left out: not begun within 0 s |" in (Path(document["report"]) / "report.md").read_text()


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """Tiny, float32, with weights wide enough for captions that differ."""
    made = Captioner("tiny", "cpu", torch.float32)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.dim() > 1:  # in place, for the decoder as well
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.15)
    return made


def test_all_ways_write_the_same(captioner: Captioner) -> None:
    pixels = torch.randn(3, *captioner.pixels, generator=torch.Generator().manual_seed(0))
    expected = captioner.caption("generate", pixels, [7, 8, 9], 8)
    assert len({tuple(ids) for ids in expected}) == 3
    assert captioner.caption("dynamic", pixels, [7, 8, 9], 8) == expected
    assert captioner.caption("static", pixels, [7, 8, 9], 8) == expected


def test_bytes_of_a_step(captioner: Captioner) -> None:
    matrices = 3 * (4 * 128 * 128 + 3 * 128 * 352) + VOCABULARY["tiny"] * 128
    norms = (2 * 3 + 1) * 128
    assert captioner.step_weight_bytes == 4 * (matrices + norms)
    assert captioner.token_cache_bytes == 2 * 3 * 128 * 4


def test_parity_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Captioner):
        """The one on the device, told by its dtype, has logits 1 % too large."""

        def __init__(self, shape: str, device: str, dtype: torch.dtype, *weights: Any) -> None:
            super().__init__(shape, device, dtype, *weights)
            if dtype == torch.float64:
                self.decoder.norm.mul_(1.01)

    monkeypatch.setattr("benchmarks.gpu_captioner.Captioner", Off)
    found = parity("cpu", torch.float64)
    assert found["largest_logit_difference"] == pytest.approx(0.01 * found["largest_logit"], rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "13b"}, "--shape: got 13b"),
        ({"device": "tpu"}, "--device: got tpu"),
        ({"batches": (8, 1)}, "--batches: got"),
        ({"batches": (0, 1)}, "--batches: got"),
        ({"new_tokens": 1}, "--new-tokens: got 1, expected 2 or more"),
        ({"runs": 0}, "--runs: got 0"),
        pytest.param({"device": "cuda"}, "--device: got cuda, but torch", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="what happens where torch sees no CUDA device")),
    ],
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GpuOptions(**{"device": "cpu"} | options)
