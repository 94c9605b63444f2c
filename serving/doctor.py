"""`sightline doctor`: can this machine serve, on its CPU or on its GPUs, and what has to be mended first?

`inspect` gathers facts and judges nothing; `judge` turns facts into checks and looks at nothing else.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.table import Column, Table
from rich.text import Text

from build.render import read_config
from serving.container import Gpu, list_gpus, output_of
from serving.runtime import STAND_INS, Runtime, choose_port
from sightline import node
from sightline.errors import ReleaseError, ServingError
from sightline.release import Engine, Manifest, current, verify

Target = Literal["cpu", "gpu"]
Status = Literal["ok", "warning", "blocker", "skipped"]

MIB, GIB = 2**20, 2**30
SHARED_MEMORY = Path("/dev/shm")
MODELS = Path(__file__).parents[1] / "model_repository"

# nvidia-pytriton 0.7.0: CPython versions that it has a python stub for, the C library that it is built for.
STUBS = SpecifierSet(">=3.8,<3.14")
GLIBC = Version("2.35")
MACHINES = ("x86_64", "aarch64")
# A python instance takes 1 MB of shared memory and grows by 1 MB at a time: one step beyond the start for each.
INSTANCE_BYTES = 2 * MIB
# Ampere, the oldest that TensorRT-LLM is tested on; Turing, the oldest that the image supports.
CAPABILITY, OLDEST_CAPABILITY = Version("8.0"), Version("7.5")
# The image is built for the first; forward compatibility, which only data-centre GPUs have, reaches to the second.
DRIVER, OLDEST_DRIVER = "590.44.01", "535"
# A build on the CPU writes well under 1 GB. One for a 7 billion parameter model in 16 bits holds its checkpoint
# three times: as it came, converted, as an engine.
DISK_BYTES = {"cpu": 1 * GIB, "gpu": 45 * GIB}


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Something that was looked for: what it is, or (with `value` empty) why it cannot be used."""

    value: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `inspect` found. Versions are as text, "" where the thing is absent."""

    python: str
    requires_python: str
    """Specifier of this package, like `>=3.11,<3.12`."""
    system: str
    machine: str
    glibc: str
    numpy: str
    server: Probe
    ports: dict[str, tuple[int, str]]
    """Name → number and why nothing can listen there; "" when it is free."""
    shm_bytes: int
    shm_free: int
    leftovers: tuple[str, ...]
    """Names in /dev/shm of servers that are gone."""
    instances: int
    """Python instances that the release starts on the target."""
    media_bytes: int
    """The largest item that the release takes."""
    disk_free: int
    gpus: tuple[Gpu, ...]
    gpu_error: str
    docker: Probe
    toolkit: Probe
    tensorrt_llm: str
    tensorrt: str
    release: Probe
    """Id of the current one; both fields empty where nothing is published."""
    lane: str
    engine: Engine | None
    """What the release's compiled decoder was built for."""
    engine_bytes: int
    """Size of what the language model's backend loads; 0 on the CPU."""
    perf_analyzer: Probe


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    found: str
    expected: str
    fix: str = ""


# --- facts ------------------------------------------------------------------------------------------


def inspect(target: Target, *, releases: Path, host: str = "127.0.0.1", ports: dict[str, int]) -> Facts:
    """Look at this machine; changes nothing, and what is absent or broken is a fact, not an error.

    `ports`: name → number, of this machine.
    """
    release, manifest, repository = _release(releases)
    lane = manifest.lane if manifest else ""
    gpus, gpu_error = _gpus()
    shm = shutil.disk_usage(SHARED_MEMORY)
    return Facts(
        python=platform.python_version(), requires_python=metadata.metadata("sightline")["Requires-Python"] or "",
        system=platform.system(), machine=platform.machine(), glibc=_glibc(), numpy=_version("numpy"),
        server=_server(), ports={name: (port, _port_error(host, port)) for name, port in ports.items()},
        shm_bytes=shm.total, shm_free=shm.free, leftovers=_leftovers(),
        instances=python_instances(repository, target), media_bytes=manifest.limits.media_bytes if manifest else 0,
        disk_free=shutil.disk_usage(_existing(releases)).free,
        gpus=gpus, gpu_error=gpu_error,
        docker=_command("docker", "version", "--format", "{{.Server.Version}}"),
        toolkit=_command("nvidia-ctk", "--version"),
        tensorrt_llm=_version("tensorrt_llm"), tensorrt=_version("tensorrt"),
        release=release, lane=lane, engine=manifest.engine if manifest else None,
        engine_bytes=_size(repository / "tensorrt_llm") if lane not in ("", "cpu") else 0,
        perf_analyzer=_perf_analyzer(),
    )  # fmt: skip


