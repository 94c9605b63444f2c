"""Feature stores: what is in them, in and out."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sightline.commands.options import RELEASES, STORE, Name, Releases, Store
from sightline.errors import ConfigError

if TYPE_CHECKING:
    from sightline.store import FeatureStore, Schema

app = typer.Typer(name="store", no_args_is_help=True, help="Load and examine feature stores.")

Only = Annotated[str | None, typer.Option("--version", help="One feature version only.")]


class Kind(StrEnum):
    item = "item"
    user = "user"


@app.command("stats")
def stats(store: Store = STORE) -> None:
    """What is in a store and how it is kept, as JSON."""
    with _open(store) as opened:
        versions = [
            schema.model_dump() | {"records": opened.count(schema), "record_bytes": schema.record.itemsize}
            for schema in opened.schemas()
        ]
        shown = {"versions": versions, "captions": opened.count_captions(), "unfinished_loads": opened.marks()}
        typer.echo(json.dumps(opened.describe() | shown, indent=1))


@app.command("get")
def get(
    kind: Annotated[Kind, typer.Argument()],
    identity: Annotated[int, typer.Argument(metavar="ID")],
    version: Only = None,
    store: Store = STORE,
) -> None:
    """One item or user in all its versions, a line of JSON each; exit code 1 if there is none."""
    with _open(store) as opened:
        found = [
            shown
            for schema in _schemas(opened, version)
            if schema.kind == kind and (shown := _show(opened, schema, identity)) is not None
        ]
    for shown in found:
        typer.echo(json.dumps(shown, ensure_ascii=False))
    raise typer.Exit(0 if found else 1)


@app.command("carry-over")
def carry_over(name: Name = "current", releases: Releases = RELEASES, store: Store = STORE) -> None:
    """Make items that older captioners described readable for a release's ranker, until its own describes them."""
    from tqdm import tqdm

    from sightline.features import Versions
    from sightline.features import carry_over as carry
    from sightline.store import open_store
    from sightline.tokens import TokenSpec

    models = releases / name / "model_repository"
    versions, spec = Versions.read(models / "lookup" / "1"), TokenSpec.load(models / "tokenize/1/token_spec.json")
    with open_store(store) as opened, tqdm(desc="carry over", unit=" items", disable=None) as bar:
        typer.echo(json.dumps({"written": carry(opened, versions, spec, bar.update)}))


@app.command("verify")
def verify(version: Only = None, store: Store = STORE) -> None:
    """Read and check every record; JSON with the damaged ones, exit code 1 if there are any."""
    from sightline.store import transfer

    reports = {}
    with _open(store) as opened:
        for schema in _schemas(opened, version):
            with _progress(schema.space, opened.count(schema)) as bar:
                reports[schema.space] = transfer.verify(opened, schema, bar.update)
    typer.echo(json.dumps({space: vars(report) for space, report in reports.items()}, indent=1))
    raise typer.Exit(1 if any(report.damaged for report in reports.values()) else 0)


@app.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="Folder for one Parquet file per version.")],
    version: Only = None,
    store: Store = STORE,
) -> None:
    """Write a store to Parquet files, which `load` reads."""
    from sightline.store import transfer

    with _open(store) as opened:
        for schema in _schemas(opened, version):
            path = out / f"{schema.space}.parquet"
            with _progress(schema.space, opened.count(schema)) as bar:
                rows = transfer.export(opened, schema, path, bar.update)
            typer.echo(f"{path}: {rows} records")


@app.command("load")
def load(
    files: Annotated[list[Path], typer.Argument(help="Parquet files of features, or folders of them.")],
    store: Store = STORE,
) -> None:
    """Load Parquet files; after an interruption, the same command continues."""
    from sightline.store import open_store, transfer

    paths = [path for file in files for path in (sorted(file.glob("*.parquet")) if file.is_dir() else [file])]
    if not paths:
        raise ConfigError(f"FILES: expected Parquet files, got {', '.join(map(str, files))} without any")
    with open_store(store) as opened:
        for path in paths:
            rows = transfer.count_rows(path)
            with _progress(path.name, rows) as bar:
                schema = transfer.load(opened, path, bar.update)
            typer.echo(f"{path}: {rows} records of {schema.space}")


@app.command("drop")
def drop(
    version: Annotated[str, typer.Option("--version", help="The feature version to remove.")],
    kind: Annotated[Kind, typer.Option("--kind", help="A version's name is one for items and another for users.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: Store = STORE,
) -> None:
    """Remove a feature version for good, when nobody reads or writes it any longer."""
    from sightline.store import ItemSchema, UserSchema, open_store

    with _open(store) as opened:
        schema: Schema = opened.schema(ItemSchema if kind == Kind.item else UserSchema, version)
        records = opened.count(schema)
    if not yes:
        typer.confirm(f"Remove {schema.space} with its {records} records?", abort=True, err=True)
    with open_store(store) as opened:
        opened.drop(schema)
    typer.echo(f"{schema.space}: {records} records removed")


def _open(location: str) -> FeatureStore:
    from sightline.store import open_store

    return open_store(location, readonly=True)


def _schemas(store: FeatureStore, version: str | None) -> list[Schema]:
    known = store.schemas()
    found = [schema for schema in known if version in (None, schema.version)]
    if not found:
        names = ", ".join(sorted({schema.version for schema in known})) or "none: the store is empty"
        raise ConfigError(f"--version: expected one of the store's ({names}), got {version or 'nothing'}")
    return found


def _show(store: FeatureStore, schema: Schema, identity: int) -> dict[str, Any] | None:
    if schema.kind == "item":
        (item,) = store.read_details([identity], [schema.version])
        return None if item is None else {
            "item": identity, "version": schema.version, "captioner": schema.captioner,
            "token_spec": schema.token_spec, "caption": item.caption, "media_hash": item.media_hash,
            "tokens": item.tokens, "vector": None if item.vector is None else item.vector.tolist(),
        }  # fmt: skip
    user = store.read_user(identity, [schema.version]).record
    if user is None:
        return None
    lists = {name: getattr(user, name).tolist() for name in ("items", "strengths", "times")}
    profile = {name: value.tolist() for name, value in vars(user.profile).items()}
    return {"user": identity, "version": schema.version, "token_spec": schema.token_spec, "history": lists,
            "profile": profile, "state_bytes": len(user.state)}  # fmt: skip


def _progress(what: str, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=" records", unit_scale=True, disable=None)
