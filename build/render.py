"""Source `config.pbtxt` → a release's: sizes and parameters filled in, through Triton's own protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from sightline.errors import ReleaseError


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """Parse one `config.pbtxt`. Raises ReleaseError with the line where Triton's schema is broken."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ReleaseError(f"{path}: not a Triton model configuration: {error}") from error


def render(
    path: Path,
    dims: Mapping[str, Sequence[int]],
    parameters: Mapping[str, str] | None = None,
    max_batch_size: int | None = None,
) -> model_config_pb2.ModelConfig:
    """Rewrite `path` with the sizes of every tensor in `dims` (without the batch), `parameters` and the batch size.

    Raises:
        ReleaseError: a size contradicts one that the source fixes, or the source lacks a parameter.
    """
    config = read_config(path)
    for tensor in (*config.input, *config.output):
        if tensor.name not in dims:
            continue
        source, exact = list(tensor.dims), list(dims[tensor.name])
        if len(source) != len(exact) or any(s not in (-1, e) for s, e in zip(source, exact, strict=True)):
            raise ReleaseError(
                f"{path.parent.name}: {tensor.name} is {exact} in this build, config.pbtxt allows {source}"
            )
        tensor.dims[:] = exact
    for key, value in (parameters or {}).items():
        if key not in config.parameters:
            raise ReleaseError(f"{path}: expected a parameter {key!r} to fill in")
        config.parameters[key].string_value = value
    if max_batch_size is not None:
        config.max_batch_size = max_batch_size
    path.write_text(text_format.MessageToString(config))
    return config
