"""What the captioner knows beyond its caption: the trainer's annotations are those that the server gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import tritonclient.grpc as triton
from transformers import LlavaForConditionalGeneration

from build.vision_onnx import OUTPUTS
from serving.triton import TritonServer
from sightline.annotation import Annotated, plain
from sightline.media import MediaSpec, load
from sightline.schema import INTERACTIONS, ITEMS, write_dataset
from sightline.tokens import TokenSpec
from sightline.words import WordHead
from tests.end_to_end.test_serving import column, infer, rank
from tests.levels import agree
from tests.media_files import again, clip, patchwork
from trainer.captioner_model import Encoder
from trainer.captioning import caption_items


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Twelve pictures and four videos of five and more frames."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(4)
    return [*patchwork(12), *(clip(folder / f"{n}.mp4", random.integers(0, 256, 5 + n).tolist()) for n in range(4))]


@pytest.fixture(scope="module")
def served(client: Any, media: list[bytes]) -> dict[str, list[str]]:
    """CAPTION and ANNOTATION of all media in one batch."""
    answer = infer(client, "caption", MEDIA=column(media))
    return {name: [row.decode() for row in answer[name][:, 0]] for name in ("CAPTION", "ANNOTATION")}


def levels(annotations: list[str]) -> list[dict[str, int]]:
    return [dict(Annotated.parse(text).confidences) for text in annotations]


def test_people_read_the_caption_without_its_fields(served: dict[str, list[str]]) -> None:
    assert served["CAPTION"] == [plain(text) for text in served["ANNOTATION"]]
    found = levels(served["ANNOTATION"])
    assert {word for one in found for word in one} <= {"red", "blue", "mugs", "stars", "circle", "snow"}
    assert len({level for one in found for level in one.values()}) > 4
    assert len({tuple(one.items()) for one in found}) > 12, "levels that are all alike would hide a mix-up of rows"


def test_the_trainer_annotates_as_the_server_does(
    served: dict[str, list[str]], media: list[bytes], parts: Path, tmp_path: Path
) -> None:
    """`sightline caption` on the same media, pictures and videos, against ANNOTATION through Triton."""
    kinds = ["image"] * 12 + ["video"] * 4
    rows = [
        {"item_id": 1 + n, "media": data, "media_type": kind, "created_at": 0, "text": None}
        for n, (data, kind) in enumerate(zip(media, kinds, strict=True))
    ]
    write_dataset(tmp_path, pa.Table.from_pylist(rows, ITEMS), INTERACTIONS.empty_table(), {"name": "annotated"})
    ours = list(caption_items(parts / "captioner", tmp_path).values())
    assert [plain(text) for text in ours] == served["CAPTION"]
    assert agree(levels(ours), levels(served["ANNOTATION"]))


def test_a_batch_is_annotated_as_single_items_are(
    client: Any, served: dict[str, list[str]], media: list[bytes]
) -> None:
    alone = [infer(client, "caption", MEDIA=column([again(data)]))["ANNOTATION"].item().decode() for data in media]
    assert [plain(text) for text in alone] == served["CAPTION"]
    assert agree(levels(alone), levels(served["ANNOTATION"]))


@pytest.mark.parametrize("which", [0, 15], ids=["picture", "video"])
def test_pooled_features_are_the_same_in_eager_and_served(
    client: Any, served: dict[str, list[str]], media: list[bytes], parts: Path, which: int
) -> None:
    """And the levels of the served features, computed here, are those that the server gives."""
    folder = parts / "captioner"
    pixels = load(media[which], MediaSpec.from_pretrained(folder))
    answer = infer(client, "vision_encoder", pixel_values=pixels)
    encoder = Encoder(LlavaForConditionalGeneration.from_pretrained(folder).eval())
    with torch.inference_mode():
        eager = encoder(torch.from_numpy(pixels))
    for name, expected in zip(OUTPUTS, eager, strict=True):
        np.testing.assert_allclose(answer[name], expected.numpy(), atol=1e-4)
    assert answer["pooled_features"].shape == (len(pixels), 32)
    head = WordHead.from_pretrained(folder)
    assert head is not None
    assert agree(head([answer["pooled_features"]]), levels([served["ANNOTATION"][which]]))


def test_the_ensemble_scores_the_annotation(
    client: Any, served: dict[str, list[str]], media: list[bytes], parts: Path
) -> None:
    """tokenize gets ANNOTATION: without the confidences the same items have other scores."""
    spec, count = TokenSpec.load(parts / "ranker" / "token_spec.json"), len(media)
    row = infer(client, "lookup", USER_ID=column([42] * count), ITEM_ID=column([0] * count))
    dense = row.pop("DENSE")
    context = [[1, 2]] * count

    def scores(texts: list[str]) -> np.ndarray:
        tokens = infer(client, "tokenize", CAPTION=column([text.encode() for text in texts]))["ITEM_TOKENS"]
        np.testing.assert_array_equal(tokens, spec.encode_batch(texts))
        features = infer(client, "embed", ITEM_TOKENS=tokens, CONTEXT=np.array(context), **row)
        return infer(client, "score", DENSE=dense, **features)["SCORE"]

    ranked = rank(client, media, [42] * count, context)
    assert [row.decode() for row in ranked["CAPTION"][:, 0]] == served["CAPTION"]
    np.testing.assert_allclose(ranked["SCORE"], scores(served["ANNOTATION"]), atol=1e-5)
    assert np.abs(ranked["SCORE"] - scores(served["CAPTION"])).max() > 1e-3


def test_a_rejected_row_has_no_annotation(client: Any, media: list[bytes]) -> None:
    answer = infer(client, "caption", MEDIA=column([b"nonsense", media[0]]))
    assert answer["ANNOTATION"][0, 0] == answer["CAPTION"][0, 0] == b""
    assert b"\x1fc " in answer["ANNOTATION"][1, 0]
