"""The upgrade of a gallery: begin, move, kill, cut over, roll back, clean; real files, a stand-in encoder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from backfill.job import Embedded, Stage, Writer, backfill, embed, estimate, fill, in_order, in_process
from backfill.throttle import Throttle, quantile, read_buckets
from backfill.upgrade import begin, clean, cut_over, failures, read_uncertainty, read_upgrade, roll_back, write_upgrade
from sightline.content import unit
from sightline.errors import ConfigError, GalleryError, MediaError, ServingError
from sightline.gallery import Gallery, open_gallery
from sightline.ray_cluster import cpus_each
from sightline.retrieval import Retriever, read_views

ITEMS, OLD_WIDTH, NEW_WIDTH = 300, 8, 12
IDS = np.arange(1, ITEMS + 1)


class FakeEncoder:
    """Media `<item>.<revision>` → a vector that only these and the captioner decide."""

    def __init__(self, version: str, width: int, pause: float = 0.0) -> None:
        self.version, self.width, self._pause = version, width, pause

    def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]:
        time.sleep(self._pause)
        return [MediaError("it is bad") if b"bad" in one else self.vector(one) for one in media]

    def vector(self, media: bytes) -> NDArray[np.float32]:
        rng = np.random.default_rng([*media, *self.version.encode()])
        return unit(rng.normal(size=(1, self.width)))[0]


OLD, NEW = FakeEncoder("captioner-1", OLD_WIDTH), FakeEncoder("captioner-2", NEW_WIDTH)


def media_of(items: Sequence[int]) -> dict[int, bytes | None]:
    return {item: b"%d.0" % item for item in items}


def put(gallery: Gallery, encoder: FakeEncoder, media: dict[int, bytes | None]) -> None:
    """As `sightline gallery put` does."""
    Writer(gallery, encoder.version)(embed(encoder, media, list(media)).vectors, replace=True)


def pool(in_flight: int, meanwhile: Callable[[list[list[int]]], object] = lambda batches: None) -> Stage:
    """Embeds with NEW and answers out of order, as workers do; hears which batches are in flight."""
    rng = np.random.default_rng(0)

    def stage(batches: Iterable[Sequence[int]]) -> Iterator[Embedded]:
        todo, busy = iter(batches), list[list[int]]()
        while True:
            busy += [list(ids) for _, ids in zip(range(in_flight - len(busy)), todo, strict=False)]
            if not busy:
                return
            chosen = busy.pop(rng.integers(len(busy)))
            done = embed(NEW, media_of(chosen), chosen)
            meanwhile([chosen, *busy])
            yield done

    return stage


@pytest.fixture(scope="module")
def graph() -> bytes:
    """VECTOR [B, 12] → NEW: the same at length 1, OLD: its first 8 numbers at length 1."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("LpNormalization", ["VECTOR"], ["NEW"], axis=1, p=2),
        helper.make_node("Slice", ["VECTOR", "first", "end", "axes"], ["head"]),
        helper.make_node("LpNormalization", ["head"], ["OLD"], axis=1, p=2),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in (("first", 0), ("end", OLD_WIDTH), ("axes", 1))
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width])
        for name, width in (("VECTOR", NEW_WIDTH), ("NEW", NEW_WIDTH), ("OLD", OLD_WIDTH))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "query", tensors[:1], tensors[1:], constants),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[Gallery]:
    """All items under the old captioner."""
    with open_gallery(str(tmp_path / "gallery")) as opened:
        assert fill(opened, OLD, OLD.version, OLD.width, media_of(IDS), IDS) == {}
        yield opened


def expected(encoder: FakeEncoder, items: Sequence[int], revision: int = 0) -> NDArray[np.float32]:
    return np.stack([encoder.vector(b"%d.%d" % (item, revision)) for item in items])


def nearest(gallery: Gallery, encoder: FakeEncoder, item: int) -> tuple[int, float, str]:
    """What a query with the item's own picture finds first."""
    found = Retriever(gallery, encoder.version)(expected(encoder, [item]), 1)
    return int(found.ids[0, 0]), float(found.distances[0, 0]), found.versions[0][0]


