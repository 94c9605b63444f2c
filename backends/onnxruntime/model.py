"""CPU stand-in for Triton's C++ onnxruntime backend, used where `libtriton_onnxruntime.so` is not installed.

It holds a model to the rules of the real backend, so that a release which loads here loads there: input
count and names exact, a dynamic first dimension wherever the model batches, types and sizes equal, no
optional inputs in a batching model. The requests of one dynamic batch are concatenated, run once, and split
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}


def check(config: dict[str, Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Hold a model configuration against the graph's `inputs` and `outputs` (onnxruntime NodeArgs).

    Raises:
        ValueError: names the model, the tensor, what the graph has and what the configuration says.
    """
    name, batching = config["name"], config["max_batch_size"] > 0
    optional = [tensor["name"] for tensor in config["input"] if tensor.get("optional")]
    if batching and optional:
        raise ValueError(
            f"model '{name}': optional inputs {optional} need max_batch_size 0, "
            f"got {config['max_batch_size']}"
        )
    if len(config["input"]) != len(inputs):
        raise ValueError(
            f"model '{name}': configuration expects {len(config['input'])} inputs, "
            f"the graph provides {len(inputs)}"
        )
    for kind, tensors, nodes in (("input", config["input"], inputs), ("output", config["output"], outputs)):
        graph = {node.name: node for node in nodes}
        for tensor in tensors:
            node = graph.get(tensor["name"])
            if node is None:
                raise ValueError(
                    f"model '{name}': unexpected {kind} '{tensor['name']}', "
                    f"allowed {kind}s are: {', '.join(sorted(graph))}"
                )
            _check_tensor(f"model '{name}', {kind} '{tensor['name']}'", tensor, node, batching)


def _check_tensor(what: str, tensor: dict[str, Any], node: Any, batching: bool) -> None:
    if node.type != ONNX_TYPES.get(tensor["data_type"]):
        raise ValueError(f"{what}: the graph has {node.type}, the configuration {tensor['data_type']}")
    shape = [dim if isinstance(dim, int) else -1 for dim in node.shape]
    if batching and (not shape or shape[0] != -1):
        raise ValueError(
            f"{what}: batching needs a graph whose first dimension is -1, got {shape}; "
            "export it with a dynamic batch or set max_batch_size to 0"
        )
    expected = ([-1] if batching else []) + [int(dim) for dim in tensor["dims"]]
    if len(shape) != len(expected) or any(g not in (-1, c) for g, c in zip(shape, expected, strict=True)):
        raise ValueError(f"{what}: the graph has the shape {shape}, the configuration {expected}")


class TritonPythonModel:
    """One instance of one ONNX model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load `<model>/<version>/<default_model_filename>` and hold it to the rules above."""
        self.config = json.loads(args["model_config"])
        self.batching = self.config["max_batch_size"] > 0
        filename = self.config.get("default_model_filename") or "model.onnx"
        options = onnxruntime.SessionOptions()
        # The real backend's parameter; without it the session takes all cores.
        threads = self.config.get("parameters", {}).get("intra_op_thread_count")
        if threads:
            options.intra_op_num_threads = int(threads["string_value"])
        # Sessions of several models share the cores here: a waiting thread must not burn one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = Path(args["model_repository"], args["model_version"], filename)
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            check(self.config, self.session.get_inputs(), self.session.get_outputs())
        except Exception as error:
            raise pb_utils.TritonModelException(str(error)) from error
        pb_utils.Logger.log_info(
            f"{self.config['name']}: served by the python stand-in for the onnxruntime backend "
            f"(onnxruntime {onnxruntime.__version__}, CPU)"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run the requests of one batch; each tensor of a request is [rows, …] when the model batches."""
        try:
            if not self.batching:
                return [self._respond(request, self._run(self._feed([request]))) for request in requests]
            outputs = self._run(self._feed(requests))
            rows = [
                pb_utils.get_input_tensor_by_name(r, self.config["input"][0]["name"]).shape()[0]
                for r in requests
            ]
            ends = np.cumsum(rows)
            return [
                self._respond(request, {name: value[end - count : end] for name, value in outputs.items()})
                for request, count, end in zip(requests, rows, ends, strict=True)
            ]
        except Exception as error:
            # One graph run answers the whole batch, so it also fails as a whole, as in the real backend.
            failure = pb_utils.TritonError(f"onnxruntime: {error}", pb_utils.TritonError.INTERNAL)
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]

    def _feed(self, requests: list[Any]) -> dict[str, Any]:
        names = [tensor["name"] for tensor in self.config["input"]]
        parts = {name: [pb_utils.get_input_tensor_by_name(r, name) for r in requests] for name in names}
        return {
            name: np.concatenate([tensor.as_numpy() for tensor in tensors])
            if len(tensors) > 1
            else tensors[0].as_numpy()
            for name, tensors in parts.items()
            if tensors[0] is not None
        }

    def _run(self, feed: dict[str, Any]) -> dict[str, Any]:
        names = [tensor["name"] for tensor in self.config["output"]]
        return dict(zip(names, self.session.run(names, feed), strict=True))

    def _respond(self, request: Any, outputs: dict[str, Any]) -> Any:
        wanted = request.requested_output_names()
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(outputs[name])) for name in wanted]
        )
