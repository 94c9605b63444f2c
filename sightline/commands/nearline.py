"""Captions for later: a queue of item events, and the worker that captions them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sightline.commands.options import QUEUE, RELEASES, STORE, Name, Queue, Releases, Store
from sightline.errors import ConfigError
from sightline.location import is_server

if TYPE_CHECKING:
    from sightline.queue import DeadLetter, ItemQueue

app = typer.Typer(name="nearline", no_args_is_help=True, help="Caption items that are not asked for yet.")
dead = typer.Typer(name="dead", no_args_is_help=True, help="Events that were given up.")
app.add_typer(dead)

Which = Annotated[
    list[str] | None, typer.Argument(metavar="[HASH]…", help="Media hashes, or their beginnings; without any: all.")
]


@app.command("run")
def run(
    queue: Queue = QUEUE,
    store: Store = STORE,
    name: Name = "current",
    releases: Releases = RELEASES,
    url: Annotated[str, typer.Option(help="host:port of the server's gRPC endpoint.")] = "127.0.0.1:8501",
    batch: Annotated[int, typer.Option(min=1, max=32, help="Media per request.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="Failures after which an event is given up.")] = 8,
    lease_seconds: Annotated[
        float, typer.Option(min=1, help="After so long in silence, what another worker holds is taken over.")
    ] = 60.0,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Prometheus metrics at /metrics; 0 takes a free port.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="Address for them; 0.0.0.0 for all.")] = "127.0.0.1",
    until_empty: Annotated[bool, typer.Option("--until-empty", help="End when nothing waits any more.")] = False,
) -> None:
    """Caption what is queued, until Ctrl-C or SIGTERM; the last line is JSON: how the events ended."""
    from serving.nearline import WorkerConfig
    from serving.nearline_run import run_worker

    ended = run_worker(
        queue, store, releases / name, url, WorkerConfig(batch=batch, attempts=attempts), lease_seconds=lease_seconds,
        metrics=None if metrics_port is None else (metrics_host, metrics_port), until_empty=until_empty,
    )  # fmt: skip
    typer.echo(json.dumps(ended))


@app.command("enqueue")
def enqueue(
    manifest: Annotated[Path, typer.Option(help="items.parquet of a data set; media files lie beside it.")],
    queue: Queue = QUEUE,
    max_events: Annotated[int, typer.Option(min=1, help="Waits while the queue holds so many.")] = 10_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Waits while the queue's media have so many.")] = 1 << 30,
) -> None:
    """Queue a catalogue's items; after an interruption, the same command continues."""
    from tqdm import tqdm

    from sightline.queue import Bounds, open_queue
    from sightline.queue.manifest import count_items, enqueue

    rows = count_items(manifest)
    with (
        open_queue(queue, Bounds(events=max_events, media_bytes=max_bytes)) as opened,
        tqdm(total=rows, desc=manifest.name, unit=" items", disable=None) as bar,
    ):
        new = enqueue(opened, manifest, bar.update)
    typer.echo(f"{manifest}: {rows} items, {new} new to the queue")


@app.command("stats")
def stats(queue: Queue = QUEUE) -> None:
    """How many events wait, are taken or dead, and the age of the oldest in seconds, as JSON."""
    with _existing(queue) as opened:
        typer.echo(json.dumps(asdict(opened.stats())))


@dead.command("list")
def list_dead(which: Which = None, queue: Queue = QUEUE) -> None:
    """A line of JSON per event: item, media hash, reason, attempts."""
    with _existing(queue) as opened:
        for letter in _chosen(opened, which):
            shown: dict[str, Any] = {"item": letter.item_id, "media_hash": letter.media_hash,
                                     "media_bytes": letter.media_bytes}  # fmt: skip
            typer.echo(json.dumps(shown | letter.note.model_dump(), ensure_ascii=False))


@dead.command("retry")
def retry_dead(which: Which = None, queue: Queue = QUEUE) -> None:
    """Queue them again, as if they were new."""
    with _existing(queue) as opened:
        for letter in (letters := _chosen(opened, which)):
            opened.revive(letter)
    typer.echo(f"{len(letters)} events wait again")


@dead.command("drop")
def drop_dead(
    which: Which = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    queue: Queue = QUEUE,
) -> None:
    """Remove them with their media."""
    with _existing(queue) as opened:
        letters = _chosen(opened, which)
        if letters and not yes:
            typer.confirm(f"Remove {len(letters)} events with their media?", abort=True, err=True)
        for letter in letters:
            opened.drop(letter)
    typer.echo(f"{len(letters)} events removed")


def _existing(location: str) -> ItemQueue:
    """The queue; a folder that is none stays as it is."""
    from sightline.queue import open_queue

    if not is_server(location) and not Path(location, "new").is_dir():
        raise ConfigError(
            f"--queue {location}: there is none; expected a queue, as `sightline nearline enqueue` makes it"
        )
    return open_queue(location)


def _chosen(queue: ItemQueue, which: list[str] | None) -> list[DeadLetter]:
    letters = queue.dead_letters()
    for beginning in which or ():
        if not any(letter.media_hash.startswith(beginning) for letter in letters):
            raise ConfigError(f"{beginning}: expected the beginning of a dead event's media hash, there is none such")
    return [letter for letter in letters if not which or letter.media_hash.startswith(tuple(which))]
