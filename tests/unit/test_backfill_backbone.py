"""Backbones: images from folders, crops, training that goes on where it was stopped, two versions and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sightline.errors import ConfigError, DataError
from trainer.backfill import backbone as training
from trainer.backfill.backbone import Backbone, BackboneConfig, embed, train_backbone
from trainer.backfill.images import Batches, Images, load_classes, split
from trainer.backfill.versions import train_versions

SMALL = BackboneConfig(width=4, dim=8, classes=4, epochs=3, batch=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def coloured(each: int = 20, classes: int = 4, size: int = 16, seed: int = 0) -> Images:
    """Noise whose mean colour is the class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    means = np.random.default_rng(9).integers(60, 190, (classes, 3))[labels][:, None, None]
    pixels = np.clip(means + rng.normal(0, 30, (len(labels), size, size, 3)), 0, 255).astype(np.uint8)
    return Images(pixels=pixels, labels=labels)


def test_folders_of_classes(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for name, value in (("b", 200), ("a", 10)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("no image")
            for index in range(count):
                Image.new("L", (6, 4), value + index).save(folder / f"{index}.png")
    train, test = load_classes(tmp_path)
    assert train.pixels.shape == (6, 4, 6, 3)
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.pixels[:, 0, 0, 0].tolist() == [10, 11, 12, 200, 201, 202]
    assert load_classes(tmp_path, size=8)[0].pixels.shape == (6, 8, 8, 3)

    Image.new("RGB", (5, 5)).save(tmp_path / "train" / "a" / "9.png")
    with pytest.raises(DataError, match=r"9\.png: is \(5, 5, 3\)"):
        load_classes(tmp_path)
    (tmp_path / "train" / "a" / "9.png").write_bytes(b"no png")
    with pytest.raises(DataError, match="cannot be read"):
        load_classes(tmp_path)
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(DataError, match="one has c"):
        load_classes(tmp_path)
    with pytest.raises(DataError, match="train/ is missing"):
        load_classes(tmp_path / "nowhere")


def test_a_split_takes_its_share_of_every_class() -> None:
    labels = np.repeat(np.arange(5), 20)
    fit, held = split(labels, 0.1, 0)
    assert np.bincount(labels[held]).tolist() == [2] * 5
    assert sorted([*fit, *held]) == list(range(100))
    assert held.tolist() != split(labels, 0.1, 1)[1].tolist()


def test_crops_are_windows_of_the_mirrored_margins() -> None:
    images = coloured(2, 2, size=16)
    batches = Batches(images)
    rows = torch.tensor([3, 0, 3])
    found = batches.augmented(rows, torch.Generator().manual_seed(0))
    assert found.shape == (3, 3, 16, 16)
    assert found.is_contiguous(memory_format=torch.channels_last)
    padded = np.pad(images.pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect").astype(np.float32)
    for one, row in zip((found * 75 + 127.5).round().permute(0, 2, 3, 1).numpy(), rows, strict=True):
        windows = [padded[row, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert any(np.array_equal(one, w) or np.array_equal(one, w[:, ::-1]) for w in windows)


def test_training_that_was_stopped_ends_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = coloured()
    whole = embed(train_backbone(images, SMALL, tmp_path / "whole"), images)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)

    def stop(text: str) -> None:
        if "epoch 3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_backbone(images, SMALL, tmp_path / "parts", say=stop)
    lines: list[str] = []
    found = embed(train_backbone(images, SMALL, tmp_path / "parts", say=lines.append), images)
    assert [line.split(",")[0] for line in lines] == ["parts: epoch 3 of 3"]
    np.testing.assert_allclose(found, whole, atol=1e-6)
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()

    def never(*_: object) -> None:
        raise AssertionError("trained what was finished")

    monkeypatch.setattr(training, "Batches", never)
    train_backbone(images, SMALL, tmp_path / "parts")


def test_versions_differ_in_what_they_know(tmp_path: Path) -> None:
    parts = {"fit": coloured(), "test": coloured(8, seed=1)}
    old = BackboneConfig(width=4, dim=4, classes=2, epochs=12, batch=8)
    new = BackboneConfig(width=8, dim=8, classes=4, epochs=20, batch=16)
    found = train_versions(parts, old, new, tmp_path, compatible=True)
    shapes = {name: (one.vectors["test"].shape, one.head.shape) for name, one in found.items()}
    assert shapes == {"old": ((32, 4), (2, 4)), "new": ((32, 8), (4, 8)), "bct": ((32, 8), (4, 8))}
    right = (found["new"].vectors["test"] @ found["new"].head.T).argmax(1) == parts["test"].labels
    assert right.mean() > 0.8

    def of_old_head(name: str) -> float:
        """How far vectors of the old classes lie towards the old model's direction of their class."""
        known = parts["test"].labels < 2
        towards = found[name].vectors["test"][known, :4] @ found["old"].head.T
        wanted = parts["test"].labels[known]
        return float((towards[np.arange(len(wanted)), wanted] - towards[np.arange(len(wanted)), 1 - wanted]).mean())

    assert of_old_head("bct") > of_old_head("new") + 0.2

    again = train_versions(parts, old, new, tmp_path, compatible=False)
    assert list(again) == ["old", "new"]
    np.testing.assert_array_equal(again["new"].vectors["fit"], found["new"].vectors["fit"])
    other = {**parts, "test": coloured(8, seed=2)}
    assert train_versions(other, old, new, tmp_path, compatible=False)["old"].key != found["old"].key
    with pytest.raises(ConfigError, match="fewer than all"):
        train_versions(parts, new, new, tmp_path, compatible=False)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_large_architectures_keep_the_contract(arch: str) -> None:
    model = Backbone(BackboneConfig(arch=arch, dim=16, classes=3), 32).eval()
    with torch.inference_mode():
        unit = model(torch.randn(2, 3, 32, 32))
    assert unit.shape == (2, 16)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))


def test_impossible_options_are_named() -> None:
    with pytest.raises(ConfigError, match="small, resnet18, resnet50"):
        BackboneConfig(arch="vgg")
    with pytest.raises(ConfigError, match="width"):
        BackboneConfig(width=2)
    with pytest.raises(DataError, match="uint8"):
        Images(pixels=np.zeros((1, 4, 4, 3)), labels=np.zeros(1, int))
