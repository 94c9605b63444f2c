"""Interaction events: one, or a whole log, through a running server or straight into a store."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sightline.commands.options import RELEASES, Name, Releases
from sightline.errors import ConfigError, DataError, ServingError

if TYPE_CHECKING:
    from sightline.events import Event

app = typer.Typer(name="events", no_args_is_help=True, help="Tell the server what users did.")

Url = Annotated[str, typer.Option(help="host:port of the server's gRPC endpoint.", envvar="SIGHTLINE_URL")]
URL = "localhost:8501"
Send = Callable[[Sequence["Event"]], Sequence[str]]
"""Events → what became of each."""
_EPOCH, _MICRO = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
_TIMEOUT = 30.0  # seconds, of one batch with its retries
_READ, _BATCH = 16384, 1024  # rows of a log at a time, events


@app.command("send")
def send(
    user: Annotated[int, typer.Option(help="User id.", min=1)],
    item: Annotated[int, typer.Option(help="Item id.", min=1)],
    strength: Annotated[float, typer.Option(help="How the user took it.", min=-1, max=1)] = 1.0,
    time: Annotated[str | None, typer.Option(help="When, as 2026-03-01T12:00:00Z; now by default.")] = None,
    url: Url = URL,
) -> None:
    """Send one event; a line of JSON says what became of it (docs/events.md).

    If it is not known whether it arrived, send it again with the same --time: it counts once.
    """
    from sightline.events import Event

    at = _micros("--time", time) if time else (datetime.now(UTC) - _EPOCH) // _MICRO
    with _server(url) as deliver:
        (outcome,) = deliver([Event(user_id=user, item_id=item, strength=strength, time=at)])
    typer.echo(json.dumps({"user": user, "item": item, "strength": strength, "time": (_EPOCH + at * _MICRO).isoformat(),
                           "outcome": outcome}))  # fmt: skip


@app.command("replay")
def replay(
    log: Annotated[Path, typer.Option("--from", help="interactions.parquet, or the data set's folder.")],
    since: Annotated[str | None, typer.Option(help="Leave out what was earlier, as 2026-03-01T12:00:00Z.")] = None,
    url: Url = URL,
    store: Annotated[
        str | None, typer.Option(help="Apply events in this store, not through a server: a folder or redis://….")
    ] = None,
    name: Name = "current",
    releases: Releases = RELEASES,
    mark: Annotated[
        Path | None, typer.Option(help="File that keeps how far it came; by default one per log and target.")
    ] = None,
) -> None:
    """Apply a log of interactions, oldest first; after an interruption, the same command continues.

    For what happened since a release's ranker was trained: the store was given its users as they were then. With
    --store, --release says whose profiles they are; a store without them is given them first.
    """
    path = log / "interactions.parquet" if log.is_dir() else log
    if path.name != "interactions.parquet":
        raise ConfigError(f"--from: expected interactions.parquet or a folder that has it, got {log}; see docs/data.md")
    where = store or url
    digest = hashlib.sha256(f"{path.resolve()} {where}".encode()).hexdigest()
    mark = mark or Path("artifacts", "events", f"{digest[:16]}.json")
    first = _micros("--since", since) if since else 0
    outcomes: Counter[str] = Counter()
    with _store(store, releases / name) if store else _server(url) as deliver:
        for batch in _batches(path, first, mark):
            outcomes.update(deliver(batch))
    typer.echo(json.dumps({"log": str(path), "events": outcomes.total(), **outcomes, "mark": str(mark)}))


def _batches(path: Path, since: int, mark: Path) -> Iterator[list[Event]]:
    """Events of a log, time of the first `since` (µs) or later, from where the mark is; it moves on when the next
    batch is asked for.

    Raises ConfigError where the mark is none of this log.
    """
    from tqdm import tqdm

    from sightline.store.transfer import count_rows

    status = path.stat()
    about: dict[str, object] = {"log": f"{path.resolve()} {status.st_size} {status.st_mtime_ns}", "since": since}
    done = _read_mark(mark, about)
    events = _events(path, since, done)
    with tqdm(total=count_rows(path), initial=done, desc="events", unit=" rows", disable=None) as progress:
        for part in _parts(events):
            yield [event for _, event in part]
            before, done = done, part[-1][0] + 1
            _write(mark, json.dumps(about | {"rows": done}))
            progress.update(done - before)


def _parts(rows: Iterator[tuple[int, Event]]) -> Iterator[list[tuple[int, Event]]]:
    """In none has a user more events than a history holds: if a part was applied and not marked, all of it is known."""
    from sightline.features import HISTORY

    part: list[tuple[int, Event]] = []
    users: Counter[int] = Counter()
    for row in rows:
        user = row[1].user_id
        if len(part) == _BATCH or users[user] == HISTORY:
            yield part
            part, users = [], Counter()
        part.append(row)
        users[user] += 1
    if part:
        yield part


def _events(path: Path, since: int, done: int) -> Iterator[tuple[int, Event]]:
    """Rows of a log and their events, from row `done` on."""
    import pyarrow as pa

    from sightline.events import Event
    from sightline.schema import stream_interactions
    from trainer.examples import strengths

    row, last = 0, 0
    for batch in stream_interactions(path.parent, _READ):
        columns = [batch["user_id"], batch["item_id"], strengths(batch), batch["timestamp"].cast(pa.int64())]
        for user, item, strength, time in zip(*(column.tolist() for column in columns), strict=True):
            if time < last:
                raise DataError(f"{path}: row {row}: expected rows in time order; sort them by timestamp")
            last = time
            if row >= done and time >= since:
                yield row, Event(user_id=user, item_id=item, strength=strength, time=time)
            row += 1


@contextmanager
def _server(url: str) -> Iterator[Send]:
    import sightline_client as library

    def deliver(events: Sequence[Event]) -> Sequence[str]:
        return client.send_events([library.Event(**vars(event)) for event in events])

    try:
        with library.RankClient(url, timeout=_TIMEOUT) as client:
            yield deliver
    except library.SightlineClientError as error:
        raise ServingError(f"{url}: {error}") from error


@contextmanager
def _store(location: str, release: Path) -> Iterator[Send]:
    from sightline.events import EventRules, apply
    from sightline.features import seed
    from sightline.store import open_store

    rules = EventRules.read(release / "model_repository" / "events" / "1")

    def deliver(events: Sequence[Event]) -> Sequence[str]:
        outcomes = apply(store, events, items=items, users=rules.versions.users.version, affinities=rules.affinities)
        return [outcome.name for outcome in outcomes]

    with open_store(location) as store:
        seed(release, store)
        items = rules.versions.accept(store)
        yield deliver


def _read_mark(mark: Path, about: dict[str, object]) -> int:
    """Rows that are done."""
    if not mark.exists():
        return 0
    try:
        marked: dict[str, object] = json.loads(mark.read_text())
        done = int(str(marked.pop("rows")))
    except (ValueError, AttributeError, KeyError) as error:
        raise ConfigError(f"--mark: {mark}: expected what a replay wrote there, or no file: {error!r}") from error
    if marked != about:
        raise ConfigError(
            f"--mark: {mark} is of another log, or of another --since: expected {about}, got {marked}; if the log has "
            "grown, give a new --mark, and --since the time of the first event that was not applied"
        )
    return done


def _write(path: Path, text: str) -> None:
    """All of it or nothing, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _micros(option: str, text: str) -> int:
    """µs since 1970 of an ISO 8601 time; one without a zone is in UTC."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option}: expected a time such as 2026-03-01T12:00:00Z, got {text!r}") from error
    zoned = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (zoned - _EPOCH) // _MICRO
