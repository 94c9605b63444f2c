"""A running server: start it, check the machine for it, ask it."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from sightline.commands.options import QUEUE, RELEASES, STORE, GalleryOption, Name, Port, Queue, Releases, Store
from sightline.errors import ConfigError

app = typer.Typer()


class Target(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


@app.command()
def serve(
    name: Name = "current",
    releases: Releases = RELEASES,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: Port = 8501,
    http_port: Port = 8500,
    metrics_port: Port = 8502,
    target: Annotated[Target, typer.Option(help="gpu: in the container of deploy/.")] = Target.cpu,
    store: Store = STORE,
    queue: Queue = QUEUE,
    gallery: GalleryOption = None,
    supervise: Annotated[bool, typer.Option(help="Bring back models and the server when their processes die.")] = True,
    print_only: Annotated[
        bool, typer.Option("--print", help="Only show the docker command of --target gpu.")
    ] = False,
) -> None:
    """Serve a release through Triton until Ctrl-C."""
    chosen = [port for port in (grpc_port, http_port, metrics_port) if port]
    if len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"--grpc-port {grpc_port}, --http-port {http_port}, --metrics-port {metrics_port}: expected three "
            "different ones, or 0 for any that is free"
        )
    if target is Target.gpu:
        from serving.container import serve_in_container

        command = serve_in_container(
            releases / name, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
            store=store, queue=queue, gallery=gallery, print_only=print_only,
        )  # fmt: skip
        typer.echo(command)
        return
    if print_only:
        raise ConfigError("--print: shows the docker command of --target gpu, got --target cpu; add --target gpu")
    from serving.serve import serve_until_stopped

    serve_until_stopped(
        releases / name, host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, store=store,
        queue=queue, gallery=gallery, supervise=supervise,
    )  # fmt: skip


@app.command()
def doctor(
    target: Annotated[Target, typer.Option(help="Where the server is to run.")] = Target.cpu,
    releases: Releases = RELEASES,
    grpc_port: Port = 8501,
    http_port: Port = 8500,
    metrics_port: Port = 8502,
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