def python_instances(repository: Path, target: Target) -> int:
    """How many python stubs a server of this model repository starts; on the CPU the stand-ins are stubs, too."""
    stubs = {"python"} | ({path.name for path in STAND_INS.iterdir()} if target == "cpu" else set())
    count = 0
    for model in repository.iterdir():
        special = model / "configs" / "gpu.pbtxt"
        config = read_config(special if target == "gpu" and special.exists() else model / "config.pbtxt")
        if config.backend in stubs:
            # Without a group, Triton starts two on a CPU.
            count += sum(max(group.count, 1) for group in config.instance_group) or 2
    return count


def _release(releases: Path) -> tuple[Probe, Manifest | None, Path]:
    """The current release, its manifest, its models (the source's where there is none)."""
    if not (releases / "current").exists():
        return Probe(), None, MODELS
    try:
        folder = current(releases)
        manifest = verify(folder)
    except ReleaseError as error:
        return Probe(error=str(error)), None, MODELS
    return Probe(value=manifest.release), manifest, folder / "model_repository"


def _server() -> Probe:
    try:
        runtime = Runtime.find()
    except ServingError as error:
        return Probe(error=str(error))
    # It has no option that only says its version, and ends with code 1 after its help.
    result = subprocess.run(
        [str(runtime.binary), "--help"], env=runtime.environment(), capture_output=True, text=True, check=False
    )
    output = (result.stdout + result.stderr).strip()
    if "--model-repository" not in output:
        return Probe(error=f"{runtime.binary} does not run: {(output.splitlines() or ['no output'])[-1]}")
    return Probe(value=f"tritonserver of nvidia-pytriton {_version('nvidia-pytriton')}")


def _port_error(host: str, port: int) -> str:
    try:
        choose_port("port", host, port)
    except ServingError as error:
        return str(error)
    return ""


def _leftovers() -> tuple[str, ...]:
    """Shared memory named for a process (sightline_<pid>_…) that no longer runs."""
    owners = {path.name: re.match(r"sightline_(\d+)_", path.name) for path in SHARED_MEMORY.iterdir()}
    return tuple(
        sorted(name for name, owner in owners.items() if owner and not Path(f"/proc/{owner[1]}").exists())
    )


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    try:
        return list_gpus(), ""
    except ServingError as error:
        return (), str(error)


def _perf_analyzer() -> Probe:
    from benchmarks import perf_analyzer  # only this check needs that package

    try:
        return Probe(value=perf_analyzer.version())
    except ServingError as error:
        return Probe(error=str(error))


def _command(*command: str) -> Probe:
    try:
        return Probe(value=output_of(*command))
    except ServingError as error:
        return Probe(error=str(error))


def _existing(path: Path) -> Path:
    """The path, or the closest folder above it that exists."""
    path = path.resolve()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _glibc() -> str:
    name, version = platform.libc_ver()
    return version if name == "glibc" else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- judgement ----------------------------------------------------------------------------------------


def judge(facts: Facts, target: Target) -> list[Check]:
    """One check per thing that serving on `target` depends on, in the order in which to mend them.

    What the other target alone needs is `skipped`: on `gpu` the container brings Python, server and shared memory.
    """
    return [*_machine(facts, target), *_gpu_node(facts, target), *_release_checks(facts, target)]


