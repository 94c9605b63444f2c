"""Captioner, captions, ranker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.commands.options import CAPTIONER, CAPTIONS, DATA, RANKER, Captions, Data

app = typer.Typer()
train = typer.Typer(no_args_is_help=True, help="Train the captioner and the ranker.")
app.add_typer(train, name="train")


@train.command("captioner")
def train_captioner(
    data: Data = DATA,
    out: Annotated[
        Path, typer.Option(help="Folder of the captioner; an interrupted run continues.")
    ] = CAPTIONER,
    size: Annotated[str, typer.Option(help="tiny, 7b.")] = "tiny",
    start: Annotated[
        Path | None, typer.Option("--from", help="LLaVA checkpoint folder to go on from.")
    ] = None,
    teacher_steps: Annotated[
        int, typer.Option(help="Steps of a convolutional teacher of the tower: 700 for few or natural pictures.")
    ] = 0,
    tower_steps: Annotated[int, typer.Option(help="Steps of the vision tower alone, first.")] = 850,
    steps: Annotated[int, typer.Option(help="Steps on captions.")] = 560,
    batch: Annotated[int, typer.Option()] = 64,
    lr: Annotated[float, typer.Option(help="Of AdamW; about 2e-5 with --from.")] = 2e-3,
    shift: Annotated[int, typer.Option(help="Pixels that augmentation moves pictures by.")] = 2,
    behaviour: Annotated[
        int, typer.Option(help="Words for who likes an item: clusters of what the same users like; 0: none.")
    ] = 0,
    behaviour_likes: Annotated[int, typer.Option(help="Items with fewer have no such word.")] = 5,
    behaviour_terciles: Annotated[
        bool, typer.Option("--behaviour-terciles", help="Also words for how well liked and how widely seen.")
    ] = False,
    pretrain_steps: Annotated[int, typer.Option(help="Steps of the tower on masked pictures, before all else.")] = 0,
    pretrain_unseen: Annotated[
        bool, typer.Option("--pretrain-unseen", help="There also use pictures of items after the split.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the captioner on the training items of a data set; the last line is the record as JSON."""
    from trainer import captioner

    config = captioner.CaptionerConfig(
        size=size, start=start, teacher_steps=teacher_steps, tower_steps=tower_steps, steps=steps, batch=batch, lr=lr,
        shift=shift, behaviour=behaviour, behaviour_likes=behaviour_likes, behaviour_terciles=behaviour_terciles,
        pretrain_steps=pretrain_steps, pretrain_unseen=pretrain_unseen, seed=seed,
    )  # fmt: skip
    typer.echo(json.dumps(captioner.train_captioner(data, out, config)))


@train.command("ranker")
def train_ranker(
    data: Data = DATA,
    captions: Captions = CAPTIONS,
    out: Annotated[Path, typer.Option(help="Folder of the ranker.")] = RANKER,
    arm: Annotated[
        list[str] | None, typer.Option(help="ids, item_tokens, profile, positive, tokens; the last one is kept.")
    ] = None,
    model: Annotated[str, typer.Option(help="dlrm, dcnv2, deepfm, din.")] = "dlrm",
    token_weights: Annotated[
        bool, typer.Option("--token-weights", help="Learn a weight per token of an item's caption.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Per arm.")] = 2,
    epochs: Annotated[int, typer.Option(help="At most.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
) -> None:
    """Train and compare rankers with and without content features; the last line is the record as JSON."""
    from trainer import ranker
    from trainer.captioning import read_captions

    found, version = read_captions(captions)
    arms = tuple(dict.fromkeys(arm or ("ids", "tokens")))  # each once
    config = ranker.RankerConfig(
        arms=arms, model=model, token_weights=token_weights, seeds=seeds, epochs=epochs, seed=seed
    )
    typer.echo(json.dumps(ranker.train_ranker(data, found, version, out, config)))


@app.command()
def caption(
    data: Data = DATA,
    captioner: Annotated[Path, typer.Option(help="Folder of the captioner.")] = CAPTIONER,
    out: Annotated[Path, typer.Option(help="Parquet file: item_id, caption, annotation.")] = CAPTIONS,
    seed: Annotated[int, typer.Option(min=0, help="Of the captioner's training: tells held-out items.")] = 0,
    baselines: Annotated[bool, typer.Option(help="Also measure captions that need no model.")] = False,
    samples: Annotated[int, typer.Option(help="Further captions drawn per item, into its annotation.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the drawn ones.")] = 1.0,
) -> None:
    """Caption all items of a data set; the last line is JSON with their quality on held-out items."""
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
