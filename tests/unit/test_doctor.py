"""Every check with facts that are right and facts that are not; the facts of this machine; the command's output."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serving import doctor
from serving.container import Gpu
from serving.doctor import GIB, MIB, Facts, Probe, inspect, judge, python_instances
from sightline import node, release
from sightline.cli import app

PORTS = {"http": 8500, "grpc": 8501, "metrics": 8502}
ENGINE = release.Engine(
    gpu="h100", gpus=1, capability="9.0", tensorrt_llm=node.TENSORRT_LLM, tensorrt=node.TENSORRT, quantization="fp16",
    dtype="float16", max_batch_size=8, max_input_len=2048, max_seq_len=2560, images=1,
)  # fmt: skip
H100 = Gpu(name="NVIDIA H100", capability="9.0", memory_bytes=80 * GIB, driver="590.44.01")
LAPTOP = Facts(
    python="3.11.9", requires_python=">=3.11,<3.12", system="Linux", machine="x86_64", glibc="2.36", numpy="1.26.4",
    server=Probe(value="tritonserver"), ports={name: (port, "") for name, port in PORTS.items()},
    shm_bytes=8 * GIB, shm_free=8 * GIB, leftovers=(), instances=9, media_bytes=64 * MIB, disk_free=50 * GIB,
    gpus=(), gpu_error="nvidia-smi: not found", docker=Probe(error="docker: not found"),
    toolkit=Probe(error="nvidia-ctk: not found"), tensorrt_llm="", tensorrt="",
    release=Probe(value="cpu-0123456789ab"), lane="cpu", engine=None, engine_bytes=0,
    perf_analyzer=Probe(value="2.51.0"),
)  # fmt: skip
NODE = replace(
    LAPTOP, gpus=(H100,), gpu_error="", docker=Probe(value="28.2.2"), toolkit=Probe(value="NVIDIA Container Toolkit"),
    release=Probe(value="trtllm-0123456789ab"), lane="trtllm", engine=ENGINE, engine_bytes=14 * GIB,
)  # fmt: skip
GOOD: dict[doctor.Target, Facts] = {"cpu": LAPTOP, "gpu": NODE}

# What is skipped where: the container brings it, or only a GPU node has it.
ON_GPU = {"glibc", "numpy", "server", "shared memory"}
ON_CPU = {"gpu", "driver", "engine", "gpu memory", "docker", "nvidia container toolkit", "tensorrt-llm"}


def statuses(facts: Facts, target: doctor.Target) -> dict[str, str]:
    return {check.name: check.status for check in judge(facts, target)}


@pytest.mark.parametrize(("target", "skipped"), [("cpu", ON_CPU), ("gpu", ON_GPU)])
def test_a_machine_with_everything_is_ok(target: doctor.Target, skipped: set[str]) -> None:
    found = statuses(GOOD[target], target)
    assert {name for name, status in found.items() if status == "skipped"} == skipped
    assert {status for name, status in found.items() if name not in skipped} == {"ok"}
    assert all(check.fix == "" for check in judge(GOOD[target], target))


def busy(name: str) -> dict[str, Any]:
    return {"ports": {other: (port, "in use" if other == name else "") for other, port in PORTS.items()}}


def gpu(**changes: Any) -> dict[str, Any]:
    return {"gpus": (H100, replace(H100, **changes))}


ANY, CPU, GPU = ("cpu", "gpu"), ("cpu",), ("gpu",)


@pytest.mark.parametrize(
    ("check", "status", "targets", "changes", "fix"),
    [
        ("python", "blocker", ANY, {"python": "3.10.14"}, "make setup PYTHON="),
        ("python", "blocker", CPU, {"python": "3.14.0", "requires_python": ">=3.11"}, "make setup PYTHON="),
        ("machine", "blocker", ANY, {"system": "Darwin"}, "such a machine"),
        ("machine", "blocker", ANY, {"machine": "riscv64"}, "such a machine"),
        ("glibc", "blocker", CPU, {"glibc": "2.31"}, "Debian 12"),
        ("glibc", "blocker", CPU, {"glibc": ""}, "Debian 12"),
        ("numpy", "blocker", CPU, {"numpy": "2.0.0"}, "make setup"),
        ("numpy", "blocker", CPU, {"numpy": ""}, "make setup"),
        ("server", "blocker", CPU, {"server": Probe(error="not found")}, "make setup"),
        ("port http", "blocker", ANY, busy("http"), "--http-port"),
        ("port grpc", "blocker", ANY, busy("grpc"), "8501"),
        ("port metrics", "blocker", ANY, busy("metrics"), "--metrics-port"),
        # Docker's default holds the instances but not one large item beside them.
        ("shared memory", "warning", CPU, {"shm_bytes": 64 * MIB, "shm_free": 64 * MIB}, "--shm-size"),
        ("shared memory", "blocker", CPU, {"shm_free": 17 * MIB}, "--shm-size"),
        ("leftovers", "warning", ANY, {"leftovers": ("sightline_7_a", "sightline_7_b")},
         "rm /dev/shm/sightline_7_a /dev/shm/sightline_7_b"),
        ("disk", "warning", CPU, {"disk_free": GIB - 1}, "--releases"),
        ("disk", "warning", GPU, {"disk_free": 40 * GIB}, "--releases"),
        ("gpu", "blocker", GPU, {"gpus": (), "gpu_error": "nvidia-smi: not found"}, "Ampere"),
        ("gpu", "warning", GPU, {"engine": None} | gpu(capability="7.5"), "Ampere"),
        ("gpu", "blocker", GPU, {"engine": None} | gpu(capability="7.0"), "Ampere"),
        ("engine", "blocker", GPU, {"gpus": (replace(H100, capability="8.9"),)}, "make build-engines LANE=trtllm"),
        ("engine", "blocker", GPU, {"engine": ENGINE.model_copy(update={"gpus": 2})}, "make build-engines"),
        ("engine", "blocker", GPU, {"engine": ENGINE.model_copy(update={"tensorrt": "10.9"})}, "make build-engines"),
        ("driver", "warning", GPU, gpu(driver="580.95.05"), "590.44.01 or later"),
        ("driver", "blocker", GPU, gpu(driver="470.57.02"), "590.44.01 or later"),
        ("gpu memory", "blocker", GPU, {"engine_bytes": 81 * GIB}, "larger GPU"),
        ("docker", "blocker", GPU, {"docker": Probe(error="docker: not found")}, "install Docker"),
        ("nvidia container toolkit", "blocker", GPU, {"toolkit": Probe(error="not found")}, "nvidia-ctk runtime"),
        ("tensorrt-llm", "blocker", GPU, {"tensorrt_llm": "1.3.0"}, "26.07-trtllm-python-py3"),
        ("tensorrt-llm", "warning", CPU, {"tensorrt_llm": "1.3.0"}, "26.07-trtllm-python-py3"),
        ("release", "blocker", CPU, {"release": Probe(error="damaged")}, "make demo, or: sightline release rollback"),
        ("release", "warning", CPU, {"release": Probe()}, "make demo"),
        ("release", "warning", GPU, {"release": Probe()}, "make build-engines LANE=trtllm"),
        ("lane", "blocker", GPU, {"lane": "cpu"}, "make build-engines LANE=trtllm"),
        ("lane", "blocker", CPU, {"lane": "llmapi"}, "make demo, or go back"),
        ("perf_analyzer", "warning", ANY, {"perf_analyzer": Probe(error="does not run")}, "make setup"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_fix(
    check: str, status: str, targets: tuple[doctor.Target, ...], changes: dict[str, Any], fix: str
) -> None:
    for target in targets:
        (found,) = (one for one in judge(replace(GOOD[target], **changes), target) if one.name == check)
        assert found.status == status
        assert fix in found.fix
        assert found.expected
        others = {name: one for name, one in statuses(replace(GOOD[target], **changes), target).items()
                  if one not in ("ok", "skipped") and name != check}  # fmt: skip
        assert others == {}, "one fault, one finding"


def test_what_the_other_target_needs_does_not_matter() -> None:
    without = {"glibc": "", "numpy": "2.4.0", "server": Probe(error="not found"), "shm_free": 0}
    assert "blocker" not in statuses(replace(NODE, **without), "gpu").values()


def test_every_check_can_fail() -> None:
    """The table above leaves none out: each name of a report occurs in it."""
    (table,) = (mark for mark in test_what_is_wrong_is_named_with_its_fix.pytestmark if mark.name == "parametrize")
    assert {case[0] for case in table.args[1]} == set(statuses(LAPTOP, "cpu"))


def test_the_pinned_pair_is_accepted_inside_its_container() -> None:
    inside = replace(NODE, python="3.12.3", requires_python=">=3.11", tensorrt_llm="1.2.1", tensorrt="10.14.1.48")
    assert statuses(inside, "gpu")["tensorrt-llm"] == "ok"
    assert statuses(replace(inside, tensorrt="10.13.3.9"), "gpu")["tensorrt-llm"] == "blocker"
    assert statuses(replace(inside, python="3.10.12"), "gpu")["tensorrt-llm"] == "blocker"


# --- facts ------------------------------------------------------------------------------------------------


def test_this_machine(releases_dir: Path) -> None:
    """It runs the tests, so it can serve; ports that are taken are seen."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        facts = inspect("cpu", releases=releases_dir, ports={"http": taken, "grpc": 0})
    found = statuses(facts, "cpu")
    assert [name for name, status in found.items() if status == "blocker"] == ["port http"]
    assert facts.release.value == release.current(releases_dir).name
    assert facts.media_bytes == release.read_manifest(release.current(releases_dir)).limits.media_bytes
    assert facts.python == ".".join(map(str, sys.version_info[:3]))