def test_filling_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with open_gallery(str(tmp_path / "gallery")) as opened:
        fill(opened, OLD, OLD.version, OLD.width, media_of(IDS), IDS[:100])
        done = list[int]()
        media = media_of(IDS) | {200: None, 201: b"bad"}
        failed = fill(opened, OLD, OLD.version, OLD.width, media, IDS, advance=done.append)
        assert done[0] == 100
        assert sum(done) == ITEMS
        assert failed == {200: "it has no media", 201: "it is bad"}
        assert opened.count()[OLD.version] == (ITEMS - 2, ITEMS - 2)
        with pytest.raises(GalleryError, match="bring captioner-2 in with `sightline backfill begin`"):
            fill(opened, NEW, NEW.version, NEW.width, media_of(IDS), IDS)


def test_the_whole_upgrade(gallery: Gallery, graph: bytes) -> None:
    assert nearest(gallery, OLD, 7)[::2] == (7, OLD.version)
    with pytest.raises(GalleryError, match="vectors for captioner captioner-1, asked with captioner-2"):
        nearest(gallery, NEW, 7)
    upgrade = begin(gallery, NEW.version, graph)
    assert begin(gallery, NEW.version, graph) == upgrade
    gallery.put_state("upgrade", None)  # as after a crash before the last of its writes
    assert begin(gallery, NEW.version, graph) == upgrade
    assert nearest(gallery, NEW, 7)[2] == OLD.version
    with pytest.raises(GalleryError, match="300 items are still in captioner-1"):
        cut_over(gallery)

    ended = list[tuple[str, int]]()
    assert backfill(gallery, in_process(NEW, media_of(IDS)), advance=lambda *one: ended.append(one)).phase == "moved"
    assert sum(items for _, items in ended) == ITEMS
    vectors, there = gallery.get(IDS, upgrade.new)
    assert there.all()
    np.testing.assert_allclose(vectors, expected(NEW, IDS), atol=1e-6)
    assert nearest(gallery, NEW, 7) == (7, pytest.approx(0, abs=1e-6), upgrade.new)
    assert gallery.count()[OLD.version] == (0, ITEMS)

    cut_over(gallery)
    assert read_views(gallery).views[NEW.version].versions == {upgrade.new: "new"}
    assert clean(gallery) == OLD.version
    assert [version.name for version in gallery.versions()] == [upgrade.new]
    assert list(read_views(gallery).views) == [NEW.version]
    assert read_upgrade(gallery) is None
    assert nearest(gallery, NEW, 9)[0] == 9


def test_rolling_back_restores_every_item(gallery: Gallery, graph: bytes) -> None:
    before, _ = gallery.get(IDS, OLD.version)
    upgrade = begin(gallery, NEW.version, graph)
    backfill(gallery, in_process(NEW, media_of(IDS)))
    cut_over(gallery)
    put(gallery, NEW, {5: b"5.1", 1000: b"1000.0"})
    back, without = roll_back(gallery)
    assert (back.phase, without) == ("rolled back", 2)  # the one that changed and the one that came
    assert nearest(gallery, OLD, 7)[::2] == (7, OLD.version)
    after, there = gallery.get(IDS, OLD.version)
    assert not there[4]
    np.testing.assert_array_equal(after[there], before[there])
    assert nearest(gallery, NEW, 1000)[0] == 1000  # the new captioner's queries still see both
    with pytest.raises(GalleryError, match="queries see 2 items in it"):
        clean(gallery)
    media = media_of(IDS) | {5: b"5.1", 1000: b"1000.0"}
    fill(gallery, OLD, OLD.version, OLD.width, media, np.append(IDS, 1000))
    assert clean(gallery) == upgrade.new
    assert list(read_views(gallery).views) == [OLD.version]
    assert nearest(gallery, OLD, 1000)[0] == 1000


def test_what_happens_to_items_meanwhile(gallery: Gallery, graph: bytes) -> None:
    """Changed, deleted and added while their batch is being embedded: none is overwritten, revived or lost."""
    upgrade = begin(gallery, NEW.version, graph)

    class Meddling(FakeEncoder):
        done = False

        def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]:
            if not self.done:
                self.done = True
                first = int(media[0].split(b".")[0])
                put(gallery, NEW, {first: b"%d.1" % first, 2000: b"2000.0"})
                gallery.delete([int(media[1].split(b".")[0])])
                self.changed, self.gone = first, int(media[1].split(b".")[0])
            return super().__call__(media)

    meddling, ended = Meddling(NEW.version, NEW.width), list[tuple[str, int]]()
    done = backfill(gallery, in_process(meddling, media_of(IDS)), advance=lambda *one: ended.append(one))
    assert done.phase == "moved"
    assert ("overtaken", 2) in ended
    np.testing.assert_allclose(gallery.get([meddling.changed], upgrade.new)[0], expected(NEW, [meddling.changed], 1))
    assert gallery.seen([meddling.gone, 2000]) == [None, upgrade.new]
    assert gallery.count()[upgrade.new].seen == ITEMS


