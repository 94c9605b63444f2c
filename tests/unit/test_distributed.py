"""Two processes, each with rows of its own, train as one does, and take over each other's weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss

from sightline.schema import read_interactions, read_items
from sightline.tokens import TokenSpec
from trainer.captioning import write_captions
from trainer.examples import GROUP_ROWS, stream_examples
from trainer.ranker import RankerConfig, fit, optimise, optimizer, predict
from trainer.ranker_model import RankerShape, new_ranker
from trainer.splits import TRAIN, VALID

# Mean loss in nats: FP32 sums in another order, carried through all steps; about 1e-7 here.
TOLERANCE = 1e-5
BATCH, EPOCHS = 1000, 2  # the last batch is an odd one


@pytest.fixture(scope="module")
def data(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The catalogue with every interaction five times: enough for several row groups of training examples."""
    folder = tmp_path_factory.mktemp("data") / "five"
    shutil.copytree(catalogue, folder)
    log = read_interactions(catalogue)
    pq.write_table(log.take(np.repeat(np.arange(log.num_rows), 5)), folder / "interactions.parquet")
    return folder


@pytest.fixture(scope="module")
def source(catalogue: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    items = read_items(catalogue)
    captions = tmp_path_factory.mktemp("captions") / "captions.parquet"
    write_captions(
        captions, dict(zip(items["item_id"].to_pylist(), items["text"].to_pylist(), strict=True)), "test-captioner"
    )
    return ["--data", str(data), "--captions", str(captions), "--batch", str(BATCH)]


def torchrun(ranks: int, out: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
               "trainer.distributed", "--out", str(out), *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.strip().splitlines()[-1])
    assert record["ranks"] == ranks
    return record


def one_process(out: Path, catalogue: Path, epochs: int, start: Path | None = None):
    """What `fit` makes of the examples of a run: its history, and validation scores of its ranker and of the run's."""
    document = json.loads((out / "ranker.json").read_text())
    shape = RankerShape.from_json(document["shape"])
    spec, items = TokenSpec.load(out / "token_spec.json"), read_items(catalogue)
    table = (items["item_id"].to_numpy(), spec.encode_batch(items["text"].to_pylist()))
    config = RankerConfig(batch=BATCH, epochs=epochs, model=shape.model)
    if start is None:
        model, history = fit(shape, out / "examples.parquet", table, config, 0, "one")
    else:
        model = new_ranker(shape, 0)
        model.load_state_dict(torch.load(start, weights_only=True))
        history = optimise(model, optimizer(model, config), out / "examples.parquet", table, config, 0, "one")
    made = new_ranker(shape, 0)
    made.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    valid = list(stream_examples(out / "examples.parquet", (VALID,), table, 512))
    label = np.concatenate([batch.label for batch in valid])
    return history, predict(model, shape, valid), predict(made, shape, valid), label


def same_curve(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx({name: b[name] for name in a}, abs=TOLERANCE)


@pytest.mark.parametrize(("model", "sharding"), [("dlrm", ["table_wise"]), ("din", ["row_wise"])])
def test_two_processes_train_as_one_and_one_goes_on_from_two(source, catalogue, tmp_path, model, sharding):
    two = torchrun(2, tmp_path / "two", *source, "--model", model, "--epochs", str(EPOCHS), "--sharding", *sharding)
    history, alone, together, label = one_process(tmp_path / "two", catalogue, EPOCHS)
    part = pq.read_table(tmp_path / "two" / "examples.parquet")["part"].to_numpy()
    labels = np.array(two["labels"])  # [processes, epochs]; each has row groups of its own
    assert labels.sum(0).tolist() == [epoch["labels"] for epoch in history]
    assert history[0]["labels"] == np.count_nonzero(part == TRAIN)
    assert labels.min() > 0
    assert len(np.unique(np.flatnonzero(part == VALID) // GROUP_ROWS)) > 1
    same_curve(two["history"], history)
    # What was written is the best epoch, whole. (Weights may differ more: Adam makes steps of the noise of zeros.)
    assert np.abs(alone - together).max() < 1e-3
    assert log_loss(label, together) == pytest.approx(min(one["valid_loss"] for one in history), abs=TOLERANCE)
    assert not list((tmp_path / "two").glob("sharded*"))
    if model == "dlrm":  # fresh weights go from one process to two; here from two to one
        start = tmp_path / "two" / "model.pt"
        onward = torchrun(1, tmp_path / "one", *source, "--epochs", "1", "--weights", str(start))
        history, *_ = one_process(tmp_path / "one", catalogue, 1, start)
        same_curve(onward["history"], history)
        assert onward["history"][0]["train_loss"] < two["history"][0]["train_loss"] - 10 * TOLERANCE
