"""The decoder equals LlamaForCausalLM, row by row and in batches, and keeps the tensorrtllm contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fake_triton import Request, TritonModelException, load_model

VOCAB, HIDDEN = 64, 32
backend = load_model("backends/tensorrtllm/model.py")
Decoder, Prompt = backend.Decoder, backend.Prompt
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where torch sees no CUDA device")


@pytest.fixture(params=["dynamic", "static", pytest.param("graph", marks=needs_gpu)])
def decoder(request: pytest.FixtureRequest, llama: Path) -> Any:
    """Steps over a growing cache, steps of constant shapes, and those as CUDA graphs."""
    device = "cuda" if request.param == "graph" else "cpu"
    return Decoder(llama / "1" / "decoder", device=device, steps=request.param)


@pytest.fixture(scope="module", params=[4, 2], ids=["multi-head", "grouped"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with `1/decoder`: 2 layers of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param, max_position_embeddings=64, rope_theta=500.0,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("tensorrt_llm")
    model.save_pretrained(folder / "1" / "decoder")
    return folder


def prompts(count: int, max_new: int = 12, end_id: int = -1) -> list[Any]:
    """Prompts of different lengths; every second one has a table of 5 rows in front of its tokens."""
    random = np.random.default_rng(3)
    made = []
    for i in range(count):
        ids = random.integers(0, VOCAB, 3 + 2 * i)
        table = None
        if i % 2:
            table = random.normal(size=(5, HIDDEN)).astype(np.float32)
            ids = np.concatenate([[1], VOCAB + np.arange(5), ids])
        made.append(Prompt(ids=ids, table=table, max_new=max_new - i % 3, end_id=end_id))
    return made


def reference(folder: Path, prompt: Any) -> list[int]:
    """The same continuation by transformers, without a cache: every step sees the whole sequence."""
    model = LlamaForCausalLM.from_pretrained(folder / "1" / "decoder").eval()
    embedding = model.get_input_embeddings().weight
    rows = embedding if prompt.table is None else torch.cat([embedding, torch.tensor(prompt.table)])
    x = rows[torch.tensor(prompt.ids)]
    generated: list[int] = []
    with torch.inference_mode():
        while len(generated) < prompt.max_new:
            token = int(model(inputs_embeds=x[None]).logits[0, -1].argmax())
            if token == prompt.end_id:
                break
            generated.append(token)
            x = torch.cat([x, embedding[token][None]])
    return generated


def test_equals_transformers_in_one_batch(llama: Path, decoder: Any) -> None:
    batch = prompts(6)
    generated = decoder.generate(batch)
    assert generated == [reference(llama, prompt) for prompt in batch]
    assert len({tuple(ids) for ids in generated}) == 6, "prompts that all continue alike would hide a mix-up"


def test_batch_equals_single(decoder: Any) -> None:
    batch = prompts(6)
    # The single ones come first, so that the memory for states has to grow.
    assert [decoder.generate([prompt])[0] for prompt in batch] == decoder.generate(batch)


def test_rows_that_end_early_leave_the_others_alone(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prompts(6)
    free = decoder.generate(batch)
    # Each row in turn ends at its own third token; the batch shrinks at different times.
    stopped = [
        Prompt(ids=p.ids, table=p.table, max_new=p.max_new, end_id=out[2])
        for p, out in zip(batch, free, strict=True)
    ]
    assert decoder.generate(stopped) == [out[: out.index(out[2])] for out in free]
    # Rows 1 and 4 go on for longer and move to the front.
    uneven = [
        Prompt(ids=p.ids, table=p.table, max_new=len(out) if i in (1, 4) else 1 + i % 2, end_id=-1)
        for i, (p, out) in enumerate(zip(batch, free, strict=True))
    ]
    step, widths = decoder.step, []

    def watched(state: Any) -> Any:
        widths.append(len(state.tokens))
        return step(state)

    monkeypatch.setattr(decoder, "step", watched)
    assert decoder.generate(uneven) == [out[: p.max_new] for p, out in zip(uneven, free, strict=True)]
    assert len(widths) == max(p.max_new for p in uneven) - 1
    assert widths[-1] == 2
    assert widths == sorted(widths, reverse=True)


def test_nothing_of_a_batch_reaches_the_next(decoder: Any) -> None:
    batch = prompts(6)
    expected = decoder.generate(batch)
    poison = Prompt(ids=np.full(20, VOCAB), table=np.full((1, HIDDEN), np.nan, np.float32), max_new=12, end_id=-1)
    decoder.generate([poison] * 6)
    assert decoder.generate(batch) == expected


def test_logits_of_steps_equal_transformers(llama: Path, decoder: Any) -> None:
    batch, model = prompts(3), LlamaForCausalLM.from_pretrained(llama / "1" / "decoder").eval()
    forced = torch.tensor([7, 8, 9])
    with torch.inference_mode():
        state, first = decoder.prefill(batch)
        state.tokens[:3] = forced.to(state.tokens.device)
        second = decoder.step(state)[:3]
        embedding = model.get_input_embeddings().weight
        for i, prompt in enumerate(batch):
            rows = embedding if prompt.table is None else torch.cat([embedding, torch.tensor(prompt.table)])
            x = torch.cat([rows[torch.tensor(prompt.ids)], embedding[forced[i : i + 1]]])
            expected = model(inputs_embeds=x[None]).logits[0, -2:]
            # float32 in another order of summation; logits reach some 20
            torch.testing.assert_close(torch.stack([first[i], second[i]]).cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_table_may_be_a_tensor(decoder: Any) -> None:
    batch = prompts(4)
    tensors = [
        Prompt(ids=p.ids, table=None if p.table is None else torch.tensor(p.table), max_new=p.max_new, end_id=-1)
        for p in batch
    ]
    assert decoder.generate(tensors) == decoder.generate(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"steps": "graph"}, "steps: graph needs device cuda"),
        pytest.param({"device": "cuda"}, "device: cuda asked for, but torch .* sees no CUDA device", marks=without_gpu),
    ],
)
def test_a_device_that_is_not_there_is_refused(llama: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(llama / "1" / "decoder", **options)


def ask(**inputs: Any) -> Request:
    """A request of one row: three tokens in, four out, unless told otherwise."""
    values: dict[str, Any] = {
        "input_ids": np.array([[1, 5, 9]], np.int32), "input_lengths": np.array([3], np.int32),
        "request_output_len": np.array([4], np.int32),
    } | inputs  # fmt: skip
    return Request(["output_ids", "sequence_length"], **values)


def served(folder: Path, **parameters: str) -> Any:
    model = backend.TritonPythonModel()
    config = {
        "name": "tensorrt_llm",
        "parameters": {
            key: {"string_value": value}
            for key, value in {"gpt_model_path": "1/decoder", **parameters}.items()
        },
    }
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"}
    )
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_device_is_a_parameter_and_in_the_log(llama: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(backend.pb_utils.Logger, "log_info", lines.append)
    model = served(llama, device=device)
    assert model.decoder.embedding.device.type == device
    assert ("CPU, " if device == "cpu" else torch.cuda.get_device_name()) in lines[0]
    assert model.execute([ask()])[0].tensors["sequence_length"].tolist() == [[7]]


@without_gpu
def test_a_model_for_cuda_does_not_load_without(llama: Path) -> None:
    with pytest.raises(TritonModelException, match="tensorrt_llm: device: cuda asked for"):
        served(llama, device="cuda")


def test_output_ids_with_and_without_the_input(llama: Path) -> None:
    with_input = served(llama).execute([ask()])[0].tensors
    without = served(llama, exclude_input_in_output="true").execute([ask()])[0].tensors
    assert with_input["output_ids"].shape == (1, 1, 7)
    assert with_input["output_ids"][0, 0, :3].tolist() == [1, 5, 9]
    assert with_input["sequence_length"].tolist() == [[7]]
    np.testing.assert_array_equal(without["output_ids"], with_input["output_ids"][:, :, 3:])
    assert without["sequence_length"].tolist() == [[4]]


def test_end_id_is_not_part_of_the_output(llama: Path) -> None:
    model = served(llama, exclude_input_in_output="true")
    free = model.execute([ask()])[0].tensors["output_ids"][0, 0].tolist()
    ended = model.execute([ask(end_id=np.array([free[1]], np.int32))])[0].tensors
    assert ended["sequence_length"].tolist() == [[free.index(free[1])]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"beam_width": np.array([2], np.int32)}, "beam_width"),
        ({"runtime_top_k": np.array([5], np.int32)}, "runtime_top_k"),
        ({"runtime_top_p": np.array([0.9], np.float32)}, "runtime_top_p"),
        ({"repetition_penalty": np.array([1.2], np.float32)}, "repetition_penalty"),
        ({"streaming": np.array([True])}, "streaming"),
        ({"input_lengths": np.array([4], np.int32)}, "input_lengths"),
        ({"request_output_len": np.array([0], np.int32)}, "request_output_len"),
        ({"request_output_len": np.array([90], np.int32)}, "64 positions"),
        ({"input_ids": np.array([[1, 5, VOCAB]], np.int32)}, "input_ids: expected ids in"),
        ({"prompt_embedding_table": np.zeros((1, 2, HIDDEN + 1), np.float32)}, f"width {HIDDEN}"),
        ({"prompt_embedding_table": np.zeros((1, 2, HIDDEN), np.float32),
          "prompt_vocab_size": np.array([3], np.int32)}, "prompt_vocab_size"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_and_the_rest_answered(
    llama: Path, inputs: dict[str, Any], message: str
) -> None:
    refused, answered = served(llama).execute([ask(**inputs), ask()])
    assert refused.error.code == "INVALID_ARG"
    assert message in refused.error.message
    assert answered.error is None
    assert answered.tensors["sequence_length"].tolist() == [[7]]


def test_greedy_by_top_k_one_is_served(llama: Path) -> None:
    response = served(llama).execute([ask(runtime_top_k=np.array([1], np.int32))])[0]
    assert response.error is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "mistral"}, "model_type"), ({"attention_bias": True}, "attention_bias"),
     ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_type")],
)  # fmt: skip
def test_other_architectures_do_not_load(
    llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "1" / "decoder"
    folder.mkdir(parents=True)
    for path in (llama / "1" / "decoder").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(TritonModelException, match=message):
        served(tmp_path)


def test_decoupled_mode_does_not_load(llama: Path) -> None:
    config = {"name": "tensorrt_llm", "model_transaction_policy": {"decoupled": True}}
    with pytest.raises(TritonModelException, match="decoupled"):
        backend.TritonPythonModel().initialize(
            {"model_config": json.dumps(config), "model_repository": str(llama), "model_version": "1"}
        )