def test_what_happens_while_batches_are_in_flight(gallery: Gallery, graph: bytes) -> None:
    """Answers out of order. Items changed or deleted before, while and after their batch is embedded stay as they are;
    one that came under the old captioner is moved."""
    upgrade = begin(gallery, NEW.version, graph)
    changed, gone, begun = list[int](), list[int](), set[int]()

    def meddle(in_flight: list[list[int]]) -> None:
        begun.update(*in_flight)
        left = sorted(set(IDS.tolist()) - begun)
        for batch in (in_flight[0], in_flight[-1], left):  # answered, being embedded, not begun
            fresh = [item for item in batch if item not in changed and item not in gone]
            if len(fresh) > 1 and len(changed) < 12:
                put(gallery, NEW, {fresh[0]: b"%d.1" % fresh[0]})
                gallery.delete(fresh[1:2])
                changed.append(fresh[0])
                gone.append(fresh[1])
        if len(in_flight) == 1 and 2000 not in gallery.ids(upgrade.old):  # the last one
            fill(gallery, OLD, OLD.version, OLD.width, media_of([2000]), np.array([2000]))

    ended = list[tuple[str, int]]()
    done = backfill(gallery, pool(4, meddle), batch=16, advance=lambda *one: ended.append(one))
    assert done.phase == "moved"
    assert len(changed) == len(gone) == 12
    assert sum(items for result, items in ended if result == "overtaken") == 24
    assert gallery.seen(gone) == [None] * 12
    np.testing.assert_allclose(gallery.get(changed, upgrade.new)[0], expected(NEW, changed, 1), atol=1e-6)
    rest = sorted({*IDS.tolist(), 2000} - {*changed, *gone})
    vectors, there = gallery.get(rest, upgrade.new)
    assert there.all()
    np.testing.assert_allclose(vectors, expected(NEW, rest), atol=1e-6)
    assert gallery.count()[upgrade.new].seen == ITEMS + 1 - 12


def test_what_is_in_flight_when_the_upgrade_ends_is_not_written(gallery: Gallery, graph: bytes) -> None:
    upgrade = begin(gallery, NEW.version, graph)
    calls = list[int]()

    def end(in_flight: list[list[int]]) -> None:
        calls.append(len(in_flight))
        if len(calls) == 3:
            roll_back(gallery)

    assert backfill(gallery, pool(4, end), batch=16).phase == "rolled back"
    assert calls == [4, 4, 4]
    assert gallery.count()[upgrade.new] == (0, 32)
    assert gallery.seen(IDS) == [OLD.version] * ITEMS


def test_items_that_cannot_be_embedded_are_named_and_left(gallery: Gallery, graph: bytes) -> None:
    begin(gallery, NEW.version, graph)
    media = media_of(IDS) | {3: b"bad", 4: None}
    del media[5]
    now = backfill(gallery, in_process(NEW, media))
    assert now.phase == "running"
    assert failures(gallery) == {3: "it is bad", 4: "it has no media", 5: "5"}
    assert gallery.seen([3, 4, 5]) == [OLD.version] * 3
    assert nearest(gallery, NEW, 6)[0] == 6
    assert backfill(gallery, in_process(NEW, media_of(IDS))).phase == "moved"  # mended
    assert failures(gallery) == {}


def test_an_encoder_that_is_away_is_waited_for(gallery: Gallery, graph: bytes) -> None:
    begin(gallery, NEW.version, graph)

    class Away(FakeEncoder):
        calls = 0

        def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]:
            self.calls += 1
            if self.calls in (2, 3, 5):
                raise ServingError("localhost:1: no server")
            return super().__call__(media)

    naps, ended = list[float](), list[tuple[str, int]]()
    done = backfill(
        gallery, in_process(Away(NEW.version, NEW.width), media_of(IDS), nap=naps.append), batch=50,
        advance=lambda *one: ended.append(one),
    )  # fmt: skip
    assert done.phase == "moved"
    assert naps == [1.0, 2.0, 1.0]
    assert ended == [("moved", 50)] * 6
    assert failures(gallery) == {}