def test_a_damaged_release_is_a_fact(releases_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "releases"
    shutil.copytree(releases_dir, folder, symlinks=True)
    with (folder / "current" / "model_repository" / "embed" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    facts = inspect("cpu", releases=folder, ports={})
    assert "embed/1/model.onnx: changed" in facts.release.error
    assert statuses(facts, "cpu")["release"] == "blocker"


def test_no_release_yet(tmp_path: Path) -> None:
    facts = inspect("gpu", releases=tmp_path / "not" / "there", ports={})
    assert (facts.release, facts.lane, facts.engine) == (Probe(), "", None)
    assert facts.instances > 0, "taken from the models of the repository"


def test_only_stubs_count_as_python_instances(tmp_path: Path) -> None:
    """Two of caption and one each of lookup and tokenize; on the CPU the four that the stand-ins serve, too."""
    for model, config in {
        "caption": 'backend: "python" instance_group [ { count: 2 } ]',
        "lookup": 'backend: "python" instance_group [ { } ]',
        "tokenize": 'backend: "python"',
        "embed": 'backend: "onnxruntime" instance_group [ { count: 1 }, { count: 3 } ]',
        "tensorrt_llm": 'backend: "tensorrtllm" instance_group [ { count: 1 } ]',
        "rank_media": 'platform: "ensemble"',
    }.items():
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.pbtxt").write_text(config)
    assert python_instances(tmp_path, "gpu") == 2 + 1 + 2
    assert python_instances(tmp_path, "cpu") == 2 + 1 + 2 + 4 + 1
    (tmp_path / "caption" / "configs").mkdir()
    (tmp_path / "caption" / "configs" / "gpu.pbtxt").write_text('backend: "python" instance_group [ { count: 8 } ]')
    assert python_instances(tmp_path, "gpu") == 8 + 1 + 2


def test_leftovers_are_those_of_processes_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"sightline_{pid}_0a1b_{region}" for pid in (ended.pid, os.getpid()) for region in (1, 2)]
    for name in (*names, "sem.other", "sightline_x"):
        (tmp_path / name).touch()
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    facts = inspect("cpu", releases=tmp_path, ports={})
    assert facts.leftovers == tuple(sorted(names[:2]))


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 28.2.2", Probe(value="28.2.2")),
        ("echo one >&2; echo Cannot connect >&2; exit 1", Probe(error="docker: Cannot connect")),
        ("true", Probe(error="docker: no output")),
    ],
)
def test_a_command_that_fails_is_a_fact(
    script: str, found: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "docker"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert inspect("gpu", releases=tmp_path, ports={}).docker == found


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, 0), ({"release": Probe()}, 0), ({"release": Probe(error="x [red] damaged")}, 1), ({"system": "Darwin"}, 1)],
)
def test_the_command_ends_with_json_and_1_on_a_blocker(
    target: doctor.Target, changes: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = replace(GOOD[target], **changes)
    monkeypatch.setattr(doctor, "inspect", lambda *_, **__: facts)
    result = CliRunner().invoke(app, ["doctor", "--target", target], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert (document["target"], document["ok"]) == (target, code == 0)
    for check in document["checks"]:
        assert check.keys() == {"name", "status", "found", "expected", "fix"}
        assert check["name"] in result.stderr
        assert bool(check["fix"]) == (check["status"] in ("warning", "blocker"))
    if changes.get("release", Probe()).error:
        assert "[red] damaged" in result.stderr, "what was found is text, not markup"


def test_the_command_looks_at_the_ports_that_it_is_given(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "sightline.cli", "doctor", f"--releases={tmp_path}", f"--grpc-port={port}",
             "--http-port=0", "--metrics-port=0"], capture_output=True, text=True, check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    assert result.returncode == 1
    checks = {check["name"]: check for check in json.loads(result.stdout.splitlines()[-1])["checks"]}
    assert checks["port grpc"]["status"] == "blocker"
    assert str(port) in checks["port grpc"]["found"]
    assert checks["release"]["fix"] == "make demo"
