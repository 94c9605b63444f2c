"""The model repository keeps its contract: Triton's own schema, the tensor table, the ensemble's edges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from build.render import read_config, render
from sightline import release
from sightline.errors import ReleaseError
from sightline.features import HISTORY

SOURCE = Path(__file__).parents[2] / "model_repository"

# model → (backend, inputs, outputs); a tensor is (type, sizes without the batch; -1 where a release decides).
BYTES, INT32, INT64, FP32, BOOL, UINT8, UINT64 = (
    "TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT64",
)  # fmt: skip
CAPTIONS = {name: (BYTES, [1]) for name in ("CAPTION", "CAPTION_SOURCE", "CAPTION_ERROR")}
ANNOTATED = CAPTIONS | {"ANNOTATION": (BYTES, [1])}
PROFILE = {
    "PROFILE_TOKENS": (INT64, [-1]),
    "PROFILE_WEIGHTS": (FP32, [-1]),
    "PROFILE_NEGATIVE_TOKENS": (INT64, [-1]),
    "PROFILE_NEGATIVE_WEIGHTS": (FP32, [-1]),
}
INDICES = {"USER_INDEX": (INT64, [1]), "ITEM_INDEX": (INT64, [1])}
IDS = {"USER_ID": (INT64, [1]), "ITEM_ID": (INT64, [1])}
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "caption": ("python", {"MEDIA": (BYTES, [1])}, ANNOTATED),
    "vision_encoder": (
        "onnxruntime", {"pixel_values": (FP32, [3, -1, -1])},
        {"image_features": (FP32, [-1, -1]), "pooled_features": (FP32, [-1])},
    ),
    "tensorrt_llm": (
        "tensorrtllm",
        {
            "input_ids": (INT32, [-1]),
            **{name: (INT32, [1]) for name in (
                "input_lengths", "request_output_len", "end_id", "pad_id", "beam_width", "runtime_top_k",
                "prompt_vocab_size")},
            **{name: (FP32, [1]) for name in (
                "temperature", "runtime_top_p", "len_penalty", "repetition_penalty")},
            "seed": (UINT64, [1]), "stop": (BOOL, [1]), "streaming": (BOOL, [1]),
            "prompt_embedding_table": (FP32, [-1, -1]), "prompt_table_extra_ids": (UINT64, [-1]),
        },
        {"output_ids": (INT32, [-1, -1]), "sequence_length": (INT32, [-1])},
    ),
    "tokenize": ("python", {"CAPTION": (BYTES, [1])}, {"ITEM_TOKENS": (INT64, [-1])}),
    "lookup": ("python", IDS, INDICES | PROFILE | {"DENSE": (FP32, [-1])}),
    "embed": (
        "onnxruntime", INDICES | PROFILE | {"CONTEXT": (INT64, [-1]), "ITEM_TOKENS": (INT64, [-1])},
        {"FEATURES": (FP32, [-1, -1])},
    ),
    "score": ("onnxruntime", {"FEATURES": (FP32, [-1, -1]), "DENSE": (FP32, [-1])}, {"SCORE": (FP32, [1])}),
    "caption_llmapi": ("python", {"MEDIA": (BYTES, [1])}, ANNOTATED),
    "rank_media": (
        "", {"MEDIA": (BYTES, [1]), "CONTEXT": (INT64, [-1])} | IDS, {"SCORE": (FP32, [1])} | CAPTIONS,
    ),
    "rank_items": (
        "python", {"USER_ID": (INT64, [1]), "ITEM_IDS": (INT64, [-1]), "CONTEXT": (INT64, [-1])},
        {"SCORES": (FP32, [-1]), "FEATURE_STATUS": (UINT8, [-1])},
    ),
    "retrieve": (
        "python", {"MEDIA": (BYTES, [1]), "VECTOR": (FP32, [-1]), "K": (INT32, [1])},
        {"ITEM_IDS": (INT64, [-1]), "DISTANCES": (FP32, [-1]), "VERSIONS": (BYTES, [-1])},
    ),
    "events": ("python", IDS | {"STRENGTH": (FP32, [1]), "TIMESTAMP": (INT64, [1])}, {"APPLIED": (UINT8, [1])}),
}  # fmt: skip


def tensors(entries: Any) -> dict[str, tuple[str, list[int]]]:
    return {entry.name: (DataType.Name(entry.data_type), list(entry.dims)) for entry in entries}


def read_all(repository: Path) -> dict[str, ModelConfig]:
    return {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}


@pytest.fixture(params=["source", "release"])
def configs(request: pytest.FixtureRequest) -> dict[str, ModelConfig]:
    """The configurations as they are in the repository, then as a build wrote them."""
    if request.param == "source":
        return read_all(SOURCE)
    return read_all(release.current(request.getfixturevalue("releases_dir")) / "model_repository")


def test_the_repository_holds_exactly_the_models_of_the_table() -> None:
    assert {path.name for path in SOURCE.iterdir()} == set(TABLE)


@pytest.mark.parametrize("model", TABLE)
def test_tensors(model: str) -> None:
    backend, inputs, outputs = TABLE[model]
    config = read_config(SOURCE / model / "config.pbtxt")
    # A model that a lane puts in another's place takes its name from the folder.
    assert (config.name or model, config.backend) == (model, backend)
    assert tensors(config.input) == inputs
    assert tensors(config.output) == outputs
    assert config.max_batch_size > 0
    assert (SOURCE / model / "1" / "model.py").exists() == (backend == "python")


def test_tensorrt_llm_keeps_the_real_backends_form(configs: dict[str, ModelConfig]) -> None:
    config = configs["tensorrt_llm"]
    for tensor in config.input:
        scalar = list(tensor.dims) == [1]
        assert tensor.HasField("reshape") == scalar, f"{tensor.name}: scalars are reshaped to []"
        assert tensor.allow_ragged_batch == (not scalar), f"{tensor.name}: what varies in length is ragged"
    required = {tensor.name for tensor in config.input if not tensor.optional}
    assert required == {"input_ids", "input_lengths", "request_output_len"}
    assert config.parameters["gpt_model_type"].string_value == "inflight_fused_batching"


def test_onnx_models_have_no_optional_inputs(configs: dict[str, ModelConfig]) -> None:
    onnx = [config for config in configs.values() if config.backend == "onnxruntime"]
    assert len(onnx) == 3
    assert not any(tensor.optional for config in onnx for tensor in config.input)


def test_instances_leave_the_kind_to_triton(configs: dict[str, ModelConfig]) -> None:
    # KIND_GPU would fail on a CPU machine and KIND_CPU would waste a GPU; KIND_AUTO is right on both.
    assert all(
        group.kind == group.KIND_AUTO for config in configs.values() for group in config.instance_group
    )


def test_models_that_take_rows_batch_them(configs: dict[str, ModelConfig]) -> None:
    batching = {name for name, config in configs.items() if config.HasField("dynamic_batching")}
    assert batching == set(configs) - {"rank_media"}


def test_a_history_holds_the_events_of_a_request(configs: dict[str, ModelConfig]) -> None:
    """So a request that is sent again is known as a whole."""
    assert configs["events"].max_batch_size <= HISTORY


def test_ensemble_edges(configs: dict[str, ModelConfig]) -> None:
    ensemble = configs["rank_media"]
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert ensemble.max_batch_size <= model.max_batch_size
        taken = {key: known[value] for key, value in step.input_map.items()}
        assert taken == tensors(model.input), f"{step.model_name}: every input mapped, types and sizes equal"
        made = tensors(model.output)
        known |= {value: made[key] for key, value in step.output_map.items()}
    assert {name: known[name] for name in tensors(ensemble.output)} == tensors(ensemble.output)
    order = [step.model_name for step in ensemble.ensemble_scheduling.step]
    assert [name for name in order if name != "lookup"] == ["caption", "tokenize", "embed", "score"]
    (tokenize,) = (step for step in ensemble.ensemble_scheduling.step if step.model_name == "tokenize")
    assert tokenize.input_map["CAPTION"] == "ANNOTATION", "tokens are made of all that is known, not of the caption"


def test_caption_calls_fit(configs: dict[str, ModelConfig]) -> None:
    features = tensors(configs["vision_encoder"].output)["image_features"]
    table = tensors(configs["tensorrt_llm"].input)["prompt_embedding_table"]
    assert features[0] == table[0], "the features go into the table as they are"
    assert features[1][-1] == table[1][-1]


def test_a_release_leaves_no_size_open(releases_dir: Path) -> None:
    configs = read_all(release.current(releases_dir) / "model_repository")
    sizes = {
        (name, tensor.name): list(tensor.dims)
        for name, config in configs.items()
        for tensor in (*config.input, *config.output)
        if name != "tensorrt_llm" and tensor.name not in (
            "ITEM_IDS", "SCORES", "FEATURE_STATUS", "DISTANCES", "VERSIONS"
        )
    }
    assert not [key for key, dims in sizes.items() if -1 in dims]
    assert sizes["vision_encoder", "image_features"] == [16, 48]
    assert sizes["vision_encoder", "pooled_features"] == [32]
    assert list(configs["tensorrt_llm"].input[14].dims) == [-1, 48]


def test_a_release_tells_clients_its_context_and_id(releases_dir: Path) -> None:
    folder = release.current(releases_dir)
    for model in ("rank_media", "rank_items"):
        parameters = read_config(folder / "model_repository" / model / "config.pbtxt").parameters
        assert parameters["release"].string_value == folder.name
        context = json.loads(parameters["context"].string_value)
        assert [set(column) for column in context] == [{"name", "cardinality"}] * len(context)


def test_render_refuses_what_the_source_does_not_allow(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    path.write_text((SOURCE / "score" / "config.pbtxt").read_text())
    with pytest.raises(ReleaseError, match=r"SCORE is \[2\] in this build, config.pbtxt allows \[1\]"):
        render(path, {"SCORE": [2]})
    with pytest.raises(ReleaseError, match="expected a parameter 'nonsense'"):
        render(path, {}, {"nonsense": "1"})
    path.write_text("name: 3")
    with pytest.raises(ReleaseError, match="not a Triton model configuration"):
        read_config(path)