def test_pause_and_stop(gallery: Gallery, graph: bytes) -> None:
    upgrade = begin(gallery, NEW.version, graph)
    moved = list[int]()

    def pause(result: str, items: int) -> None:
        moved.append(items)
        write_upgrade(gallery, upgrade.model_copy(update={"phase": "paused"}))

    assert backfill(gallery, in_process(NEW, media_of(IDS)), batch=32, advance=pause).phase == "paused"
    assert moved == [32]
    with pytest.raises(GalleryError, match="expected an upgrade that is running"):
        backfill(gallery, in_process(NEW, media_of(IDS)))
    write_upgrade(gallery, upgrade)
    assert backfill(gallery, in_process(NEW, media_of(IDS)), stopped=lambda: True).phase == "running"
    assert gallery.count()[upgrade.new].seen == 32


def _work(folder: str, pause: float) -> None:
    with open_gallery(folder) as gallery:
        backfill(gallery, in_process(FakeEncoder(NEW.version, NEW.width, pause), media_of(IDS)), batch=8)


def test_killed_again_and_again(tmp_path: Path, graph: bytes) -> None:
    """kill −9 at random moments: in the end, what an undisturbed job would have made."""
    folder = str(tmp_path / "gallery")
    with open_gallery(folder) as gallery:
        fill(gallery, OLD, OLD.version, OLD.width, media_of(IDS), IDS)
        upgrade = begin(gallery, NEW.version, graph)
    context, rng, kills = multiprocessing.get_context("spawn"), np.random.default_rng(0), 0
    with open_gallery(folder, readonly=True) as gallery:
        while True:
            before = gallery.count()[upgrade.new].seen
            process = context.Process(target=_work, args=(folder, 0.02))
            process.start()
            while process.is_alive() and gallery.count()[upgrade.new].seen == before:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.1)
            if not process.is_alive():
                break
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += 1
            assert sorted([*gallery.ids(upgrade.old).tolist(), *gallery.ids(upgrade.new).tolist()]) == IDS.tolist()
        process.join()
        assert process.exitcode == 0
        assert kills >= 5
        assert read_upgrade(gallery) == upgrade.model_copy(update={"phase": "moved"})
        np.testing.assert_allclose(gallery.get(IDS, upgrade.new)[0], expected(NEW, IDS), atol=1e-6)
        assert gallery.count()[upgrade.old] == (0, ITEMS)


def test_a_transform_of_something_else_is_refused(gallery: Gallery, graph: bytes) -> None:
    with pytest.raises(GalleryError, match="is of captioner captioner-1 already, in captioner-1; name the new release"):
        begin(gallery, OLD.version, graph)
    with pytest.raises(GalleryError, match="expected an ONNX graph"):
        begin(gallery, NEW.version, b"no graph")
    gallery.create(gallery.versions()[0].model_copy(update={"name": "other", "dimension": 5}))
    with pytest.raises(GalleryError, match="expected one version to upgrade from"):
        begin(gallery, NEW.version, graph)
    with pytest.raises(GalleryError, match=r"expected OLD with the 5 numbers of other, got 8"):
        begin(gallery, NEW.version, graph, old="other")
    begin(gallery, NEW.version, graph, old=OLD.version)
    with pytest.raises(GalleryError, match=r"an upgrade from captioner-1 to .* is running"):
        begin(gallery, "captioner-3", graph)


def test_orders() -> None:
    random = in_order(IDS, "random", 0)
    assert sorted(random) == IDS.tolist()
    assert in_order(IDS[::-1], "random", 0).tolist() == random.tolist()
    assert in_order(IDS, "random", 1).tolist() != random.tolist()
    # What is left of a part keeps its order.
    assert in_order(random[100:], "random", 0).tolist() == random[100:].tolist()
    asked = {item: float(item % 7) for item in IDS.tolist()}
    by_popularity = in_order(IDS, "popularity", 0, popularity=asked)
    assert (np.diff([asked[item] for item in by_popularity.tolist()]) <= 0).all()
    with pytest.raises(ConfigError, match="expected interactions to count"):
        in_order(IDS, "popularity", 0)


