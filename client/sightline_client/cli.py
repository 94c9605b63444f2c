"""`sightline-rank`: rank files for a user and print a table."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sightline_client.client import RankClient
from sightline_client.errors import InvalidArgument, SightlineClientError
from sightline_client.protocol import TLS, Ranked

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def rank(
    files: Annotated[list[Path], typer.Argument(help="Images and videos.", exists=True, dir_okay=False)],
    user: Annotated[int, typer.Option(help="User id; 0 is nobody.", min=0)],
    url: Annotated[
        str, typer.Option(help="host:port of the gRPC endpoint.", envvar="SIGHTLINE_URL")
    ] = "localhost:8001",
    deadline_ms: Annotated[int, typer.Option(help="Time for the whole call.", min=1)] = 30_000,
    context: Annotated[
        list[str] | None, typer.Option(help="NAME=INDEX of a context column; may be given again.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document as the last line.")
    ] = False,
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt; implied by the options below.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="PEM of the authorities to trust.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM of this client's certificate.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM of this client's key.")] = None,
) -> None:
    """Rank images and videos for a user: a table, best first, rejected files last with their reason.

    The exit code is 1 if the server could not answer or rejected all files.
    """
    media = [path.read_bytes() for path in files]
    indices = _context(context or [])
    options = TLS(ca=tls_ca, cert=tls_cert, key=tls_key) if tls or tls_ca or tls_cert or tls_key else None
    start = time.perf_counter()
    with RankClient(url, timeout=deadline_ms / 1e3, tls=options) as client:
        rows = client.rank(user, media, context=indices)
    milliseconds = (time.perf_counter() - start) * 1e3
    Console().print(_table(files, rows))
    if as_json:
        results = [{"file": str(files[row.index])} | asdict(row) for row in rows]
        print(
            json.dumps({"user": user, "url": url, "latency_ms": round(milliseconds, 3), "results": results})
        )
    if all(row.error for row in rows):
        raise typer.Exit(1)


def main(arguments: list[str] | None = None, name: str = "sightline-rank") -> None:
    """Entry point: errors that the client raises on purpose end in one line and exit code 1."""
    try:
        app(arguments, prog_name=name)
    except SightlineClientError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _context(values: list[str]) -> dict[str, int]:
    context = {}
    for value in values:
        name, _, index = value.partition("=")
        if not name or not index.isdecimal():
            raise InvalidArgument(f"--context: expected NAME=INDEX such as position=0, got {value!r}")
        context[name] = int(index)
    return context


def _table(files: list[Path], rows: list[Ranked]) -> Table:
    table = Table("rank", "file", "score", "caption", "source")
    for place, row in enumerate(rows, 1):
        file = Text(str(files[row.index]))
        if row.error:
            table.add_row("-", file, "-", Text(row.error, style="red"), row.source)
        else:
            table.add_row(str(place), file, f"{row.score:.4f}", Text(row.caption), row.source)
    return table


if __name__ == "__main__":
    main()
