"""`sightline …`: thin verbs over the rooms. Heavy imports happen inside the verbs."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sightline.errors import ConfigError, SightlineError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Let a recommender see its items.",
)
data = typer.Typer(no_args_is_help=True, help="Generate, import and validate data sets.")
train = typer.Typer(no_args_is_help=True, help="Train the captioner and the ranker.")
release = typer.Typer(no_args_is_help=True, help="List, verify and roll back releases.")
app.add_typer(data, name="data")
app.add_typer(train, name="train")
app.add_typer(release, name="release")

# --- data -----------------------------------------------------------------------------------------


@data.command("generate")
def generate_data(
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/synthetic"),
    items: Annotated[int, typer.Option(help="Images and videos.")] = 8500,
    users: Annotated[int, typer.Option()] = 1200,
    sessions_per_user: Annotated[int, typer.Option(help="Slates of ten impressions each.")] = 32,
    video_share: Annotated[float, typer.Option()] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data.")] = 0,
) -> None:
    """Generate a catalogue of images and videos with a log of impressions; prints its best possible AUC."""
    from catalogue.synthetic import SyntheticConfig, generate

    config = SyntheticConfig(
        items=items, users=users, sessions_per_user=sessions_per_user, video_share=video_share, seed=seed
    )
    record = generate(out, config)
    typer.echo(
        f"{out}: {items} items, {record['rows']} impressions, click rate {record['click_rate']:.3f}; best possible AUC "
        f"after the cut {record['auc_bayes']:.4f}, on items created after it {record['auc_bayes_cold']:.4f}"
    )


@data.command("import-movielens")
def import_movielens(
    folder: Annotated[Path, typer.Argument(help="Folder with ratings.csv, movies.csv and posters/.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/movielens"),
    positive_rating: Annotated[float, typer.Option(help="Lowest rating whose label is 1.")] = 4.0,
) -> None:
    """Import MovieLens ratings and posters."""
    from catalogue import importers

    _imported(out, importers.import_movielens(folder, out, positive_rating=positive_rating))


class EmojiStyle(StrEnum):
    openmoji = "openmoji"
    twemoji = "twemoji"


@data.command("import-emoji")
def import_emoji(
    folder: Annotated[Path, typer.Argument(help="Folder with emoji.csv, openmoji/ and twemoji/.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/emoji"),
    style: Annotated[EmojiStyle, typer.Option(help="Whose drawings.")] = EmojiStyle.openmoji,
) -> None:
    """Import emoji with their annotations."""
    from catalogue import importers

    _imported(out, importers.import_emoji(folder, out, style=style.value))


@data.command("import")
def import_table(
    items: Annotated[Path, typer.Argument(help="Items, .csv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")] = Path("artifacts/data/imported"),
    media: Annotated[
        Path | None, typer.Option(help="Folder of the media files; by default that of ITEMS.")
    ] = None,
    interactions: Annotated[Path | None, typer.Option(help="Interactions, .csv or .parquet.")] = None,
    item_column: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN: where item_id, media, created_at or text is called otherwise."),
    ] = None,
    interaction_column: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN for user_id, item_id, timestamp, label, context_<name>."),
    ] = None,
) -> None:
    """Import tables of any origin with a folder of media."""
    from catalogue import importers

    record = importers.import_table(
        items,
        out,
        media_folder=media,
        interactions_file=interactions,
        item_columns=_pairs("--item-column", item_column),
        interaction_columns=_pairs("--interaction-column", interaction_column),
    )
    _imported(out, record)


@data.command("validate")
def validate_data(folder: Annotated[Path, typer.Argument(help="Folder of the data set.")]) -> None:
    """Check a data set; print what is in it as JSON."""
    from sightline.schema import validate

    typer.echo(json.dumps(validate(folder), indent=1))


def _imported(out: Path, record: dict[str, Any]) -> None:
    """Report files that had to be left out, then check and describe what was written."""
    for rejected in record["rejected_media"]:
        typer.echo("item {item_id}: {file} left out: {reason}".format(**rejected), err=True)
    validate_data(out)


def _pairs(flag: str, values: list[str] | None) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values or [])
    for name, column in pairs.items():
        if not name or not column:
            raise ConfigError(f"{flag}: expected NAME=COLUMN, got {name!r}")
    return pairs


# --- train ----------------------------------------------------------------------------------------

Data = Annotated[Path, typer.Option("--data", help="Folder of the data set.")]
DATA, CAPTIONER, RANKER = (Path("artifacts") / name for name in ("data/synthetic", "captioner", "ranker"))


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
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the captioner on the training items of a data set; the last line is the record as JSON."""
    from trainer import captioner

    config = captioner.CaptionerConfig(
        size=size, start=start, teacher_steps=teacher_steps, tower_steps=tower_steps, steps=steps, batch=batch, lr=lr,
        shift=shift, seed=seed,
    )  # fmt: skip
    typer.echo(json.dumps(captioner.train_captioner(data, out, config)))


