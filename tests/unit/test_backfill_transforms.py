"""Losses against their equations, transforms against what they are built to recover, ONNX against torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sightline.errors import ConfigError, DataError
from trainer.backfill.fit import Fit, fit_forward, fit_query, fit_two_way, procrustes, unit_rows
from trainer.backfill.losses import CONTRASTS, contrast, mixed_contrast
from trainer.backfill.methods import METHODS, Embeddings, farthest_order, popularity_order
from trainer.backfill.query import TransformConfig, apply_query, export_query_transform, train_query_transform
from trainer.backfill.transforms import QueryTransform, TwoWay

SHORT = Fit(hidden=32, epochs=40, batch=128, blocks=1, lr=3e-3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small wait for each other's threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(rng: np.random.Generator, rows: int, dim: int) -> torch.Tensor:
    return torch.from_numpy(unit_rows(rng.normal(size=(rows, dim)), "made"))


def two_systems(items: int = 900, classes: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Old and new vectors of items of some classes, and their labels; the old model is the noisier one."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, classes, items)
    hidden = rng.normal(size=(classes, 12))[labels] + 0.7 * rng.normal(size=(items, 12))
    old = hidden @ rng.normal(size=(12, 8)) + 2.5 * rng.normal(size=(items, 8))
    new = np.tanh(hidden @ rng.normal(size=(12, 16)) / 4) + 0.2 * rng.normal(size=(items, 16))
    return unit_rows(old, "old"), unit_rows(new, "new"), labels


@pytest.mark.parametrize("kind", CONTRASTS)
def test_contrast_is_the_equation(kind: str) -> None:
    rng = np.random.default_rng(0)
    old, new, reverse, forward = (unit(rng, 10, dim) for dim in (4, 6, 4, 6))
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])  # 3 has nothing to find
    positive = torch.from_numpy((labels[:, None] == labels) & ~np.eye(10, dtype=bool))
    negative = torch.from_numpy(labels[:, None] != labels)
    found = contrast(kind, reverse @ old.T, forward @ new.T, positive, negative, 0.5)

    def s(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(np.exp(-((a - b) ** 2).sum().item() / 0.5))

    terms = []
    for i in range(9):
        ours = [j for j in range(10) if positive[i, j]]
        others = [j for j in range(10) if negative[i, j]]
        p_o, p_n = sum(s(reverse[i], old[j]) for j in ours), sum(s(forward[i], new[j]) for j in ours)
        n_o, n_n = sum(s(reverse[i], old[j]) for j in others), sum(s(forward[i], new[j]) for j in others)
        terms.append({
            "joint": -np.log(p_o / (p_o + n_o + n_n)) - np.log(p_n / (p_n + n_o + n_n)),
            "old": -np.log(p_o / (p_o + n_o)), "new": -np.log(p_n / (p_n + n_n)),
            "independent": -np.log(p_o / (p_o + n_o)) - np.log(p_n / (p_n + n_n)),
        }[kind])  # fmt: skip
    assert found.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_mixed_contrast_is_the_equation() -> None:
    rng = np.random.default_rng(1)
    old, new = (torch.from_numpy(rng.normal(size=(6, 6)).astype(np.float32)) for _ in range(2))
    labels = np.array([0, 0, 0, 1, 1, 2])
    positive = torch.from_numpy((labels[:, None] == labels) & ~np.eye(6, dtype=bool))
    loss, gain = mixed_contrast(old, new, positive, 0.7)
    wanted = []
    for i in range(5):
        ours = [j for j in range(6) if positive[i, j]]
        everything = sum(np.exp(m[i, j].item() / 0.7) for m in (old, new) for j in range(6) if j != i)
        wanted.append(np.mean([-np.log(np.exp(m[i, j].item() / 0.7) / everything) for m in (old, new) for j in ours]))
    assert loss.item() == pytest.approx(np.mean(wanted), rel=1e-5)
    # Item 3 is asked for by item 4 alone.
    assert gain[3].item() == pytest.approx(((new[4, 3] - old[4, 3]) / 0.7).item(), rel=1e-5)


def test_a_two_way_similarity_is_an_inner_product() -> None:
    rng = np.random.default_rng(2)
    module = TwoWay(4, 6, blocks=1, hidden=8).eval()
    old, new = unit(rng, 5, 4), unit(rng, 5, 6)
    with torch.inference_mode():
        forward, both = module.queries(new)
        rows, _ = module.old_items(old)
        _, reverse = module.query(new)
        raw = module.item(old)
        h = torch.nn.functional.normalize(raw[:, :6])
        alpha, beta = torch.nn.functional.softplus(raw[:, 6:8]).unbind(1)
        wanted = alpha * (forward @ h.T) + beta * (reverse @ old.T) + raw[:, 8]
    torch.testing.assert_close(both @ rows.T, wanted)


def test_procrustes_finds_a_rotation() -> None:
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(7, 7)))[0][:, :4].astype(np.float32)
    old = unit(rng, 50, 4).numpy()
    np.testing.assert_allclose(procrustes(old, old @ basis.T), basis, atol=1e-5)
    with pytest.raises(ConfigError, match="at most the new ones' 4"):
        procrustes(old @ basis.T, old)


def test_reverse_transform_learns_the_old_space_and_starts_rho_at_the_identity() -> None:
    rng = np.random.default_rng(4)
    new = unit(rng, 600, 8).numpy()
    old = unit_rows(new @ rng.normal(size=(8, 4)), "old")
    module = fit_query(old, new, None, "reverse", Fit(hidden=64, epochs=30, batch=64, blocks=1), learn_new=False)
    to_new, to_old = apply_query(module, new)
    np.testing.assert_allclose(to_new, new, atol=1e-6)
    assert (to_old * old).sum(1).mean() > 0.97
    fresh = QueryTransform(8, 4, blocks=2, hidden=16, learn_new=True)
    np.testing.assert_allclose(apply_query(fresh, new)[0], new, atol=1e-6)


def test_the_same_seed_gives_the_same_transform() -> None:
    old, new, labels = two_systems(300)
    fit = Fit(hidden=16, epochs=2, batch=64, blocks=1)
    one, two = (apply_query(fit_query(old, new, labels, "joint", fit, learn_new=True), new) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_array_equal(first, second)


def test_fastfill_is_less_certain_of_what_it_cannot_tell() -> None:
    old, new, labels = two_systems()
    blurred = labels < 4
    old[blurred] = unit_rows(np.random.default_rng(6).normal(size=(blurred.sum(), 8)), "noise")
    old[blurred, 0] += 3  # seen apart from the rest, but not from each other
    old = unit_rows(old, "old")
    head = np.stack([new[labels == one].mean(0) for one in range(12)])
    module = fit_forward(old, new, labels, head / np.linalg.norm(head, axis=1, keepdims=True), SHORT, uncertain=True)
    with torch.inference_mode():
        _, s = module(torch.from_numpy(old))
    assert s[blurred].mean() > s[~blurred].mean() + 0.1
    two_way = fit_two_way(old, new, labels, unit_rows(head, "head"), SHORT)
    with torch.inference_mode():
        _, gain = two_way.old_items(torch.from_numpy(old))
    assert gain[blurred].mean() > gain[~blurred].mean()


def test_every_method_gives_two_systems() -> None:
    old, new, labels = two_systems(300)
    part = Embeddings(old=old, new=new, labels=labels, bct=new)
    head = np.stack([new[labels == one].mean(0) for one in range(12)])
    for name, make in METHODS.items():
        method = make(part, head, Fit(hidden=8, epochs=1, batch=64, blocks=1))(part, part)
        assert method.old.gallery.shape[0] == method.new.queries.shape[0] == 300, name
        own = {"two-way": ["uncertainty", "spread"]}.get(name, ["uncertainty"] if "FastFill" in name else [])
        assert list(method.orders) == own, name
        if name != "two-way":
            for rows in (method.old.queries, method.old.gallery, method.new.queries, method.new.gallery):
                np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-4, err_msg=name)
    with pytest.raises(ConfigError, match="compatible"):
        METHODS["BCT"](part, head, SHORT)(*[Embeddings(old=old, new=new, labels=labels)] * 2)


def test_orders_without_a_transform() -> None:
    means = np.eye(3, dtype=np.float32)
    fitted = Embeddings(old=means, new=means, labels=np.arange(3))
    gallery = unit_rows(np.array([[1, 0, 0], [1, 1, 1], [2, 1, 0]], float), "gallery")
    assert farthest_order(gallery, fitted).tolist() == [1, 2, 0]
    assert popularity_order(gallery, gallery[[0, 0, 2, 1]], nearest=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_query_transform_is_written_measured_and_the_same_in_onnx(tmp_path: Path, labelled: bool) -> None:
    old, new, labels = two_systems(1200)
    config = TransformConfig(hidden=64, epochs=60, batch=128, blocks=1, temperature=0.2, lr=3e-3)
    record = train_query_transform(3 * old, 0.5 * new, labels if labelled else None, tmp_path, config=config)
    assert json.loads((tmp_path / "transform.json").read_text()) == record
    assert (record["old_dim"], record["new_dim"], record["learnt_new"]) == (8, 16, labelled)
    assert record["onnx_error"] <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "query.onnx", providers=["CPUExecutionProvider"])
    to_new, to_old = session.run(["NEW", "OLD"], {"VECTOR": new[:5]})
    assert (to_new.shape, to_old.shape) == ((5, 16), (5, 8))
    np.testing.assert_allclose(np.linalg.norm(to_old, axis=1), 1, atol=1e-5)
    single = [session.run(["NEW"], {"VECTOR": 7 * new[i : i + 1]})[0][0] for i in range(5)]
    np.testing.assert_allclose(single, to_new, atol=1e-5)  # one at a time, and of another length
    if not labelled:
        np.testing.assert_allclose(to_new, new[:5], atol=1e-6)
    figures = record["validation"]
    gains = {which: figures[which]["mAP"]["relative_gain"]["value"] for which in figures}
    assert gains["transform"] > gains["rank merge alone"]


def test_what_the_old_model_did_not_see_is_uncertain(tmp_path: Path) -> None:
    """A third of the items have old vectors that say little about them, on the same side of the old space."""
    old, new, _ = two_systems(1500)
    lost = np.random.default_rng(1).random(1500) < 1 / 3
    blurred = 0.8 * np.random.default_rng(2).normal(size=(1500, 8)) + 4 * np.eye(8)[0]
    old[lost] = unit_rows(blurred, "old")[lost]
    config = TransformConfig(hidden=64, epochs=20, batch=128, blocks=1, temperature=0.2, lr=3e-3)
    figures = train_query_transform(old, new, None, tmp_path, config=config)["validation"]
    first = np.argsort(-(old @ np.load(tmp_path / "uncertainty.npy")))[:500]
    assert lost[first].mean() > 0.6
    gains = {which: figures[which]["mAP"]["relative_gain"]["value"] for which in figures}
    assert gains["transform, uncertain first"] > gains["transform"] > gains["rank merge alone"]


def test_the_temperature_is_chosen_on_items_held_out(tmp_path: Path) -> None:
    old, new, labels = two_systems(600)
    record = train_query_transform(
        old, new, labels, tmp_path, config=TransformConfig(hidden=16, epochs=3, batch=256, blocks=1)
    )
    tried = record["mAP_by_temperature"]
    assert str(record["temperature"]) == max(tried, key=lambda value: tried[value])
    assert record["fitted_on"] < record["items"] == 600


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    old, new, labels = two_systems(200)
    broken = new.copy()
    broken[17] = 0
    for arguments, message in (
        ((old[1:], new, None), "the same items"), ((old, new, labels[1:]), "the same items"),
        ((old, broken, None), "row 17"), ((old[:60], new[:60], None), "at least 64"),
        ((old, new, np.arange(200)), "pass None"), ((old[:, 0], new, None), "expected floating point vectors"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            train_query_transform(*arguments, tmp_path)
    assert not list(tmp_path.iterdir())
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"loss": "bct"}, "mcl or rqt"), ({"validation": 0.0}, "validation"), ({"blocks": 0}, "blocks"),
        ({"temperature": 0.01}, "temperature"),
    )  # fmt: skip
    for options, message in wrong:
        with pytest.raises(ConfigError, match=message):
            TransformConfig(**options)


def test_export_compares_with_torch(tmp_path: Path) -> None:
    module = QueryTransform(6, 4, blocks=2, hidden=8, learn_new=True)
    assert export_query_transform(tmp_path / "query.onnx", module) < 1e-6
