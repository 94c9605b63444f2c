"""configs/gpu.pbtxt of an engine release: the schema of the server, the recorded tables of the backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from build.assemble import build_release
from build.engine import EngineOptions
from build.hardware import parse_gpus
from build.plan import ExportOptions, engine_plan
from build.records import load
from build.render import read_config
from serving.runtime import Runtime
from tests.fake_trtllm import install

ACCELERATED = ("vision_encoder", "embed", "score")


@pytest.fixture(scope="module")
def models(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model repository of an engine release for two A10, batch 8, 4 images."""
    folder = tmp_path_factory.mktemp("engine")
    gpu, gpus = parse_gpus("2xa10")
    options = EngineOptions(gpu=gpu, gpus=gpus, batch=8, images=4, vision_batch=16)
    with pytest.MonkeyPatch.context() as patch:
        install(folder, patch, "2xa10")
        plan = engine_plan(
            parts / "captioner", parts / "ranker", folder / "build", ExportOptions(), options,
            examples=str(folder / "examples"),
        )  # fmt: skip
        name = build_release(parts / "captioner", parts / "ranker", folder / "releases", plan=plan)
    return folder / "releases" / name / "model_repository"


def gpu_config(models: Path, model: str) -> ModelConfig:
    return read_config(models / model / "configs" / "gpu.pbtxt")


def schema_of_the_server() -> Any:
    """ModelConfig as tritonserver 2.51 (24.10) was built with: its descriptor lies in the binary."""
    binary = Runtime.find().binary.read_bytes()
    start = binary.index(b"\x0a\x12model_config.proto")
    file = descriptor_pb2.FileDescriptorProto()
    file.ParseFromString(binary[start : binary.index(b"b\x06proto3", start) + 8])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def test_the_servers_own_schema_reads_every_configuration(models: Path) -> None:
    """Triton refuses a configuration with a field that it does not know: 24.10 knows all that are used."""
    schema = schema_of_the_server()
    with pytest.raises(text_format.ParseError, match="max_inflight_requests"):  # a field of 25.11
        text_format.Parse("ensemble_scheduling { max_inflight_requests: 1 }", schema())
    configurations = [*models.glob("*/config.pbtxt"), *models.glob("*/configs/gpu.pbtxt")]
    assert len(configurations) == 11 + 5
    for path in configurations:
        text_format.Parse(path.read_text(), schema())


@pytest.mark.parametrize("model", [*ACCELERATED, "tensorrt_llm", "caption"])
def test_tensors_stay_those_of_the_plain_configuration(models: Path, model: str) -> None:
    plain, gpu = read_config(models / model / "config.pbtxt"), gpu_config(models, model)
    assert (gpu.name, gpu.backend) == (plain.name, plain.backend)
    for ours, theirs in zip((*gpu.input, *gpu.output), (*plain.input, *plain.output), strict=True):
        if ours.name == "prompt_embedding_table":  # in the engine's own type
            assert DataType.Name(ours.data_type) == "TYPE_FP16"
            ours.data_type = theirs.data_type
        assert ours == theirs


@pytest.mark.parametrize("model", ACCELERATED)
def test_tensorrt_gets_the_releases_own_limits(models: Path, model: str) -> None:
    config = gpu_config(models, model)
    (group,) = config.instance_group
    assert (group.kind, list(group.gpus)) == (group.KIND_GPU, [0])
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name in load("onnxruntime_tensorrt")["accelerator_names"]
    known = load("onnxruntime_tensorrt")["tensorrt"]
    for key, value in accelerator.parameters.items():
        assert key in known["parameters"]
        assert key not in known["forbidden_keys"]
        assert value in (known["parameters"][key]["choices"] or [value])
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_engine_cache_path"].endswith(f"/{model}")
    graph = onnx.load(models / model / "1" / "model.onnx").graph
    sizes = {
        value.name: [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim] for value in graph.input
    }
    batches = {}
    for bound in ("min", "opt", "max"):
        profile = dict(part.split(":") for part in accelerator.parameters[f"trt_profile_{bound}_shapes"].split(","))
        shapes = {name: [int(n) for n in shape.split("x")] for name, shape in profile.items()}
        assert {name: shape[1:] for name, shape in shapes.items()} == {name: s[1:] for name, s in sizes.items()}
        (batches[bound],) = {shape[0] for shape in shapes.values()}
    assert batches["min"] == 1 <= batches["opt"] <= batches["max"] == config.max_batch_size
    (warmup,) = config.model_warmup
    assert warmup.batch_size == config.max_batch_size
    assert set(warmup.inputs) == {tensor.name for tensor in config.input}


def test_graphs_are_of_versions_that_the_nodes_runtime_reads(models: Path) -> None:
    """ONNX Runtime 1.23 of the node's image: IR up to 11, opset up to 23."""
    for model in ACCELERATED:
        graph = onnx.load(models / model / "1" / "model.onnx", load_external_data=False)
        assert graph.ir_version <= 11
        assert max(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")) <= 23


@pytest.mark.parametrize("which", ["config.pbtxt", "configs/gpu.pbtxt"])
def test_the_decoder_keeps_the_recorded_table(models: Path, which: str) -> None:
    """Tensor by tensor as TensorRT-LLM's own config.pbtxt has them: stand-in and C++ backend speak the same."""
    recorded = load("tensorrt_llm_model")
    config = read_config(models / "tensorrt_llm" / which)
    for entries, table in ((config.input, recorded["inputs"]), (config.output, recorded["outputs"])):
        known = {tensor["name"]: tensor for tensor in table}
        for tensor in entries:
            theirs = known[tensor.name]
            if not theirs["data_type"].startswith("$"):  # else the engine decides
                assert DataType.Name(tensor.data_type) == theirs["data_type"]
            ours = list(tensor.dims)
            assert len(ours) == len(theirs["dims"])
            assert all(b in (-1, a) for a, b in zip(ours, theirs["dims"], strict=True))
            assert (list(tensor.reshape.shape) if tensor.HasField("reshape") else None) == theirs["reshape"]
            if hasattr(tensor, "allow_ragged_batch"):
                assert tensor.allow_ragged_batch == theirs["allow_ragged_batch"]
                assert not tensor.optional or theirs["optional"]
    missing = {t["name"] for t in recorded["inputs"] if not t["optional"]} - {t.name for t in config.input}
    assert not missing


def test_the_cpp_backends_parameters(models: Path) -> None:
    config = gpu_config(models, "tensorrt_llm")
    known = load("tensorrt_llm_model")["parameters"]
    values = {key: entry.string_value for key, entry in config.parameters.items()}
    for key, value in values.items():
        assert value in (known[key]["values"] or [value])
    assert values["gpt_model_type"] == "inflight_fused_batching"
    assert values["enable_kv_cache_reuse"] == values["enable_chunked_context"] == "true"
    assert 0 < float(values["kv_cache_free_gpu_mem_fraction"]) <= 0.9
    assert values["gpu_device_ids"] == "0,1"
    assert config.max_batch_size == 8
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 64
    caption = gpu_config(models, "caption")
    assert caption.parameters["prompt_table_type"].string_value == "TYPE_FP16"
    assert caption.max_batch_size == read_config(models / "rank_media" / "config.pbtxt").max_batch_size == 8
