"""The vector gallery, and its upgrade to another captioner while it is searched."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sightline.commands.options import DATA, GALLERY, RELEASES, Data, Gallery, Name, Releases
from sightline.errors import ConfigError, GalleryError, ServingError
from sightline.location import is_address

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from backfill.upgrade import Upgrade
    from sightline.gallery import Gallery as OpenGallery

gallery_app = typer.Typer(name="gallery", no_args_is_help=True, help="Items' vectors, for `retrieve`.")
backfill_app = typer.Typer(name="backfill", no_args_is_help=True, help="Move the gallery to another captioner.")
app = typer.Typer()
app.add_typer(gallery_app)
app.add_typer(backfill_app)

Url = Annotated[
    str | None, typer.Option(help="gRPC of the server whose vision tower embeds; without it, one in this process.")
]
Batch = Annotated[int, typer.Option(min=1, help="Items per batch.")]
Transform = Annotated[Path, typer.Option(help="Folder that `sightline backfill train` wrote.")]
TRANSFORM = Path("artifacts/transform")
MODELS = {"rank_items": "sightline_items_seconds", "retrieve": "sightline_retrieve_seconds"}


class Index(StrEnum):
    flat = "flat"
    ivf = "ivf"
    hnsw = "hnsw"


class Order(StrEnum):
    random = "random"
    popularity = "popularity"
    farthest = "farthest"
    uncertainty = "uncertainty"


@gallery_app.command("fill")
def fill(
    data: Data = DATA,
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    index: Annotated[Index, typer.Option(help="Of the first version.")] = Index.flat,
    url: Url = None,
    batch: Batch = 64,
) -> None:
    """Embed the items of a data set that the gallery does not have; after an interruption, the same command goes on."""
    from tqdm import tqdm

    from backfill.job import fill as fill_gallery
    from backfill.source import Catalogue, open_encoder
    from sightline.gallery import open_gallery

    catalogue = Catalogue(data)
    with (
        open_encoder(releases / name, url) as encoder,
        open_gallery(gallery) as opened,
        tqdm(total=len(catalogue), desc="gallery", unit=" items", disable=None) as bar,
    ):
        failed = fill_gallery(
            opened, encoder, encoder.version, encoder.width, catalogue, catalogue.ids, index=index.value, batch=batch,
            advance=bar.update,
        )  # fmt: skip
        counts = _counts(opened)
    for item, reason in list(failed.items())[:10]:
        typer.echo(f"item {item}: {reason}", err=True)
    typer.echo(json.dumps({"items": len(catalogue), "failed": len(failed), "versions": counts}))


@gallery_app.command("put")
def put(
    item: Annotated[int, typer.Argument(min=1, help="Its id.")],
    media: Annotated[Path, typer.Argument(help="Its image or video.", exists=True, dir_okay=False)],
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    url: Url = None,
) -> None:
    """Add an item, or replace it by what it looks like now."""
    from backfill.job import Writer, embed
    from backfill.source import open_encoder

    with open_encoder(releases / name, url) as encoder, _existing(gallery) as opened:
        write, done = Writer(opened, encoder.version), embed(encoder, {item: media.read_bytes()}, [item])
        write(done.vectors, replace=True)
    if done.failed:
        raise ConfigError(f"{media}: {done.failed[item]}")


@gallery_app.command("delete")
def delete(
    items: Annotated[list[int], typer.Argument(help="Ids; unknown ones do not matter.")], gallery: Gallery = GALLERY
) -> None:
    """Remove items."""
    with _existing(gallery) as opened:
        opened.delete(items)


@gallery_app.command("stats")
def stats(gallery: Gallery = GALLERY) -> None:
    """Where it is and what it holds, as JSON."""
    with _existing(gallery, readonly=True) as opened:
        typer.echo(json.dumps(opened.describe() | {"versions": _counts(opened)}, default=str))


@backfill_app.command("train")
def train(
    data: Data = DATA,
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    out: Annotated[Path, typer.Option(help="Folder of the transform.")] = TRANSFORM,
    items: Annotated[int, typer.Option(min=64, help="Items to learn from, at most.")] = 20_000,
    epochs: Annotated[int, typer.Option(min=1)] = 50,
    seed: int = 0,
    url: Url = None,
) -> None:
    """Learn how the new captioner's queries find items of the old one, from items that both have seen."""
    from tqdm import tqdm

    from backfill.source import Catalogue, open_encoder
    from backfill.train import train_transform

    with (
        open_encoder(releases / name, url) as encoder,
        _existing(gallery, readonly=True) as opened,
        tqdm(desc="vectors", unit=" items", disable=None) as bar,
    ):
        record = train_transform(
            opened, encoder, encoder.version, Catalogue(data), out, items=items, epochs=epochs, seed=seed,
            advance=bar.update,
        )  # fmt: skip
    typer.echo(json.dumps(record))