def test_the_old_release_takes_nothing_back(gallery: Gallery, graph: bytes) -> None:
    """A nightly fill leaves moved items where they are; after the cut-over nobody would find what it writes."""
    upgrade = begin(gallery, NEW.version, graph)
    left = iter(range(3))
    backfill(gallery, in_process(NEW, media_of(IDS)), batch=50, stopped=lambda: next(left, 3) > 2)
    moved = gallery.ids(upgrade.new)
    assert 0 < len(moved) < ITEMS
    fill(gallery, OLD, OLD.version, OLD.width, media_of([*IDS, 2000]), np.array([*IDS, 2000]))
    assert gallery.ids(upgrade.new).tolist() == moved.tolist()
    assert gallery.seen([2000]) == [OLD.version]
    backfill(gallery, in_process(NEW, media_of([*IDS, 2000])))
    cut_over(gallery)
    for write in (
        lambda: fill(gallery, OLD, OLD.version, OLD.width, media_of([3000]), np.array([3000])),
        lambda: put(gallery, OLD, {3000: b"3000"}),
    ):
        with pytest.raises(GalleryError, match="name a release of captioner captioner-2"):
            write()
    assert gallery.seen([3000]) == [None]
    roll_back(gallery)
    fill(gallery, OLD, OLD.version, OLD.width, media_of([3000]), np.array([3000]))
    assert gallery.seen([3000]) == [OLD.version]


def test_an_upgrade_begins_with_its_own_transform_and_keeps_its_order(gallery: Gallery, graph: bytes) -> None:
    model = onnx.load_from_string(graph)
    for made_for, message in (
        ({"old": "another", "captioner": NEW.version}, "expected one for old captioner-1, got one for another"),
        ({"old": OLD.version, "captioner": "captioner-9"}, "expected one for captioner captioner-2, got one for cap"),
    ):
        onnx.helper.set_model_props(model, made_for)
        with pytest.raises(GalleryError, match=message):
            begin(gallery, NEW.version, model.SerializeToString())
    onnx.helper.set_model_props(model, {"old": OLD.version, "captioner": NEW.version})
    own = model.SerializeToString()
    upgrade = begin(gallery, NEW.version, own, order="farthest", seed=3)
    assert begin(gallery, NEW.version, own, order="farthest", seed=3) == upgrade
    with pytest.raises(GalleryError, match="running in order farthest, seed 3, got random, 3"):
        begin(gallery, NEW.version, own, seed=3)


def test_the_uncertain_move_first(gallery: Gallery, graph: bytes) -> None:
    """By weights that lie in the gallery, also after a restart; they go with the upgrade."""
    weights = np.random.default_rng(0).normal(size=OLD_WIDTH).astype(np.float32)
    for wrong in (None, weights[1:]):
        with pytest.raises(GalleryError, match=f"expected the {OLD_WIDTH} weights of captioner-1"):
            begin(gallery, NEW.version, graph, order="uncertainty", uncertainty=wrong)
    upgrade = begin(gallery, NEW.version, graph, order="uncertainty", uncertainty=weights)
    wanted = IDS[np.argsort(-(gallery.get(IDS, OLD.version)[0] @ weights), kind="stable")].tolist()
    for moved in (40, 80):
        left = iter(range(3))
        backfill(gallery, in_process(NEW, media_of(IDS)), batch=20, stopped=lambda left=left: next(left, 3) > 2)
        assert set(gallery.ids(upgrade.new).tolist()) <= set(wanted[:moved])
    assert len(gallery.ids(upgrade.new)) > 20
    backfill(gallery, in_process(NEW, media_of(IDS)))
    cut_over(gallery)
    assert read_uncertainty(gallery, upgrade) is not None
    clean(gallery)
    assert read_uncertainty(gallery, upgrade) is None


def test_farthest_is_from_the_own_cluster() -> None:
    """A small cluster far from all others is no reason to go first; items between the clusters are."""
    rng = np.random.default_rng(0)
    sizes = {0: 600, 1: 240, 2: 60}
    centers = np.repeat(np.eye(8)[list(sizes)], list(sizes.values()), axis=0)
    vectors = unit(centers + 0.01 * rng.normal(size=centers.shape))
    between = rng.choice(len(vectors), 20, replace=False)
    vectors[between] = unit(rng.normal(size=(20, 8)))
    ids = np.arange(len(vectors))
    far = in_order(ids, "farthest", 0, vectors=lambda some: vectors[some])
    assert sorted(far) == ids.tolist()
    assert np.isin(far[:20], between).sum() >= 15
    assert in_order(ids[::-1], "farthest", 0, vectors=lambda some: vectors[some]).tolist() == far.tolist()
    small = np.isin(far[20:], np.flatnonzero(centers[:, 2]))
    assert small[:60].mean() < 0.75  # of the mean of all they are the farthest