def _machine(facts: Facts, target: Target) -> list[Check]:
    cpu = target == "cpu"
    python = Version(facts.python)
    spare = facts.instances * INSTANCE_BYTES
    roomy = spare + facts.media_bytes
    smallest = min(facts.shm_bytes, facts.shm_free)
    return [
        _check(
            "python", facts.python, f"{facts.requires_python}, of nvidia-pytriton's {STUBS}",
            python in SpecifierSet(facts.requires_python) and (python in STUBS or not cpu),
            fix="make setup PYTHON=/path/to/python3.11",
        ),
        _check(
            "machine", f"{facts.system} {facts.machine}", f"Linux on {' or '.join(MACHINES)}",
            facts.system == "Linux" and facts.machine in MACHINES, fix="use such a machine",
        ),
        _check(
            "glibc", facts.glibc or "another C library", f">= {GLIBC}",
            bool(facts.glibc) and Version(facts.glibc) >= GLIBC,
            fix="use Ubuntu 22.04, Debian 12 or newer, or a container of one", applies=cpu,
        ),
        _check(
            # With numpy 2 the server counts success while its clients get outputs of a wrong size.
            "numpy", facts.numpy or "not installed", "< 2, for this server's python stub",
            bool(facts.numpy) and Version(facts.numpy) < Version("2"),
            fix="make setup", applies=cpu,
        ),
        _check(
            "server", facts.server.value or facts.server.error, "tritonserver, runnable",
            bool(facts.server.value), fix="make setup", applies=cpu,
        ),
        *(
            _check(f"port {name}", error or str(number), "free", not error,
                   fix=f"stop what listens on {number}, or choose another: --{name}-port")
            for name, (number, error) in facts.ports.items()
        ),
        _check(
            "shared memory", f"{_size_text(facts.shm_bytes)}, {_size_text(facts.shm_free)} free",
            f">= {_size_text(roomy)}: {facts.instances} python instances and one item of the largest size",
            smallest >= roomy, bad="warning" if smallest >= spare else "blocker",
            fix="give /dev/shm more: mount -o remount,size=1g /dev/shm; in a container --shm-size=1g (Docker: 64 MB)",
            applies=cpu,
        ),
        _check(
            "leftovers", ", ".join(facts.leftovers) or "none", "no shared memory of servers that are gone",
            not facts.leftovers, bad="warning",
            fix="rm " + " ".join(f"{SHARED_MEMORY}/{name}" for name in facts.leftovers),
        ),
        _check(
            "disk", f"{_size_text(facts.disk_free)} free", f">= {_size_text(DISK_BYTES[target])} for a build",
            facts.disk_free >= DISK_BYTES[target], bad="warning",
            fix="free some, or put the releases elsewhere: --releases",
        ),
    ]  # fmt: skip


def _gpu_node(facts: Facts, target: Target) -> list[Check]:
    gpu, seen = target == "gpu", bool(facts.gpus)
    least = min((Version(one.capability) for one in facts.gpus), default=CAPABILITY)
    driver = min((one.driver for one in facts.gpus), key=Version, default="")
    memory = max((one.memory_bytes for one in facts.gpus), default=0)
    pair = f"TensorRT-LLM {node.TENSORRT_LLM}, TensorRT {node.TENSORRT}, Python {node.PYTHON}"
    installed = f"TensorRT-LLM {facts.tensorrt_llm}, TensorRT {facts.tensorrt or 'none'}, Python {facts.python}"
    return [
        _check(
            "gpu",
            ", ".join(f"{one.name} ({one.capability}, {_size_text(one.memory_bytes)})" for one in facts.gpus)
            or facts.gpu_error or "none",
            f"compute capability >= {CAPABILITY}", not gpu or (seen and least >= CAPABILITY),
            bad="warning" if seen and least >= OLDEST_CAPABILITY else "blocker",
            fix="use a GPU of the Ampere generation or later with its driver (nvidia-smi shows it)",
            applies=gpu or seen,
        ),
        _check(
            "driver", driver, f">= {DRIVER}", seen and Version(driver) >= Version(DRIVER),
            bad="warning" if seen and Version(driver) >= Version(OLDEST_DRIVER) else "blocker",
            fix=f"install driver {DRIVER} or later; older ones down to {OLDEST_DRIVER} can do on data-centre GPUs",
            applies=gpu and seen,
        ),
        _check(
            "engine", _engine_error(facts) or (f"built for {facts.engine.gpu}" if facts.engine else ""),
            "built for these GPUs, with the image's TensorRT-LLM", not _engine_error(facts),
            fix="make build-engines LANE=trtllm", applies=gpu and seen and facts.engine is not None,
        ),
        _check(
            "gpu memory", _size_text(memory) if seen else "",
            f">= {_size_text(facts.engine_bytes)} for the language model alone",
            memory >= facts.engine_bytes, fix="use a larger GPU, or build with a smaller data type",
            applies=gpu and seen and facts.engine_bytes > 0,
        ),
        _check(
            "docker", facts.docker.value or facts.docker.error, "a running Docker",
            bool(facts.docker.value), fix="install Docker and start it: https://docs.docker.com/engine/install",
            applies=gpu,
        ),
        _check(
            "nvidia container toolkit", (facts.toolkit.value or facts.toolkit.error).split("\n")[0], "installed",
            bool(facts.toolkit.value),
            fix="install nvidia-container-toolkit, then: nvidia-ctk runtime configure --runtime=docker", applies=gpu,
        ),
        _check(
            "tensorrt-llm", installed if facts.tensorrt_llm else "not here; the image brings it",
            f"{pair}, as in {node.BASE_IMAGE}",
            not facts.tensorrt_llm or (
                facts.tensorrt_llm == node.TENSORRT_LLM
                and f"{facts.tensorrt}.".startswith(f"{node.TENSORRT}.")
                and facts.python.startswith(f"{node.PYTHON}.")
            ),
            fix=f"build engines inside {node.BASE_IMAGE}: they load only with the version that built them",
            applies=gpu or bool(facts.tensorrt_llm), bad="blocker" if gpu else "warning",
        ),
    ]  # fmt: skip


