"""The training benchmark compares what computes the same, and says where its figures come from."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import training
from benchmarks.training import LOADING, OURS, TORCH, TORCHREC, TorchBags, TrainingOptions, examples
from sightline.errors import ConfigError
from trainer.examples import stream_examples
from trainer.ranker import tensors
from trainer.ranker_model import MODELS, new_ranker
from trainer.splits import TRAIN, VALID


@pytest.mark.parametrize("model", MODELS)
def test_the_peer_on_plain_torch_is_the_same_model(tmp_path, model):
    path, table, shape = examples(tmp_path, TrainingOptions(model=model, rows=65))
    ours, peer = new_ranker(shape, 0), TorchBags(shape)
    with torch.no_grad():
        for name, weight in ours.tables().items():
            peer.tables[name].weight.copy_(weight)
    peer.features.load_state_dict(ours.features.state_dict())
    peer.score.load_state_dict(ours.score.state_dict())
    (batch,) = stream_examples(path, (TRAIN,), table, 64)
    assert torch.allclose(ours(tensors(batch)), peer(tensors(batch)), atol=1e-5)
    assert len(next(stream_examples(path, (VALID,), table, 64)).label) == 1


def test_tiny_run_ends_in_json_with_its_origin(capsys):
    training.main(["--rows", "600", "--rounds", "2", "--batch", "200", "--model", "din"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].endswith("?")  # the question comes first
    document = json.loads(lines[-1])
    assert set(document["samples_per_s"]) == {OURS, TORCHREC, TORCH, LOADING}
    for rate in (*document["samples_per_s"].values(), *document["ours_over"].values()):
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
    assert {"hardware", "versions", "commit", "command"} <= set(document)
    # 2 ids, 2 context columns, 11 caption tokens, 24 profile tokens; each read, read again and written, and 2 × 4 bytes
    assert document["ceiling"]["table_bytes_per_sample"] == 39 * (3 * 16 * 4 + 8)
    table = [line for line in lines if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == ["loop", OURS, TORCHREC, TORCH, LOADING]


@pytest.mark.parametrize("bad", [{"model": "mlp"}, {"rows": 1}, {"rounds": 0}])
def test_bad_options(bad):
    with pytest.raises(ConfigError, match="expected"):
        TrainingOptions(**bad)