@backfill_app.command("plan")
def plan(
    data: Data = DATA,
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    transform: Transform = TRANSFORM,
    url: Url = None,
    share: Annotated[float, typer.Option(help="Of the encoder's time.")] = 1.0,
) -> None:
    """What an upgrade to this release would cost; changes nothing. The last line is JSON."""
    from rich.console import Console
    from rich.table import Table

    from backfill.job import estimate
    from backfill.source import Catalogue, open_encoder
    from backfill.upgrade import read_upgrade
    from sightline.retrieval import Transform as Graph

    graph = Graph(_graph(transform))
    with open_encoder(releases / name, url) as encoder, _existing(gallery, readonly=True) as opened:
        upgrade = read_upgrade(opened)
        versions = [version.name for version in opened.versions()]
        old = upgrade.old if upgrade else versions[0]
        found = estimate(opened, encoder, Catalogue(data), graph.new, old=old, share=share)
    table = Table(title=f"from {old} to captioner {encoder.version}")
    for column in ("items", "items/s", "hours", "new vectors, MB"):
        table.add_column(column, justify="right")
    megabytes = f"{found.new_bytes / 1e6:,.1f}"
    table.add_row(f"{found.items:,}", f"{found.items_per_second:,.1f}", f"{found.hours:.2f}", megabytes)
    Console(stderr=True).print(table)
    typer.echo(json.dumps(asdict(found)))


@backfill_app.command("begin")
def begin(
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    transform: Transform = TRANSFORM,
    order: Annotated[Order, typer.Option(help="Which items will move first.")] = Order.random,
    seed: int = 0,
) -> None:
    """Let queries of this release's captioner in beside those of the old one; moves nothing. Then serve the release."""
    from backfill.upgrade import begin as begin_upgrade
    from sightline.content import captioner_folder
    from sightline.prompt import captioner_version
    from sightline.release import read_manifest

    read_manifest(releases / name)
    captioner = captioner_version(captioner_folder(releases / name))
    with _existing(gallery) as opened:
        upgrade = begin_upgrade(
            opened, captioner, _graph(transform), order=order.value, seed=seed,
            uncertainty=_weights(transform) if order is Order.uncertainty else None,
        )  # fmt: skip
        typer.echo(json.dumps(_status(opened, upgrade)))


