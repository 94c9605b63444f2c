"""The part of `triton_python_backend_utils` that the models use, so that they run without a server."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
FINAL = 1


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._value

    def shape(self) -> tuple[int, ...]:
        return self._value.shape


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class Sender:
    """Of the one response to a request that is answered after `execute`."""

    def __init__(self) -> None:
        self.response: Future[InferenceResponse] = Future()
        self.cancelled = False

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == FINAL
        self.response.set_result(response)

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """An inference request with tensors by name; `limits` are what the caller said about its time."""

    def __init__(self, outputs: list[str], limits: dict[str, Any] | None = None, **inputs: np.ndarray) -> None:
        self.outputs, self.inputs, self.limits = outputs, inputs, dict(limits or {})
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def timeout(self) -> int:
        return int(self.limits.get("timeout", 0))

    def parameters(self) -> str:
        return json.dumps({key: value for key, value in self.limits.items() if key != "timeout"})

    def requested_output_names(self) -> list[str]:
        return self.outputs


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def load_model(path: str) -> Any:
    """The module of a `model.py` (path relative to the repository) with this file as Triton's utilities."""
    utilities: Any = ModuleType("triton_python_backend_utils")
    for part in (Tensor, TritonError, TritonModelException, InferenceResponse, get_input_tensor_by_name):
        setattr(utilities, part.__name__, part)
    utilities.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    utilities.Logger = SimpleNamespace(log_info=lambda message: None)
    sys.modules["triton_python_backend_utils"] = utilities
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
