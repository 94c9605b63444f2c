"""A release's `configs/gpu.pbtxt`: what a GPU node reads in place of config.pbtxt (`--model-config-name=gpu`).

Each is its model's finished config.pbtxt with the GPU's settings put in, so names, types and sizes cannot drift
apart. Accelerator keys are held to the recorded table of the onnxruntime backend, which refuses to load a model
with a key that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from build.plan import Plan
from build.records import load
from build.render import read_config
from sightline.errors import ReleaseError
from sightline.node import CACHE, MOUNT

ModelConfig = model_config_pb2.ModelConfig
GPU = model_config_pb2.ModelInstanceGroup.KIND_GPU
CPU = model_config_pb2.ModelInstanceGroup.KIND_CPU
WORKSPACE = 2**30
QUEUE_BATCHES = 8  # requests that may wait for the decoder, in batches; more are refused at once
QUEUE_DELAY_US = 2000
CANCELLATION_MS = 100


def write_onnx_configs(models: Path, batches: Mapping[str, int], precision: str) -> None:
    """Write configs/gpu.pbtxt of vision_encoder, embed and score: TensorRT through the onnxruntime backend.

    Args:
        models: the release's model repository, config.pbtxt files finished.
        batches: model → batch that TensorRT optimises for (`trt_profile_opt_shapes`).
        precision: `fp16` or `fp32`, as checked by the build.
    """
    for name, batch in batches.items():
        config = read_config(models / name / "config.pbtxt")
        del config.instance_group[:]
        config.instance_group.add(count=1, kind=GPU, gpus=[0])
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        for key, value in accelerator_parameters(config, min(batch, config.max_batch_size), precision).items():
            accelerator.parameters[key] = value
        # TensorRT compiles at the first inference of a shape: let that be before the model counts as loaded.
        warmup = config.model_warmup.add(name="largest batch", batch_size=config.max_batch_size)
        for tensor in config.input:
            entry = warmup.inputs[tensor.name]
            entry.data_type, entry.zero_data = tensor.data_type, True
            entry.dims[:] = tensor.dims
        _write(models / name, config)


def accelerator_parameters(config: ModelConfig, batch: int, precision: str) -> dict[str, str]:
    """Parameters of the TensorRT accelerator for a model whose only free dimension is the batch.

    Raises:
        ReleaseError: a size is not known yet; or, which would be a bug, the backend knows no such key.
    """
    free = [tensor.name for tensor in config.input if -1 in tensor.dims]
    if free:
        raise ReleaseError(f"{config.name}: expected every size of {', '.join(free)} to be filled in by the build")

    def profile(rows: int) -> str:
        return ",".join(f"{t.name}:{'x'.join(map(str, [rows, *t.dims]))}" for t in config.input)

    # A folder for each model: ONNX Runtime names what it keeps by the graph and not by its weights.
    cache = f"{CACHE}/{config.name}"
    static = config.max_batch_size == 1
    parameters = {
        "precision_mode": precision.upper(),
        "max_workspace_size_bytes": str(WORKSPACE),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": cache,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": cache,
        "trt_profile_min_shapes": profile(1),
        "trt_profile_opt_shapes": profile(batch),
        "trt_profile_max_shapes": profile(config.max_batch_size),
        # A graph is captured for one shape; with a free batch it would be captured again and again.
        "trt_cuda_graph_enable": "1" if static else "0",
    }
    known = load("onnxruntime_tensorrt")["tensorrt"]["parameters"]
    for key, value in parameters.items():
        if key not in known or (known[key]["choices"] and value not in known[key]["choices"]):
            raise ReleaseError(f"{config.name}: this is a bug: the onnxruntime backend knows no {key}={value}")
    return parameters


def write_engine_config(models: Path, plan: Plan) -> None:
    """Write configs/gpu.pbtxt of tensorrt_llm for the C++ backend, and of caption, which sends its table in the
    engine's type.

    Paged KV cache, in-flight batching, chunked context and KV reuse as planned; requests beyond the queue are
    refused at once.
    """
    assert plan.options is not None
    assert plan.budget is not None
    options, folder = plan.options, models / "tensorrt_llm"
    config = read_config(folder / "config.pbtxt")
    table_type = "TYPE_BF16" if options.dtype == "bfloat16" else "TYPE_FP16"
    config.max_batch_size = options.batch
    for tensor in config.input:
        if tensor.name == "prompt_embedding_table":
            tensor.data_type = model_config_pb2.DataType.Value(table_type)
    del config.instance_group[:]
    config.instance_group.add(count=1, kind=CPU)  # the backend places the engine itself
    batching = config.dynamic_batching
    batching.preferred_batch_size[:] = [options.batch]
    batching.max_queue_delay_microseconds = QUEUE_DELAY_US
    batching.default_queue_policy.max_queue_size = QUEUE_BATCHES * options.batch
    chunked = plan.limits["max_num_tokens"] < plan.limits["max_input_len"] or options.kv_reuse
    parameters = {
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": f"{MOUNT}/model_repository/tensorrt_llm/1/engine",
        "max_beam_width": "1",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": f"{plan.budget.kv_fraction:.2f}",
        "enable_kv_cache_reuse": str(options.kv_reuse).lower(),
        "enable_chunked_context": str(chunked).lower(),
        "exclude_input_in_output": "true",
        "cancellation_check_period_ms": str(CANCELLATION_MS),
        "gpu_device_ids": ",".join(map(str, range(options.gpus))),
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }
    known = load("tensorrt_llm_model")["parameters"]
    config.parameters.clear()
    for key, value in parameters.items():
        if key not in known or (known[key]["values"] and value not in known[key]["values"]):
            raise ReleaseError(f"tensorrt_llm: this is a bug: the tensorrtllm backend knows no {key}={value}")
        config.parameters[key].string_value = value
    _write(folder, config)

    caption = read_config(models / "caption" / "config.pbtxt")
    caption.parameters["prompt_table_type"].string_value = table_type
    _write(models / "caption", caption)


def _write(model: Path, config: Any) -> None:
    (model / "configs").mkdir(exist_ok=True)
    (model / "configs" / "gpu.pbtxt").write_text(text_format.MessageToString(config))