@backfill_app.command("start")
def start(
    data: Data = DATA,
    name: Name = "current",
    releases: Releases = RELEASES,
    gallery: Gallery = GALLERY,
    url: Url = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Embed on Ray: a cluster's address, or local; without --url.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Encoders on Ray; 2 where not given.")] = None,
    batch: Batch = 64,
    share: Annotated[float, typer.Option(help="Of the encoders' time, at most.")] = 1.0,
    p99_ms: Annotated[
        float | None, typer.Option(help="Slow down while live requests take longer; with --watch.")
    ] = None,
    watch: Annotated[
        str, typer.Option(help="Metrics of the live server: http://host:port/metrics.")
    ] = "http://127.0.0.1:8502/metrics",
    model: Annotated[
        str, typer.Option(help=f"Whose requests --p99-ms is about: {' or '.join(MODELS)}.")
    ] = "rank_items",
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Expose the job's metrics.")] = None,
) -> None:
    """Move the items, after `begin` and when this release is served; ends when all have moved.

    Queries of the old release do not find what has moved. Ctrl-C ends after a batch; the same command goes on, also
    after a crash, with Ray or without.
    """
    from backfill.job import backfill, in_process
    from backfill.source import Catalogue, open_encoder
    from backfill.throttle import Buckets, Throttle, read_buckets
    from backfill.upgrade import failures, read_upgrade, write_upgrade
    from serving.exposition import exposed
    from sightline.content import captioner_folder
    from sightline.metrics import Metrics
    from sightline.prompt import captioner_version
    from sightline.ray_cluster import WORKERS
    from sightline.release import read_manifest

    if model not in MODELS:
        raise ConfigError(f"--model: expected {' or '.join(MODELS)}, got {model}")
    if workers is not None and (workers < 1 or ray is None):
        raise ConfigError(f"--workers: expected at least 1, with --ray; got {workers} and --ray {ray}")
    if ray is not None and url is not None:
        raise ConfigError(f"--ray {ray}: expected without --url, its workers have encoders of their own; got {url}")
    encoders = 1 if ray is None else workers or WORKERS
    labels = {"stage": "total"} if model == "rank_items" else {"stage": "search"}

    def observe() -> Buckets:
        try:
            return read_buckets(watch, MODELS[model], labels)
        except ServingError:  # it is being started again: nobody is served slowly
            return {}

    pace = Throttle(share, encoders=encoders, p99=None if p99_ms is None else p99_ms / 1e3, observe=observe)
    catalogue, counted = Catalogue(data), Metrics(model="backfill")
    release = (releases / name).resolve()
    read_manifest(release)
    captioner = captioner_version(captioner_folder(release))
    with ExitStack() as stack:
        opened = stack.enter_context(_existing(gallery))
        known = read_upgrade(opened)
        if known is None:
            raise GalleryError("expected an upgrade, there is none; `sightline backfill begin` makes one")
        if known.captioner != captioner:
            raise GalleryError(
                f"--release {name}: expected captioner {known.captioner}, to which an upgrade is {known.phase}, got "
                f"{captioner}; name its release"
            )
        if known.phase not in ("running", "paused", "moved"):
            way = (
                "`sightline gallery fill` embeds what was left behind, `sightline backfill rollback` leads back"
                if known.phase == "cut over" else "`sightline backfill clean` ends it, then `begin` starts over"
            )  # fmt: skip
            raise GalleryError(f"the upgrade to {captioner} is {known.phase}, expected one that is running; {way}")
        if ray is None:
            stage = in_process(stack.enter_context(open_encoder(release, url)), catalogue)
        else:
            from backfill.ray_pool import ray_pool

            stage = stack.enter_context(ray_pool(ray, encoders, data, release, captioner))
        if known.phase != "running":
            write_upgrade(opened, known.model_copy(update={"phase": "running"}))
        if metrics_port is not None:
            port = stack.enter_context(exposed(counted, metrics_port))
            typer.echo(f"metrics: http://127.0.0.1:{port}/metrics", err=True)
        stopped = stack.enter_context(_until_signal())
        advance = stack.enter_context(_progress(opened))
        done = backfill(
            opened, stage, batch=batch, pace=pace, stopped=stopped, metrics=counted, advance=advance,
            popularity=catalogue.popularity() if known.order == "popularity" else None,
        )  # fmt: skip
        found = _status(opened, done) | {"failed": len(failures(opened))}
    typer.echo(json.dumps(found))


@backfill_app.command("status")
def status(gallery: Gallery = GALLERY) -> None:
    """How far it is, as JSON."""
    from backfill.upgrade import failures, read_upgrade

    with _existing(gallery, readonly=True) as opened:
        upgrade = read_upgrade(opened)
        found: dict[str, Any] = _status(opened, upgrade) if upgrade else {"phase": None, "versions": _counts(opened)}
        typer.echo(json.dumps(found | {"failed": {str(item): why for item, why in failures(opened).items()}}))


@backfill_app.command("pause")
def pause(gallery: Gallery = GALLERY) -> None:
    """A job that is running ends after its batch; queries go on being answered from both versions."""
    _change(gallery, "running", "paused")


