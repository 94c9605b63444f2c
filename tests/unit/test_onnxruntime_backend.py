"""The onnxruntime stand-in holds a model to the C++ backend's rules and batches as it does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.fake_triton import Request, TritonModelException, load_model

backend = load_model("backends/onnxruntime/model.py")

# SUM = A + B over [batch, 3]
CONFIG: dict[str, Any] = {
    "name": "sum",
    "max_batch_size": 8,
    "default_model_filename": "model.onnx",
    "input": [{"name": "A", "data_type": "TYPE_FP32", "dims": ["3"]},
              {"name": "B", "data_type": "TYPE_FP32", "dims": ["3"]}],
    "output": [{"name": "SUM", "data_type": "TYPE_FP32", "dims": ["3"]}],
    "parameters": {"intra_op_thread_count": {"string_value": "1"}},
}  # fmt: skip


def load(folder: Path, batch: str | int = "batch", **change: Any) -> Any:
    (folder / "1").mkdir()
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in ("A", "B", "SUM")
    ]
    graph = helper.make_graph([helper.make_node("Add", ["A", "B"], ["SUM"])], "sum", tensors[:2], tensors[2:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        folder / "1" / "model.onnx",
    )
    model = backend.TritonPythonModel()
    model.initialize(
        {
            "model_config": json.dumps(copy.deepcopy(CONFIG) | change),
            "model_repository": str(folder),
            "model_version": "1",
        }
    )
    return model


def test_requests_are_run_together_and_split(tmp_path: Path) -> None:
    model = load(tmp_path)
    runs = []
    run = model.session.run
    model.session = type("Counted", (), {"run": lambda self, *args: runs.append(1) or run(*args)})()
    values = [np.full((rows, 3), rows, np.float32) for rows in (1, 3, 2)]
    responses = model.execute([Request(["SUM"], A=value, B=2 * value) for value in values])
    assert len(runs) == 1
    for response, value in zip(responses, values, strict=True):
        np.testing.assert_array_equal(response.tensors["SUM"], 3 * value)


def test_a_failing_run_fails_its_batch(tmp_path: Path) -> None:
    wrong = np.zeros((1, 4), np.float32)
    responses = load(tmp_path).execute([Request(["SUM"], A=wrong, B=wrong)] * 2)
    assert [response.error.code for response in responses] == ["INTERNAL"] * 2


A, B = CONFIG["input"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [A]}, "configuration expects 1 inputs, the graph provides 2"),
        ({"input": [A, B, B | {"name": "C"}]}, "expects 3 inputs"),
        ({"input": [A, B | {"name": "b"}]}, "unexpected input 'b', allowed inputs are: A, B"),
        ({"output": [A | {"name": "TOTAL"}]}, "unexpected output 'TOTAL'"),
        ({"input": [A, B | {"data_type": "TYPE_INT64"}]}, r"'B': the graph has tensor\(float\).*TYPE_INT64"),
        ({"input": [A, B | {"dims": ["4"]}]}, r"'B': the graph has the shape \[-1, 3\].*\[-1, 4\]"),
        ({"input": [A, B | {"dims": ["3", "1"]}]}, "'B': the graph has the shape"),
        ({"input": [A, B | {"dims": ["-1"]}]}, "'B': the graph has the shape"),
        ({"input": [A, B | {"optional": True}]}, r"optional inputs \['B'\] need max_batch_size 0"),
    ],
)  # fmt: skip
def test_violations_do_not_load(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TritonModelException, match=message):
        load(tmp_path, **change)


def test_batching_needs_a_dynamic_first_dimension(tmp_path: Path) -> None:
    with pytest.raises(TritonModelException, match="first dimension is -1, got \\[8, 3\\]"):
        load(tmp_path, batch=8)


def test_a_graph_that_is_missing_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(TritonModelException, match=r"other\.onnx"):
        load(tmp_path, default_model_filename="other.onnx")


def test_without_batching_the_shapes_are_the_graphs(tmp_path: Path) -> None:
    dims = ["8", "3"]
    model = load(
        tmp_path,
        batch=8,
        max_batch_size=0,
        input=[A | {"dims": dims}, B | {"dims": dims}],
        output=[CONFIG["output"][0] | {"dims": dims}],
    )
    value = np.ones((8, 3), np.float32)
    responses = model.execute([Request(["SUM"], A=value, B=value)] * 2)
    np.testing.assert_array_equal(responses[1].tensors["SUM"], 2 * value)
