"""Small captioners and rankers with random weights, for tests that need the files and not the knowledge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from trainer.captioner_model import BOS, EOS, IMAGE, PAD, save_captioner, train_tokenizer

TOKENS, PROFILE, DIM, ROWS = 8, 6, 4, 100

CAPTIONS = [
    "a large red circle with stripes on a white background",
    "three small blue stars on a dark table",
    "a green triangle moving left across the snow",
    "two yellow mugs with dots in a garden",
]


def tiny_captioner(folder: Path, seed: int = 0, *, version: str = "test-captioner", layer: int = -2) -> Path:
    """A LLaVA folder: CLIP tower of 2 layers on 32 × 32 pixels, LLaMA decoder of 2 layers, random weights."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=320)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            image_size=32, patch_size=8, projection_dim=32,
        ),
        text_config=LlamaConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=96, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=512,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
        ),
        image_token_id=IMAGE, image_seq_length=16, vision_feature_layer=layer,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Random weights of the usual scale say the same of every picture; these tell pictures apart.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    save_captioner(model, tokenizer, folder, version=version, frames=4, max_new_tokens=12)
    return folder


def tiny_ranker(
    folder: Path,
    seed: int = 0,
    *,
    captioner_version: str = "test-captioner",
    token_spec_version: str = "test-spec",
) -> Path:
    """A ranker folder without weights: two known users, two known items, two context columns."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "version": "test-ranker", "token_spec_version": token_spec_version,
        "captioner_version": captioner_version,
        "context": [{"name": "position", "cardinality": 4}, {"name": "hour", "cardinality": 24}],
        "token_length": TOKENS, "profile_length": PROFILE, "dense": ["age", "activity"],
        "features": 5, "dim": DIM,
    }  # fmt: skip
    (folder / "ranker.json").write_text(json.dumps(record))
    (folder / "token_spec.json").write_text(json.dumps({"version": token_spec_version, "length": TOKENS}))
    users = [0, 7, 42]
    pq.write_table(
        pa.table({
            "user_id": pa.array(users, pa.int64()),
            "user_index": pa.array(range(len(users)), pa.int64()),
            "profile_tokens": pa.array(random.integers(0, ROWS, (3, PROFILE)).tolist(), pa.list_(pa.int64())),
            "profile_weights": pa.array(random.random((3, PROFILE)).tolist(), pa.list_(pa.float32())),
            "dense": pa.array(random.random((3, 2)).tolist(), pa.list_(pa.float32())),
        }),
        folder / "users.parquet",
    )  # fmt: skip
    pq.write_table(pa.table({"item_id": [0, 5, 9], "item_index": [0, 1, 2]}), folder / "items.parquet")
    return folder


def export_tiny_ranker(ranker_dir: Path, out_dir: Path) -> dict[str, int]:
    """`embed.onnx` and `score.onnx` of the ranker's sizes with random weights."""
    random = np.random.default_rng(1)

    def weight(*shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(
            random.normal(size=shape).astype(np.float32), f"w{random.integers(1 << 30)}"
        )

    inputs = {
        "USER_INDEX": 1,
        "ITEM_INDEX": 1,
        "CONTEXT": 2,
        "ITEM_TOKENS": TOKENS,
        "PROFILE_TOKENS": PROFILE,
    }
    weights, nodes = [], []
    for name in inputs:
        table = weight(ROWS, DIM)
        weights.append(table)
        nodes.append(helper.make_node("Gather", [table.name, name], [f"{name}.rows"]))
        rows = f"{name}.rows"
        if name == "PROFILE_TOKENS":
            nodes.append(helper.make_node("Unsqueeze", ["PROFILE_WEIGHTS", "last"], ["weights"]))
            nodes.append(helper.make_node("Mul", [rows, "weights"], ["weighted"]))
            rows = "weighted"
        nodes.append(helper.make_node("ReduceSum", [rows, "one"], [f"{name}.sum"], keepdims=1))
    nodes.append(helper.make_node("Concat", [f"{name}.sum" for name in inputs], ["FEATURES"], axis=1))
    axes = [numpy_helper.from_array(np.array([axis]), name) for name, axis in (("one", 1), ("last", 2))]
    _save(
        out_dir / "embed.onnx",
        nodes,
        weights + axes,
        [_tensor(name, TensorProto.INT64, size) for name, size in inputs.items()]
        + [_tensor("PROFILE_WEIGHTS", TensorProto.FLOAT, PROFILE)],
        _tensor("FEATURES", TensorProto.FLOAT, 5, DIM),
    )
    dense = weight(5 * DIM + 2, 1)
    _save(
        out_dir / "score.onnx",
        [
            helper.make_node("Flatten", ["FEATURES"], ["flat"], axis=1),
            helper.make_node("Concat", ["flat", "DENSE"], ["all"], axis=1),
            helper.make_node("MatMul", ["all", dense.name], ["logit"]),
            helper.make_node("Sigmoid", ["logit"], ["SCORE"]),
        ],
        [dense],
        [_tensor("FEATURES", TensorProto.FLOAT, 5, DIM), _tensor("DENSE", TensorProto.FLOAT, 2)],
        _tensor("SCORE", TensorProto.FLOAT, 1),
    )
    return {"features": 5, "dim": DIM}


def _tensor(name: str, kind: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def _save(path: Path, nodes: list[Any], weights: list[Any], inputs: list[Any], output: Any) -> None:
    graph = helper.make_graph(nodes, path.stem, inputs, [output], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