def _engine_error(facts: Facts) -> str:
    if facts.engine is None:
        return ""
    capabilities = [gpu.capability for gpu in facts.gpus]
    try:
        node.require_node(
            facts.engine, capabilities=capabilities, tensorrt_llm=node.TENSORRT_LLM, tensorrt=node.TENSORRT
        )
    except ReleaseError as error:
        return str(error)
    return ""


# A release with an engine has the decoder of the CPU stand-in, too; the LLM API has no stand-in.
LANES: dict[Target, tuple[str, ...]] = {"cpu": ("cpu", "trtllm"), "gpu": ("trtllm", "llmapi")}


def _release_checks(facts: Facts, target: Target) -> list[Check]:
    build = "make demo" if target == "cpu" else "make build-engines LANE=trtllm"
    published = bool(facts.release.value or facts.release.error)
    return [
        _check(
            "release", facts.release.value or facts.release.error or "none yet", "published and undamaged",
            bool(facts.release.value), bad="blocker" if published else "warning",
            fix=f"{build}{', or: sightline release rollback' if published else ''}",
        ),
        _check(
            "lane", facts.lane, " or ".join(LANES[target]), facts.lane in LANES[target],
            fix=f"{build}, or go back to a release for this target: sightline release rollback",
            applies=bool(facts.release.value),
        ),
        _check(
            "perf_analyzer", facts.perf_analyzer.value or facts.perf_analyzer.error, "runs; only `make bench` needs it",
            bool(facts.perf_analyzer.value), bad="warning", fix="make setup",
        ),
    ]  # fmt: skip


def _check(
    name: str, found: str, expected: str, good: bool, *, fix: str, bad: Status = "blocker", applies: bool = True
) -> Check:
    status: Status = "skipped" if not applies else "ok" if good else bad
    needed = status in ("warning", "blocker")
    return Check(name=name, status=status, found=found, expected=expected, fix=fix if needed else "")


def _size_text(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


# --- report -------------------------------------------------------------------------------------------


def table(checks: list[Check]) -> Table:
    """The checks for people; what was found is left out where it does not matter for the target."""
    colours = {"ok": "green", "warning": "yellow", "blocker": "red", "skipped": "dim"}
    narrow = [Column(name, no_wrap=True) for name in ("check", "status")]
    result = Table(*narrow, *(Column(name, overflow="fold") for name in ("found", "fix")))
    for check in checks:
        found = {"ok": check.found, "skipped": ""}.get(check.status, f"{check.found} (expected {check.expected})")
        result.add_row(check.name, Text(check.status, colours[check.status]), Text(found), Text(check.fix))
    return result
