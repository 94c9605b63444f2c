"""Releases: plan, build, list, verify, roll back."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sightline.commands.options import RANKER, RELEASES, Releases

app = typer.Typer()
release = typer.Typer(no_args_is_help=True, help="List, verify and roll back releases.")
app.add_typer(release, name="release")


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
