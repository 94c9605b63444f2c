"""Ranker folder → `embed.onnx` and `score.onnx`, and `items.onnx` and `rank.onnx` for one user and many items; eager
and exported must agree before anything is kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from sightline.errors import ReleaseError
from trainer.item_graphs import ItemGraph, RankGraph
from trainer.ranker_model import EmbedGraph, Ranker, RankerShape, ScoreGraph, new_ranker

TOLERANCE = 1e-5  # absolute, on FEATURES and on SCORE: FP32 sums in another order
ROWS = 7  # of the comparison; no power of two, so a fixed batch size cannot hide


def export_ranker(ranker_dir: str | Path, out_dir: str | Path) -> dict[str, Any]:
    """Write `embed.onnx`, `score.onnx`, `items.onnx` and `rank.onnx` with a free batch dimension.

    Tensor names are those of the Triton contract. A ranker without a content feature group keeps that input:
    the graph takes it and does not read it, so that every release has one contract.

    Returns:
        `ranker.json` plus the largest differences between eager and ONNX: `embed_error`, `score_error`,
        `items_error`, and `rank_error` between `embed` → `score` and `items` → `rank`.

    Raises:
        ReleaseError: the graphs differ from the model by more than `TOLERANCE`, or the ranker reads nothing of an item.
    """
    ranker_dir, out_dir = Path(ranker_dir), Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = json.loads((ranker_dir / "ranker.json").read_text())
    shape = RankerShape.from_json(document["shape"])
    model = new_ranker(shape, seed=0)
    model.load_state_dict(torch.load(ranker_dir / "model.pt", weights_only=True))
    model.eval()
    embed, score = EmbedGraph(model).eval(), ScoreGraph(model).eval()

    inputs = example_inputs(document)
    ids = {name: value for name, value in inputs.items() if name != "DENSE"}
    embed_error = _export(embed, ids, "FEATURES", out_dir / "embed.onnx")
    with torch.no_grad():
        features = embed(*ids.values())
    score_error = _export(
        score, {"FEATURES": features, "DENSE": inputs["DENSE"]}, "SCORE", out_dir / "score.onnx"
    )
    return {
        **document, "embed_error": embed_error, "score_error": score_error, **_export_item_path(model, inputs, out_dir)
    }  # fmt: skip


def _export_item_path(model: Ranker, inputs: dict[str, Tensor], out_dir: Path) -> dict[str, float]:
    """The first row's user and context with every row's item."""
    of_item = {name: inputs[name] for name in ("ITEM_INDEX", "ITEM_TOKENS", "ITEM_VECTOR") if name in inputs}
    of_user = {name: value[:1] for name, value in inputs.items() if name not in of_item}
    items, rank = ItemGraph(model).eval(), RankGraph(model).eval()
    items_error = _export(items, of_item, "ITEM_FEATURES", out_dir / "items.onnx")
    with torch.no_grad():
        everything = of_item | {name: value.expand(ROWS, -1) for name, value in of_user.items()}
        ids = [everything[name] for name in inputs if name != "DENSE"]
        expected = ScoreGraph(model).eval()(EmbedGraph(model).eval()(*ids), everything["DENSE"])[:, 0]
        of_user["ITEM_FEATURES"] = items(*of_item.values())
    error = _export(rank, of_user, "SCORES", out_dir / "rank.onnx", free=("ITEM_FEATURES", "SCORES"), expected=expected)
    return {"items_error": items_error, "rank_error": error}


def example_inputs(document: dict[str, Any]) -> dict[str, Tensor]:
    """Random valid inputs of a ranker (its `ranker.json`) in the order of `EmbedGraph.forward`, then DENSE."""
    shape = RankerShape.from_json(document["shape"])
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, shape.token_rows, (ROWS, document["token_length"]))
    tokens[0] = 0  # an item without a caption
    length = document["profile"]["length"]
    profile, negative = (rng.integers(0, shape.token_rows, (ROWS, length)) for _ in range(2))
    weights, negative_weights = (rng.dirichlet(np.ones(length), ROWS).astype(np.float32) for _ in range(2))
    weights[1] = negative_weights[2] = 0  # users without likes, without dislikes
    # A ranker that does not read the context takes the log's columns all the same.
    columns = shape.context or {column["name"]: column["cardinality"] for column in document["context"]}
    context = np.stack([rng.integers(0, n, ROWS) for n in columns.values()], 1)
    values = {
        "USER_INDEX": rng.integers(0, shape.users, (ROWS, 1)),
        "ITEM_INDEX": rng.integers(0, shape.items, (ROWS, 1)),
        "CONTEXT": context,
        "ITEM_TOKENS": tokens,
        "PROFILE_TOKENS": profile,
        "PROFILE_WEIGHTS": weights,
        "PROFILE_NEGATIVE_TOKENS": negative,
        "PROFILE_NEGATIVE_WEIGHTS": negative_weights,
    }
    if shape.item_vector:
        values["ITEM_VECTOR"] = rng.normal(size=(ROWS, shape.item_vector)).astype(np.float32)
    values["DENSE"] = rng.normal(size=(ROWS, shape.dense)).astype(np.float32)
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _export(
    graph: nn.Module, inputs: dict[str, Tensor], output: str, path: Path, *, free: Sequence[str] = (),
    expected: Tensor | None = None,
) -> float:  # fmt: skip
    """Write the graph and return its largest difference to what is expected, by default to eager; the first dimension
    is free in all tensors, or in those that are named.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            graph, tuple(inputs.values()), path, input_names=list(inputs), output_names=[output],
            dynamic_axes={name: {0: "batch"} for name in free or (*inputs, output)}, dynamo=False,
        )  # fmt: skip
        eager = (graph(*inputs.values()) if expected is None else expected).numpy()
    _declare(path, inputs, free or tuple(inputs))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    if names != list(inputs):
        raise ReleaseError(f"{path.name}: expected inputs {list(inputs)}, the graph has {names}")
    exported = session.run([output], {name: value.numpy() for name, value in inputs.items()})[0]
    error = float(np.abs(eager - exported).max())
    if not error <= TOLERANCE:
        raise ReleaseError(
            f"{path.name}: eager and ONNX differ by {error:.2e}; expected at most {TOLERANCE:g}"
        )
    return error


def _declare(path: Path, inputs: dict[str, Tensor], free: Sequence[str]) -> None:
    """The exporter leaves out inputs that nothing reads; a group that is off is still part of the contract."""
    model = onnx.load(path, load_external_data=False)
    found = {tensor.name: tensor for tensor in model.graph.input}
    for name, value in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.numpy().dtype)
        rows = "batch" if name in free else value.shape[0]
        found.setdefault(name, onnx.helper.make_tensor_value_info(name, kind, [rows, *value.shape[1:]]))
    del model.graph.input[:]
    model.graph.input.extend(found[name] for name in inputs)
    onnx.save(model, path)