@app.command()
def caption(
    data: Data = DATA,
    captioner: Annotated[Path, typer.Option(help="Folder of the captioner.")] = CAPTIONER,
    out: Annotated[Path, typer.Option(help="Parquet file: item_id, caption.")] = Path(
        "artifacts/captions.parquet"
    ),
    seed: Annotated[int, typer.Option(help="Of the captioner's training: tells held-out items.")] = 0,
    baselines: Annotated[bool, typer.Option(help="Also measure captions that need no model.")] = False,
) -> None:
    """Caption all items of a data set; the last line is JSON with their quality on held-out items."""
    from sightline.prompt import captioner_version
    from trainer.captioning import caption_baselines, caption_items, caption_quality, write_captions

    version = captioner_version(captioner)
    captions = caption_items(captioner, data)
    write_captions(out, captions, version)
    quality = caption_quality(data, captions, seed)
    if baselines:
        quality["baselines"] = caption_baselines(data, captioner, seed)
    typer.echo(json.dumps(quality))


@app.command()
def tokens(
    captions: Annotated[Path, typer.Option(help="What `sightline caption` wrote.")] = Path(
        "artifacts/captions.parquet"
    ),
    family: Annotated[
        list[str] | None,
        typer.Option(help="word, bigram, trigram, subword, slot, semantic, confidence, sample; give it several times."),
    ] = None,
    spec: Annotated[Path | None, typer.Option(help="token_spec.json to measure; by default one is fitted.")] = None,
    grammar: Annotated[str | None, typer.Option(help="Of the captions, for slots: product, movie.")] = None,
    length: Annotated[int, typer.Option(help="Ids per caption.")] = 32,
    rows: Annotated[int, typer.Option(help="Of each hashed family.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the halves: fitted on one, measured on the other.")] = 0,
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


@train.command("ranker")
def train_ranker(
    data: Data = DATA,
    captions: Annotated[Path, typer.Option(help="What `sightline caption` wrote.")] = Path(
        "artifacts/captions.parquet"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the ranker.")] = RANKER,
    arm: Annotated[
        list[str] | None, typer.Option(help="ids, item_tokens, profile, tokens, negative; the last one is kept.")
    ] = None,
    model: Annotated[str, typer.Option(help="dlrm, dcnv2, deepfm, din.")] = "dlrm",
    token_weights: Annotated[
        bool, typer.Option("--token-weights", help="Learn a weight per token of an item's caption.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Per arm.")] = 2,
    epochs: Annotated[int, typer.Option(help="At most.")] = 4,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Train and compare rankers with and without content features; the last line is the record as JSON."""
    from trainer import ranker
    from trainer.captioning import read_captions

    found, version = read_captions(captions)
    arms = tuple(arm) if arm else ("ids", "tokens")
    config = ranker.RankerConfig(
        arms=arms, model=model, token_weights=token_weights, seeds=seeds, epochs=epochs, seed=seed
    )
    typer.echo(json.dumps(ranker.train_ranker(data, found, version, out, config)))


@app.command("evaluate")
def evaluate_content(
    data: Data = DATA,
    split: Annotated[str, typer.Option(help="cold (item k-fold), temporal (streaming), warm.")] = "cold",
    arm: Annotated[
        list[str] | None, typer.Option(help="Give it several times; the first is the base of the lifts.")
    ] = None,
    folds: Annotated[int, typer.Option(help="Of the cold split.")] = 5,
    seeds: Annotated[int, typer.Option(help="Per arm and fold.")] = 5,
    seed: Annotated[int, typer.Option(help="Of folds and training.")] = 0,
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
    config = replace(config, arms=tuple(arm) if arm else config.arms, ranker=replace(config.ranker, model=model))
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

    shutil.rmtree(root, ignore_errors=True)
    seed = json.loads(GATES.read_text())["seed"]
    figures = run_demo(None, root, seed=seed, small=small)
    gates = check_gates(figures)
    table = Table("gate", "at least", "value", "pass", title="Quality gates")
    for gate in gates:
        table.add_row(gate["metric"], f"{gate['at_least']}", f"{gate['value']:.4f}", "yes" if gate["pass"] else "NO")
    Console().print(table)
    passed = all(gate["pass"] for gate in gates)
    typer.echo(json.dumps({"pass": passed, "gates": gates, "seconds": figures["seconds"]["total"]}))
    raise typer.Exit(0 if passed else 1)


# --- build and release ------------------------------------------------------------------------------

Releases = Annotated[Path, typer.Option("--releases", help="Folder of the releases.")]
RELEASES = Path("artifacts/releases")


class Action(StrEnum):
    run = "run"
    plan = "plan"


class Lane(StrEnum):
    cpu = "cpu"
    trtllm = "trtllm"
    llmapi = "llmapi"


class Precision(StrEnum):
    fp16 = "fp16"
    fp32 = "fp32"


@app.command()
def build(
    action: Annotated[
        Action, typer.Argument(help="plan: print steps and memory, on any machine; run: do it and publish.")
    ] = Action.run,
    lane: Annotated[
        Lane, typer.Option(help="cpu: exports alone; trtllm: a TensorRT-LLM engine; llmapi: its LLM API.")
    ] = Lane.cpu,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "--captioner", help="Folder of the captioner: any LLaVA checkpoint.")
    ] = "artifacts/captioner",
    ranker: Annotated[Path | None, typer.Option(help="Folder of the ranker.")] = None,
    releases: Releases = RELEASES,
    gpu: Annotated[str, typer.Option(help="NAME or COUNTxNAME (tensor parallel): h200, 2xa10, …")] = "h200",
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 16,
    images: Annotated[int, typer.Option(help="Images per request; a video gives as many frames.")] = 1,
    quant: Annotated[str, typer.Option(help="Of the decoder: fp16, bf16, int8, int4, awq, fp8.")] = "fp16",
    kv_dtype: Annotated[str, typer.Option(help="Of the KV cache: auto, fp8.")] = "auto",
    vision_batch: Annotated[int, typer.Option(help="Images that the vision tower takes at once.")] = 16,
    new_tokens: Annotated[
        int | None, typer.Option(help="Longest caption; by default the captioner's own.")
    ] = None,
    ensemble_batch: Annotated[int | None, typer.Option(help="Rows of one rank_media request.")] = None,
    calibration: Annotated[int, typer.Option(help="Samples, for awq and fp8.")] = 32,
    kv_reuse: Annotated[bool, typer.Option(help="Keep KV blocks of equal prompts and images.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run `trtllm-build --dry_run` first.")] = False,
    extra: Annotated[
        list[str] | None, typer.Option(help="--flag=value for trtllm-build, in place of the plan's own.")
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="TensorRT-LLM's examples in the container.")
    ] = None,
    precision: Annotated[
        Precision, typer.Option(help="Of the ONNX parts on a GPU node; fp16 is checked.")
    ] = Precision.fp16,
    score_int8: Annotated[
        bool, typer.Option("--score-int8", help="Quantise score.onnx; its loss of AUC is measured.")
    ] = False,
) -> None:
    """Turn a captioner and a ranker into a published release, or print the plan of it.

    `run` prints the release's id, `plan` a last line of JSON. A plan that cannot work is refused with the numbers.
    """
    from build import plan as planning
    from build.assemble import build_release, source_batch, work_folder
    from build.engine import EngineOptions
    from build.hardware import parse_gpus

    if action is Action.run:
        ranker = ranker or RANKER
    parts = (
        checkpoint, ranker, work_folder(releases),
        planning.ExportOptions(precision=precision.value, score_int8=score_int8),
    )  # fmt: skip
    if lane is Lane.cpu:
        plan = planning.cpu_plan(*parts)
    else:
        kind, gpus = parse_gpus(gpu)
        options = EngineOptions(
            gpu=kind, gpus=gpus, batch=batch, images=images, quant=quant, kv_dtype=kv_dtype,
            vision_batch=vision_batch, new_tokens=new_tokens, ensemble_batch=ensemble_batch, calibration=calibration,
            kv_reuse=kv_reuse, dry_run=dry_run, extra=tuple(extra or ()),
        )  # fmt: skip
        if lane is Lane.llmapi:
            plan = planning.llmapi_plan(*parts, options)
        else:
            plan = planning.engine_plan(*parts, options, source_batch=source_batch(), examples=examples)
    if action is Action.plan:
        from build.show import show_plan, summary

        show_plan(plan)
        typer.echo(json.dumps(summary(plan)))
    else:
        assert ranker is not None
        typer.echo(
            build_release(checkpoint, ranker, releases, plan=plan, progress=lambda line: typer.echo(line, err=True))
        )


@release.command("list")
def list_all(releases: Releases = RELEASES) -> None:
    """One line per release, oldest first; the current one has a star."""
    from sightline.release import current, list_releases

    manifests = list_releases(releases)
    now = current(releases).name if manifests else ""
    for manifest in manifests:
        parts = manifest.components
        typer.echo(
            f"{'*' if manifest.release == now else ' '} {manifest.release}  {manifest.created_at:%Y-%m-%d %H:%M:%S}"
            f"  captioner {parts.captioner}, tokens {parts.token_spec}, ranker {parts.ranker}"
        )


@release.command("verify")
def verify_one(
    name: Annotated[str, typer.Argument(help="Release id.")] = "current", releases: Releases = RELEASES
) -> None:
    """Compare every file of a release with its manifest."""
    from sightline.release import verify

    manifest = verify(releases / name)
    typer.echo(f"{manifest.release}: {len(manifest.files)} files as published")


@release.command("rollback")
def roll_back(releases: Releases = RELEASES) -> None:
    """Make the release published before the current one current again; prints its id."""
    from sightline.release import rollback

    typer.echo(rollback(releases))


# --- serve and rank -------------------------------------------------------------------------------


class Target(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


@app.command()
def serve(
    name: Annotated[str, typer.Option("--release", help="Release id.")] = "current",
    releases: Releases = RELEASES,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8501,
    http_port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8500,
    metrics_port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8502,
    target: Annotated[Target, typer.Option(help="gpu: in the container of deploy/.")] = Target.cpu,
    print_only: Annotated[
        bool, typer.Option("--print", help="Only show the docker command of --target gpu.")
    ] = False,
) -> None:
    """Serve a release through Triton until Ctrl-C."""
    if target is Target.gpu:
        from serving.container import serve_in_container

        command = serve_in_container(
            releases / name, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
            print_only=print_only,
        )  # fmt: skip
        typer.echo(command)
        return
    if print_only:
        raise ConfigError("--print: shows the docker command of --target gpu, got --target cpu; add --target gpu")
    from serving.serve import serve_until_stopped

    serve_until_stopped(
        releases / name, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port
    )


@app.command()
def doctor(
    target: Annotated[Target, typer.Option(help="Where the server is to run.")] = Target.cpu,
    releases: Releases = RELEASES,
    grpc_port: Annotated[int, typer.Option()] = 8501,
    http_port: Annotated[int, typer.Option()] = 8500,
    metrics_port: Annotated[int, typer.Option()] = 8502,
) -> None:
    """Check whether this machine can serve; the last line is JSON, exit code 1 says that something is in the way."""
    from dataclasses import asdict

    from rich.console import Console

    from serving.doctor import inspect, judge, table

    ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
    checks = judge(inspect(target.value, releases=releases, ports=ports), target.value)
    Console(stderr=True, highlight=False).print(table(checks))
    ok = all(check.status != "blocker" for check in checks)
    typer.echo(json.dumps({"target": target.value, "ok": ok, "checks": [asdict(check) for check in checks]}))
    raise typer.Exit(0 if ok else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def rank(context: typer.Context) -> None:
    """Rank images and videos for a user through a running server; `sightline rank --help` says more."""
    from sightline_client.cli import main as client

    client(context.args, "sightline rank")


@app.command()
def explain(
    user: Annotated[int, typer.Option(help="User id; an unknown one is scored as nobody in particular.")],
    item: Annotated[int, typer.Option(help="Item id, unknown ones likewise.")],
    caption: Annotated[str | None, typer.Option(help="The item's caption; by default that of --captions.")] = None,
    captions: Annotated[Path, typer.Option(help="What `sightline caption` wrote.")] = Path(
        "artifacts/captions.parquet"
    ),
    name: Annotated[str, typer.Option("--release", help="Release id.")] = "current",
    releases: Releases = RELEASES,
    context: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; 0 by default.")] = None,
    out: Annotated[Path, typer.Option(help="PNG file.")] = Path("artifacts/explain.png"),
) -> None:
    """Which words moved a score: each is taken away and the release's ranker asked again; the last line is JSON."""
    from dataclasses import asdict

    from rich.console import Console

    from evaluation import explain as explaining

    if caption is None:
        from trainer.captioning import read_captions

        found, _ = read_captions(captions)
        if item not in found:
            raise ConfigError(f"--item {item}: {captions} has no caption of it; give one with --caption TEXT")
        caption = found[item]
    explanation = explaining.explain(releases / name, user, item, caption, _numbers("--context", context))
    Console(stderr=True, highlight=False).print(explaining.table(explanation))
    explaining.plot(explanation, out)
    typer.echo(json.dumps({**asdict(explanation), "picture": str(out)}))


def _numbers(flag: str, values: list[str] | None) -> dict[str, int]:
    pairs = _pairs(flag, values)
    for name, value in pairs.items():
        if not value.lstrip("-").isdecimal():
            raise ConfigError(f"{flag}: expected NAME=VALUE with a whole number, got {name}={value}")
    return {name: int(value) for name, value in pairs.items()}


# --- benchmark --------------------------------------------------------------------------------------


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
    import json

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


# --- demo -------------------------------------------------------------------------------------------


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder in the MovieLens or in Sightline's layout; generated if not given."),
    ] = None,
    root: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("artifacts"),
    seed: Annotated[int, typer.Option()] = 0,
    small: Annotated[
        bool, typer.Option("--small", help="A few steps of everything, to see that it works.")
    ] = False,
) -> None:
    """Data, captioner, ranker, release, server, ranking: everything once; the last line is JSON."""
    from sightline.demo import run_demo

    typer.echo(json.dumps(run_demo(data, root, seed=seed, small=small)))


def main() -> None:
    """Entry point: errors that Sightline raises on purpose end in one line and exit code 1."""
    try:
        app()
    except SightlineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
