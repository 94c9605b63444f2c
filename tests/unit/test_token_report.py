"""`sightline tokens`: fitted on one half of the captions, measured on the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from catalogue.attributes import COLOURS, OBJECTS
from evaluation.token_report import measure_tokens
from sightline import cli
from sightline.errors import ConfigError
from sightline.tokens import TokenSpec
from trainer.captioning import write_captions

CAPTIONS = [f"{thing}, {colour}, small" for thing in OBJECTS for colour in COLOURS for _ in range(3)]


def test_half_is_fitted_on_and_half_measured() -> None:
    statistics, document = measure_tokens(CAPTIONS, ["slot", "bigram"], grammar="product", rows=64)
    assert document["fitted_on"] == statistics.captions == len(CAPTIONS) // 2
    assert list(document["families"]) == ["slot", "bigram"]
    slot = document["families"]["slot"]
    assert slot["rows"] == slot["used_rows"] == len(OBJECTS) + len(COLOURS) + 1
    assert slot["caption_coverage"] == slot["token_coverage"] == 1
    assert 0 < document["families"]["bigram"]["partial_collisions"] <= 1
    only_once = [f"word{i} mug" for i in range(40)]  # a word is never in both halves
    assert measure_tokens(only_once, ["word"], min_count=1)[0].families["word"].token_coverage == 0.5


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.parquet", dict(enumerate(CAPTIONS)), "v1")
    asked = ["tokens", "--captions", str(tmp_path / "captions.parquet")]
    result = CliRunner().invoke(cli.app, [*asked, "--family", "word", "--family", "subword"], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    assert list(document["families"]) == ["word", "subword"]
    assert "subword" in result.stderr
    spec = TokenSpec.fit(CAPTIONS)
    spec.save(tmp_path / "spec.json")
    result = CliRunner().invoke(cli.app, [*asked, "--spec", str(tmp_path / "spec.json")], catch_exceptions=False)
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["spec"], document["captions"]) == (spec.version, len(CAPTIONS))
    with pytest.raises(ConfigError, match="--family is emoji; expected some of word"):
        CliRunner().invoke(cli.app, [*asked, "--family", "emoji"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--grammar is klingon"):
        CliRunner().invoke(cli.app, [*asked, "--grammar", "klingon"], catch_exceptions=False)