@backfill_app.command("resume")
def resume(gallery: Gallery = GALLERY) -> None:
    """Let `start` go on with it."""
    _change(gallery, "paused", "running")


@backfill_app.command("cut-over")
def cut_over(
    force: Annotated[
        bool, typer.Option("--force", help="Also while items are left behind: they are not found.")
    ] = False,
    gallery: Gallery = GALLERY,
) -> None:
    """Search the new version alone; the old one is kept until `clean`."""
    from backfill.upgrade import cut_over as cut

    with _existing(gallery) as opened:
        typer.echo(json.dumps(_status(opened, cut(opened, force=force))))


@backfill_app.command("rollback")
def rollback(gallery: Gallery = GALLERY) -> None:
    """All items are seen in the old version again; the new one is kept until `clean`."""
    from backfill.upgrade import roll_back

    with _existing(gallery) as opened:
        upgrade, without = roll_back(opened)
        typer.echo(json.dumps(_status(opened, upgrade) | {"without_old_vector": without}))


@backfill_app.command("clean")
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False, gallery: Gallery = GALLERY
) -> None:
    """Remove the version that is no longer searched; after this there is no way back."""
    from backfill.upgrade import clean as remove

    with _existing(gallery) as opened:
        if not yes:
            typer.confirm("Remove the version that the upgrade left behind?", abort=True, err=True)
        typer.echo(json.dumps({"removed": remove(opened), "versions": _counts(opened)}))


def _change(location: str, before: str, after: str) -> None:
    from backfill.upgrade import read_upgrade, write_upgrade

    with _existing(location) as opened:
        upgrade = read_upgrade(opened)
        if upgrade is None or upgrade.phase not in (before, after):
            raise GalleryError(
                f"expected an upgrade that is {before}, "
                + (f"it is {upgrade.phase}" if upgrade else "there is none; `sightline backfill begin` makes one")
            )
        typer.echo(json.dumps(_status(opened, write_upgrade(opened, upgrade.model_copy(update={"phase": after})))))


def _existing(location: str, *, readonly: bool = False) -> OpenGallery:
    """The gallery; a folder that is none stays as it is."""
    from sightline.gallery import open_gallery

    if not is_address(location) and not Path(location).exists():
        raise ConfigError(f"--gallery {location}: there is none; `sightline gallery fill` makes one")
    return open_gallery(location, readonly=readonly)


def _graph(folder: Path) -> bytes:
    path = folder / "query.onnx"
    if not path.is_file():
        raise ConfigError(f"--transform {folder}: expected query.onnx there, as `sightline backfill train` writes it")
    return path.read_bytes()


def _weights(folder: Path) -> NDArray[np.float32]:
    import numpy as np

    path = folder / "uncertainty.npy"
    try:
        weights: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected the weights that `sightline backfill train` writes: {error}") from error
    return weights


def _counts(opened: OpenGallery) -> dict[str, dict[str, int]]:
    return {name: count._asdict() for name, count in opened.count().items()}


def _status(opened: OpenGallery, upgrade: Upgrade) -> dict[str, Any]:
    counts = opened.count()
    left, moved = (counts[name].seen if name in counts else 0 for name in (upgrade.old, upgrade.new))
    share = moved / (left + moved) if left + moved else 1.0
    progress = {"remaining": left, "moved": moved, "share": round(share, 4)}
    return upgrade.model_dump() | progress | {"versions": _counts(opened)}


@contextmanager
def _until_signal() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; the second one does not wait."""
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    before = {one: signal.signal(one, note) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def _progress(opened: OpenGallery) -> Iterator[Callable[[str, int], None]]:
    from collections import Counter

    from tqdm import tqdm

    from backfill.upgrade import read_upgrade

    upgrade = read_upgrade(opened)
    counts = opened.count()
    assert upgrade is not None
    moved = counts[upgrade.new].seen
    ended = Counter[str]()
    with tqdm(
        total=counts[upgrade.old].seen + moved, initial=moved, desc="backfill", unit=" items", disable=None
    ) as bar:

        def advance(result: str, items: int) -> None:
            ended[result] += items
            bar.set_postfix(dict(ended), refresh=False)
            bar.update(items)

        yield advance
