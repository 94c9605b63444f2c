"""Captions: of a data set, with a report on their quality, and of catalogues of any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.commands.options import CAPTIONER, CAPTIONS, DATA, Data
from sightline.errors import ConfigError

app = typer.Typer(name="caption")

Captioner = Annotated[Path, typer.Option("--captioner", help="Folder of the captioner.")]


@app.callback(invoke_without_command=True)
def caption(
    context: typer.Context,
    data: Data = DATA,
    captioner: Captioner = CAPTIONER,
    out: Annotated[Path, typer.Option(help="Parquet file: item_id, caption, annotation.")] = CAPTIONS,
    seed: Annotated[int, typer.Option(min=0, help="Of the captioner's training: tells held-out items.")] = 0,
    baselines: Annotated[bool, typer.Option(help="Also measure captions that need no model.")] = False,
    samples: Annotated[int, typer.Option(help="Further captions drawn per item, into its annotation.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the drawn ones.")] = 1.0,
) -> None:
    """Caption all items of a data set; the last line is JSON with their quality on held-out items."""
    if context.invoked_subcommand:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        if given := [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]:
            raise ConfigError(f"--{given[0]}: expected behind `{context.invoked_subcommand}`, whose option it then is")
        return
    from rich.console import Console

    from sightline.prompt import captioner_version
    from trainer import captioning
    from trainer.caption_report import tables

    version = captioner_version(captioner)
    captions = captioning.caption_items(captioner, data)
    if samples:
        drawn = captioning.sample_items(captioner, data, samples=samples, temperature=temperature, seed=seed)
        captions = captioning.with_samples(captions, drawn)
    captioning.write_captions(out, captions, version)
    quality: dict[str, Any] = captioning.caption_quality(data, captions, seed)
    quality["calibration"] = captioning.caption_calibration(data, captioner, seed)
    if baselines:
        quality["baselines"] = captioning.caption_baselines(data, captioner, seed)
    for table in tables(quality):
        Console(stderr=True, highlight=False).print(table)
    typer.echo(json.dumps(quality))


@app.command("run")
def run(
    data: Annotated[Path, typer.Option(help="A data set, a Parquet file of items, or a folder of such files.")] = DATA,
    captioner: Captioner = CAPTIONER,
    out: Annotated[
        Path, typer.Option(help="Folder of the run, with a Parquet file per block; an interrupted run continues.")
    ] = Path("artifacts/caption-run"),
    captions: Annotated[Path, typer.Option(help="All captions as one file, when the run is complete.")] = CAPTIONS,
    block: Annotated[int, typer.Option(help="Items that are read, captioned and written together.")] = 512,
    batch: Annotated[int, typer.Option(help="Frames that the captioner sees at once.")] = 128,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Caption on Ray Data: a cluster's address, or local.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Captioners on Ray; 2 where not given.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Caption blocks again that have media which could not be used.")
    ] = False,
    store: Annotated[
        str | None, typer.Option(help="Also write features to this store: a folder (LMDB), redis://…, rediss://….")
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="token_spec.json of the ranker that reads the store.")] = None,
) -> None:
    """Caption a catalogue of any size, block by block; the last line is JSON: what was captioned and what was not."""
    from trainer.bulk import BulkConfig, caption_catalogue

    config = BulkConfig(
        data=data, captioner=captioner, out=out, captions=captions, block=block, batch=batch, ray=ray, workers=workers,
        retry_failed=retry_failed, store=store, spec=spec,
    )  # fmt: skip
    typer.echo(json.dumps(caption_catalogue(config)))
