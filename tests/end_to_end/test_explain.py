"""`sightline explain` scores from a release's files what the server answers, with and without a word."""

from __future__ import annotations

import numpy as np
import pytest
import tritonclient.grpc as triton

from benchmarks.inputs import infer
from evaluation.explain import Scorer, explain
from serving.triton import TritonServer

CAPTION = "a large red circle with stripes"


@pytest.mark.parametrize(("user", "item"), [(42, 9), (8, 10**12)])
def test_explain_scores_what_the_server_scores(server: TritonServer, user: int, item: int) -> None:
    found = explain(server.release_dir, user, item, CAPTION, {"hour": 3, "position": 1})
    assert (found.user_known, found.item_known) == (user == 42, item == 9)
    columns = list(Scorer(server.release_dir).columns)
    context = np.array([{"hour": 3, "position": 1}[name] for name in columns], np.int64)
    with triton.InferenceServerClient(server.url) as client:
        known = infer(client, "lookup", {"USER_ID": np.array([user]), "ITEM_ID": np.array([item])})
        tokens = infer(client, "tokenize", {"CAPTION": np.array([CAPTION.encode()], dtype=object)})["ITEM_TOKENS"]

        def served(tokens: np.ndarray) -> float:
            dense = known["DENSE"]
            ids = {name: value for name, value in known.items() if name != "DENSE"}
            features = infer(client, "embed", {**ids, "CONTEXT": context, "ITEM_TOKENS": tokens})
            return infer(client, "score", {**features, "DENSE": dense})["SCORE"].item()

        # Absolute: FP32 sums in another order, as in the build's own comparison of graphs.
        assert found.score == pytest.approx(served(tokens), abs=1e-5)
        word = next(one for one in found.occlusions if one.part == "caption")
        assert word.change != 0
        gone = np.isin(tokens, [row for rows in word.ids.values() for row in rows])
        assert word.without == pytest.approx(served(np.where(gone, 0, tokens)), abs=1e-5)
    profiles = {"profile", "profile_negative"} if user == 42 else set()
    assert {one.part for one in found.occlusions} == {"caption"} | profiles
