"""Captioner and ranker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

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
