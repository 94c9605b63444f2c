"""Everything once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder in the MovieLens or in Sightline's layout; generated if not given."),
    ] = None,
    root: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("artifacts"),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    small: Annotated[
        bool, typer.Option("--small", help="A few steps of everything, to see that it works.")
    ] = False,
) -> None:
    """Data, captioner, ranker, release, server, ranking: everything once; the last line is JSON."""
    from sightline.demo import run_demo

    typer.echo(json.dumps(run_demo(data, root, seed=seed, small=small)))
