"""What the parts are worth: evaluation, gates, token reports, explanations, benchmark."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.commands.options import CAPTIONS, DATA, RELEASES, Captions, Data, Name, Releases, pairs
from sightline.errors import ConfigError

app = typer.Typer()


@app.command()
def tokens(
    captions: Captions = CAPTIONS,
    family: Annotated[
        list[str] | None,
        typer.Option(help="word, bigram, trigram, subword, slot, semantic, confidence, sample; give it several times."),
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="token_spec.json to measure; by default one is fitted.")] = None,
    grammar: Annotated[str | None, typer.Option(help="Of the captions, for slots: product, movie.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Ids per caption.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="Of each hashed family.")] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of the halves: fitted on one, measured on the other.")] = 0,
) -> None:
    """Rows, coverage, collisions and truncation of token families on captions; the last line is JSON."""
    from rich.console import Console

    from evaluation.token_report import measure_tokens, table
    from trainer.captioning import read_captions

    found, _ = read_captions(captions)
    statistics, document = measure_tokens(
        list(found.values()), family or ["word", "bigram", "trigram"], spec=spec, grammar=grammar, length=length,
        rows=rows, seed=seed,
    )  # fmt: skip
    Console(stderr=True, highlight=False).print(table(statistics))
    typer.echo(json.dumps(document))


@app.command("evaluate")
def evaluate_content(
    data: Data = DATA,
    split: Annotated[str, typer.Option(help="cold (item k-fold), temporal (streaming), warm.")] = "cold",
    arm: Annotated[
        list[str] | None, typer.Option(help="Give it several times; the first is the base of the lifts.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Of the cold split.")] = 5,
    seeds: Annotated[int, typer.Option(help="Per arm and fold.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of folds and training.")] = 0,
    model: Annotated[str, typer.Option(help="Ranker: dlrm, dcnv2, deepfm, din.")] = "dlrm",
    small: Annotated[bool, typer.Option("--small", help="A few steps, to see that it works.")] = False,
    work: Annotated[
        Path | None, typer.Option(help="Keeps captioners and scores, so that a stopped run goes on.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report.")] = None,
) -> None:
    """Measure what content brings a ranker on held-out items or times; report with plots, the last line is JSON."""
    from dataclasses import replace

    from evaluation.harness import EvaluationConfig, evaluate
    from evaluation.report import write_report
    from sightline.demo import data_folder
    from trainer.captioner import CaptionerConfig
    from trainer.ranker import RankerConfig

    folder = data_folder(data, Path("artifacts"))
    config = EvaluationConfig(split=split, folds=folds, seeds=seeds, seed=seed)
    arms = tuple(dict.fromkeys(arm or config.arms))  # each once
    config = replace(config, arms=arms, ranker=replace(config.ranker, model=model))
    if small:
        tiny = CaptionerConfig(teacher_steps=4, tower_steps=4, steps=3, batch=8, eval_every=2)
        config = replace(config, captioner=tiny, ranker=RankerConfig(epochs=1, model=model))
    report = evaluate(
        folder, work or Path("artifacts/evaluation") / folder.name, config,
        progress=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    report["command"] = "sightline " + " ".join(sys.argv[1:])
    for path in write_report(report, out or Path("artifacts/evaluation") / f"{folder.name}-{split}-{model}"):
        typer.echo(path, err=True)
    typer.echo(json.dumps(report))


@app.command()
def quality(
    root: Annotated[Path, typer.Option(help="Where the run is kept; emptied first.")] = Path("artifacts/quality"),
    small: Annotated[bool, typer.Option("--small", help="A few steps; the gates then fail.")] = False,
) -> None:
    """Run the demo's job afresh and hold it to the checked-in gates; exit code 1 if one fails. Last line JSON."""
    import shutil

    from rich.console import Console
    from rich.table import Table

    from evaluation.gates import GATES, check_gates
    from sightline.demo import run_demo

    mark = root / ".quality"
    if root.exists() and any(root.iterdir()) and not mark.exists():
        raise ConfigError(
            f"--root {root}: is emptied first, but holds something else than an earlier `sightline quality`; give "
            "another folder or remove this one"
        )
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    mark.touch()
    seed = json.loads(GATES.read_text())["seed"]
    figures = run_demo(None, root, seed=seed, small=small)
    gates = check_gates(figures)
    table = Table("gate", "at least", "value", "pass", title="Quality gates")
    for gate in gates:
        value = "none" if gate["value"] is None else f"{gate['value']:.4f}"
        table.add_row(gate["metric"], f"{gate['at_least']}", value, "yes" if gate["pass"] else "NO")
    Console().print(table)
    passed = all(gate["pass"] for gate in gates)
    typer.echo(json.dumps({"pass": passed, "gates": gates, "seconds": figures["seconds"]["total"]}))
    raise typer.Exit(0 if passed else 1)


@app.command()
def explain(
    user: Annotated[int, typer.Option(help="User id; an unknown one is scored as nobody in particular.")],
    item: Annotated[int, typer.Option(help="Item id, unknown ones likewise.")],
    caption: Annotated[str | None, typer.Option(help="The item's caption; by default that of --captions.")] = None,
    captions: Captions = CAPTIONS,
    name: Name = "current",
    releases: Releases = RELEASES,
    context: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; 0 by default.")] = None,
    store: Annotated[str | None, typer.Option(help="Feature store with profiles of now; else as trained.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("artifacts/explain.png"),
) -> None:
    """Which words moved a score: each is taken away and the release's ranker asked again; the last line is JSON."""
    from dataclasses import asdict

    from rich.console import Console

    from evaluation import explain as explaining

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: expected a file with the ending .png")
    if caption is None:
        from trainer.captioning import read_captions

        found, _ = read_captions(captions)
        if item not in found:
            raise ConfigError(f"--item {item}: {captions} has no caption of it; give one with --caption TEXT")
        caption = found[item]
    explanation = explaining.explain(
        releases / name, user, item, caption, _numbers("--context", context), store=store
    )  # fmt: skip
    Console(stderr=True, highlight=False).print(explaining.table(explanation))
    explaining.plot(explanation, out)
    typer.echo(json.dumps({**asdict(explanation), "picture": str(out)}))


def _numbers(flag: str, values: list[str] | None) -> dict[str, int]:
    named = pairs(flag, values, "VALUE")
    for name, value in named.items():
        if not re.fullmatch(r"-?\d+", value):
            raise ConfigError(f"{flag}: expected NAME=VALUE with a whole number, got {name}={value}")
    return {name: int(value) for name, value in named.items()}


@app.command()
def bench(
    data: Annotated[Path | None, typer.Option(help="Data set whose newest items are sent.")] = None,
    releases: Annotated[Path | None, typer.Option(help="Its current release is served.")] = None,
    out: Annotated[Path | None, typer.Option(help="Gets one folder per run.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help="Give it several times.")] = None,
    runs: Annotated[int | None, typer.Option(help="Repetitions; figures are their medians.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A minute, to see that it works.")] = False,
) -> None:
    """Measure every model and the ensemble with perf_analyzer; the last line is JSON."""
    from benchmarks.throughput import BenchOptions, opening
    from benchmarks.throughput import bench as run_bench

    given = {
        "data": data,
        "releases": releases,
        "out": out,
        "runs": runs,
        "concurrency": tuple(concurrency) if concurrency else None,
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    options = BenchOptions.quick(**chosen) if quick else BenchOptions(**chosen)
    typer.echo(opening(options))
    typer.echo(json.dumps(run_bench(options, progress=typer.echo), separators=(",", ":")))