def test_the_estimate(gallery: Gallery) -> None:
    slow = FakeEncoder(NEW.version, NEW.width, pause=0.1)
    found = estimate(gallery, slow, media_of(IDS), NEW_WIDTH, old=OLD.version, sample=20, share=0.5)
    assert found.items == ITEMS
    assert 0 < found.items_per_second < 211  # 21 items in a tenth of a second
    assert found.hours == pytest.approx(ITEMS / found.items_per_second / 0.5 / 3600, abs=1e-3)
    assert found.new_bytes == ITEMS * NEW_WIDTH * 4


def test_the_share_is_kept() -> None:
    rests = list[float]()
    Throttle(0.25, sleep=rests.append)(2.0, 2.0)
    Throttle(0.25, sleep=rests.append)(2.0, 3.0)
    Throttle(0.25, sleep=rests.append)(2.0, 9.0)
    Throttle(0.25, encoders=4, sleep=rests.append)(2.0, 0.5)  # they go on while this rests
    assert rests == [6.0, 5.0, 0.0, 1.5]
    with pytest.raises(ConfigError, match="--share"):
        Throttle(0.0)
    with pytest.raises(ConfigError, match="--p99-ms"):
        Throttle(p99=0.0)


def test_the_bound_on_live_traffic() -> None:
    """Halved when late, a tenth more when not."""
    states: list[Any] = [{0.01: 0.0, 0.1: 0.0, float("inf"): 0.0}, {0.01: 0.0, 0.1: 9.0, float("inf"): 9.0}]
    states += [{0.01: 50.0, 0.1: 59.0, float("inf"): 59.0}] * 2
    throttle = Throttle(p99=0.02, observe=iter(states).__next__, sleep=lambda seconds: None)
    throttle(1.0, 1.0)
    assert throttle.share == 0.5
    throttle(1.0, 1.0)
    assert throttle.share == pytest.approx(0.6)
    throttle(1.0, 1.0)  # nobody asked anything
    assert throttle.share == pytest.approx(0.7)


def test_workers_that_go_on_during_rests_keep_the_share(gallery: Gallery, graph: bytes) -> None:
    """A batch takes one of three workers a second: at half of their time, two thirds between two answers."""
    begin(gallery, NEW.version, graph)
    rests = list[float]()
    pace = Throttle(0.5, encoders=3, sleep=rests.append)

    def stage(batches: Iterable[Sequence[int]]) -> Iterator[Embedded]:
        return (done._replace(seconds=1.0) for done in pool(6)(batches))

    backfill(gallery, stage, batch=30, pace=pace)
    assert rests == [pytest.approx(2 / 3, abs=0.1)] * 10


def test_cpus_of_workers() -> None:
    assert cpus_each([8], 2) == 4
    assert cpus_each([8], 3) == 2
    assert cpus_each([3, 3], 3) == 1  # with 2 each there would be room for two workers
    assert cpus_each([2, 16], 2) == 8
    assert cpus_each([1, 2], 3) == 1
    assert cpus_each([1, 2], 4) == 0


def test_buckets_of_an_exposition(tmp_path: Path) -> None:
    lines = [
        'sightline_items_seconds_bucket{model="rank_items",stage="total",le="0.01"} 90',
        'sightline_items_seconds_bucket{model="rank_items",stage="total",le="0.1"} 99',
        'sightline_items_seconds_bucket{model="rank_items",stage="total",le="+Inf"} 100',
        'sightline_items_seconds_bucket{model="rank_items",stage="user",le="+Inf"} 5',
        'sightline_items_seconds_sum{model="rank_items",stage="total"} 3',
    ]
    path = tmp_path / "metrics"
    path.write_text("\n".join(lines) + "\n")
    found = read_buckets(path.as_uri(), "sightline_items_seconds", {"stage": "total"})
    assert found == {0.01: 90, 0.1: 99, float("inf"): 100}
    assert [quantile(found, q) for q in (0.5, 0.99, 0.995)] == [0.01, 0.1, float("inf")]
    with pytest.raises(ServingError, match="expected Triton's metrics"):
        read_buckets((tmp_path / "gone").as_uri(), "x", {})


def test_the_state_is_readable_json(gallery: Gallery, graph: bytes) -> None:
    begin(gallery, NEW.version, graph)
    assert json.loads(gallery.get_state("upgrade") or b"")["phase"] == "running"
