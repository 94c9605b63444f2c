"""The part of `triton_python_backend_utils` that the models use, so that they run without a server."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]


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
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"

    def __init__(self, message: str, code: str) -> None:
        self.message, self.code = message, code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class Request:
    """An inference request with tensors by name."""

    def __init__(self, outputs: list[str], **inputs: np.ndarray) -> None:
        self.outputs, self.inputs = outputs, inputs

    def requested_output_names(self) -> list[str]:
        return self.outputs


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def load_model(path: str) -> Any:
    """The module of a `model.py` (path relative to the repository) with this file as Triton's utilities."""
    utilities: Any = ModuleType("triton_python_backend_utils")
    for part in (Tensor, TritonError, TritonModelException, InferenceResponse, get_input_tensor_by_name):
        setattr(utilities, part.__name__, part)
    utilities.Logger = SimpleNamespace(log_info=lambda message: None)
    sys.modules["triton_python_backend_utils"] = utilities
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
