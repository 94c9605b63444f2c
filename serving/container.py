"""`sightline serve --target gpu`: the `docker run` command that serves a release on a GPU node.

The image (deploy/Containerfile) holds NVIDIA's server with the C++ backends; the release is mounted read-only.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from serving.runtime import choose_port
from sightline import __version__
from sightline.errors import ReleaseError, ServingError
from sightline.location import PASSWORD, absolute, is_address
from sightline.node import CACHE, MOUNT, STATE
from sightline.release import Manifest, verify

IMAGE = f"sightline:{__version__}"
BUILD = f"docker build --tag {IMAGE} --file deploy/Containerfile ."
# That the server in the container listens on.
HTTP_PORT, GRPC_PORT, METRICS_PORT = 8500, 8501, 8502
SHM_GIB = 2


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as nvidia-smi describes it; `capability` is its compute capability, e.g. `9.0`."""

    name: str
    capability: str
    memory_bytes: int
    driver: str


def list_gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine. Raises ServingError where nvidia-smi is absent or fails, with its own words."""
    query = ["--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    return parse_gpus(output_of("nvidia-smi", *query))


def parse_gpus(output: str) -> tuple[Gpu, ...]:
    """nvidia-smi's CSV without header and units: name, compute capability, memory in MiB, driver."""
    rows = ([cell.strip() for cell in line.split(",")] for line in output.splitlines() if line.strip())
    return tuple(
        Gpu(name=name, capability=capability, memory_bytes=int(memory) * 2**20, driver=driver)
        for name, capability, memory, driver in rows
    )


def output_of(*command: str) -> str:
    """What a command prints. Raises ServingError where it is absent, fails, hangs or prints nothing."""
    if shutil.which(command[0]) is None:
        raise ServingError(f"{command[0]}: not found")
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired as error:
        raise ServingError(f"{command[0]}: no answer within 20 s") from error
    if result.returncode != 0 or not result.stdout.strip():
        said = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise ServingError(f"{command[0]}: {said[-1]}")
    return result.stdout.strip()


def gpu_release(release_dir: Path) -> Manifest:
    """Manifest of a release that the image can serve.

    Raises:
        ReleaseError: the release is damaged, or of lane `cpu`: the C++ backends cannot run what that one holds.
    """
    manifest = verify(release_dir)
    if manifest.lane == "cpu":
        raise ReleaseError(
            f"release {manifest.release} is of lane cpu, whose decoder only the CPU stand-in runs; target gpu needs "
            "one of lane trtllm or llmapi: `make build-engines LANE=trtllm` on a GPU node builds it"
        )
    return manifest


def run_command(
    release_dir: Path, release: str, *, host: str, grpc_port: int, http_port: int, metrics_port: int, store: str,
    queue: str | None, gallery: str | None = None,
) -> list[str]:  # fmt: skip
    """The `docker run` argv that serves `release_dir`, which has the id `release`; ports are those of this machine."""
    ports = [(http_port, HTTP_PORT), (grpc_port, GRPC_PORT), (metrics_port, METRICS_PORT)]
    source = str(release_dir.resolve())  # `current` may move on while the container runs
    return [
        "docker", "run", "--rm", "--init", f"--name=sightline-{grpc_port}",
        "--gpus=all",
        # Python models talk to the server through /dev/shm, of which Docker gives 64 MB. The container has its own:
        # what a killed server leaves there goes with it.
        "--ipc=private", f"--shm-size={SHM_GIB}g",
        # What NVIDIA asks for: pinned memory without a limit, a stack for deep call chains.
        "--ulimit=memlock=-1", "--ulimit=stack=67108864",
        "--security-opt=no-new-privileges",
        *(f"--publish={host}:{outside}:{inside}" for outside, inside in ports),
        f"--mount=type=bind,source={source},target={MOUNT},readonly",
        # One for each release: see `claim_cache` in serving/container_entry.py.
        f"--mount=type=volume,source=sightline-cache-{release},target={CACHE}",
        *_state("SIGHTLINE_STORE", store, f"{STATE}/features"),
        *(_state("SIGHTLINE_QUEUE", queue, f"{STATE}/nearline") if queue else ()),
        *(_state("SIGHTLINE_GALLERY", gallery, f"{STATE}/gallery") if gallery else ()),
        # A server's password is passed on by its name, so that no list of processes shows it.
        *(f"--env={name}" for name in (PASSWORD,) if os.environ.get(name)),
        # Longer than the 30 s that Triton gives requests in flight.
        "--stop-timeout=40",
        IMAGE,
    ]  # fmt: skip


def _state(variable: str, location: str, inside: str) -> list[str]:
    """Options that give a python model a store, queue or gallery: a folder of this machine is mounted."""
    if is_address(location):
        return [f"--env={variable}={location}"]
    return [f"--mount=type=bind,source={absolute(location)},target={inside}", f"--env={variable}={inside}"]


def serve_in_container(
    release_dir: Path, *, host: str, grpc_port: int, http_port: int, metrics_port: int, store: str,
    queue: str | None, gallery: str | None = None, print_only: bool,
) -> str:  # fmt: skip
    """Become the container (Ctrl-C reaches it), or with `print_only` return its command, quoted for a shell.

    Raises:
        ReleaseError: see `gpu_release`.
        ServingError: a port is busy, or docker or the image is missing.
    """
    manifest = gpu_release(release_dir)
    if not print_only:
        grpc_port = choose_port("--grpc-port", host, grpc_port)
        http_port = choose_port("--http-port", host, http_port)
        metrics_port = choose_port("--metrics-port", host, metrics_port)
    command = run_command(
        release_dir, manifest.release,
        host=host, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, store=store, queue=queue,
        gallery=gallery,
    )  # fmt: skip
    if print_only:
        return shlex.join(command)
    _require_image()
    for location in (store, queue, gallery):
        if location and not is_address(location):
            Path(location).mkdir(parents=True, exist_ok=True)
    os.execvp(command[0], command)


def _require_image() -> None:
    if shutil.which("docker") is None:
        raise ServingError(
            "docker: not found; target gpu needs Docker and the NVIDIA Container Toolkit on this machine, install "
            "both (deploy/README.md), or let `sightline serve --target gpu --print` show the command for another one"
        )
    try:
        output_of("docker", "image", "inspect", IMAGE)
    except ServingError as error:
        raise ServingError(f"image {IMAGE}: not usable here ({error}); build it with `{BUILD}`") from error
