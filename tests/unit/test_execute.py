"""Engine builds with programs in place of TensorRT-LLM's: they take the recorded options and write what those write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from build import execute as executing
from build.assemble import build_release
from build.engine import EngineOptions
from build.execute import container_command, execute, is_done
from build.hardware import parse_gpus
from build.plan import ExportOptions, Plan, engine_plan
from build.render import read_config
from sightline import release
from sightline.errors import ReleaseError
from sightline.node import BASE_IMAGE, MOUNT
from sightline.prompt import CaptionPrompt
from tests.fake_trtllm import install, program, set_gpus, set_version


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The programs of a node with two A10 are on PATH; returns the file that lists their calls."""
    return install(tmp_path, monkeypatch, "2xa10")


def make_plan(parts: Path, tmp_path: Path, gpu: str = "2xa10", **change: Any) -> Plan:
    kind, gpus = parse_gpus(gpu)
    options = EngineOptions(gpu=kind, gpus=gpus, **({"batch": 8, "images": 4} | change))
    return engine_plan(
        parts / "captioner", parts / "ranker", tmp_path / "build", ExportOptions(), options,
        examples=str(tmp_path / "examples"),
    )  # fmt: skip


def build(parts: Path, tmp_path: Path, plan: Plan) -> tuple[Path, list[str]]:
    lines: list[str] = []
    name = build_release(
        parts / "captioner", parts / "ranker", tmp_path / "releases", plan=plan, progress=lines.append
    )
    return tmp_path / "releases" / name, lines


def test_an_engine_release(parts: Path, tmp_path: Path, programs: Path) -> None:
    folder, _ = build(parts, tmp_path, make_plan(parts, tmp_path, dry_run=True))
    manifest = release.verify(folder)
    assert manifest.lane == "trtllm"
    assert folder.name.startswith("trtllm-")
    assert manifest.engine is not None
    longest = len(CaptionPrompt.from_pretrained(parts / "captioner").ids(4 * 16))
    assert manifest.engine.model_dump() == {
        "gpu": "a10", "gpus": 2, "capability": "8.6", "tensorrt_llm": "1.2.1", "tensorrt": "10.14.1",
        "quantization": "fp16", "dtype": "float16", "max_batch_size": 8, "max_input_len": longest,
        "max_seq_len": longest + 12, "images": 4,
    }  # fmt: skip
    assert manifest.checks["node"] == {
        "tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48",
        "gpus": 2 * [{"name": "NVIDIA A10", "capability": "8.6", "mib": 23028}],
    }  # fmt: skip
    assert (manifest.limits.batch_size, manifest.limits.video_frames) == (8, 4)
    models = folder / "model_repository"
    assert {path.name for path in (models / "tensorrt_llm" / "1" / "engine").iterdir()} == {
        "config.json", "rank0.engine", "rank1.engine",
    }  # fmt: skip
    assert (models / "tensorrt_llm" / "1" / "decoder" / "model.safetensors").exists()  # a laptop serves it, too
    # The dry run came before the weights were converted.
    assert [line.split()[0] for line in programs.read_text().splitlines()] == [
        "convert_checkpoint", "trtllm-build", "convert_checkpoint", "trtllm-build",
    ]  # fmt: skip
    gpu = read_config(models / "tensorrt_llm" / "configs" / "gpu.pbtxt")
    assert gpu.parameters["gpt_model_path"].string_value == f"{MOUNT}/model_repository/tensorrt_llm/1/engine"
    assert gpu.parameters["gpu_device_ids"].string_value == "0,1"
    assert gpu.max_batch_size == 8


def test_unchanged_steps_are_skipped_and_changed_ones_are_not(parts: Path, tmp_path: Path, programs: Path) -> None:
    first, _ = build(parts, tmp_path, make_plan(parts, tmp_path))
    again, lines = build(parts, tmp_path, make_plan(parts, tmp_path))
    assert again == first
    assert len(programs.read_text().splitlines()) == 2
    assert sum("unchanged" in line for line in lines) == 6
    other, lines = build(parts, tmp_path, make_plan(parts, tmp_path, batch=4))
    assert other != first
    assert len(programs.read_text().splitlines()) == 3
    ran = {line.split(":")[0] for line in lines if "unchanged" not in line and "step" in line}
    assert ran == {"step 1/6 node", "step 6/6 engine"}, "before something is compiled, the node is looked at"
    set_gpus(tmp_path, ["NVIDIA H200, 9.0, 143771"] * 2)
    assert build(parts, tmp_path, make_plan(parts, tmp_path))[0] == first, "nothing is left for this node to do"
    with pytest.raises(ReleaseError, match="the engine is planned for 2 x a10"):
        build(parts, tmp_path, make_plan(parts, tmp_path, batch=2))
    assert make_plan(parts, tmp_path, gpu="2xa30").step("engine").key != make_plan(parts, tmp_path).step("engine").key


def test_a_failed_step_keeps_what_was_done_and_what_is_served(
    parts: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = build(parts, tmp_path, make_plan(parts, tmp_path))
    monkeypatch.setenv("FAIL", "trtllm-build")
    plan = make_plan(parts, tmp_path, quant="int8")
    with pytest.raises(ReleaseError, match=r"step engine failed with code 7; .*\nout of memory while building"):
        build(parts, tmp_path, plan)
    assert release.current(tmp_path / "releases") == good
    assert is_done(plan.step("convert"))
    assert not is_done(plan.step("engine"))
    assert not plan.step("engine").output.exists()
    calls = len(programs.read_text().splitlines())
    monkeypatch.delenv("FAIL")
    mended, _ = build(parts, tmp_path, plan)
    assert len(programs.read_text().splitlines()) == calls + 1, "the conversion was not repeated"
    assert release.current(tmp_path / "releases") == mended


def test_a_step_whose_files_changed_runs_again(parts: Path, tmp_path: Path, programs: Path) -> None:
    plan = make_plan(parts, tmp_path)
    execute(plan)
    (plan.step("engine").output / "rank1.engine").unlink()
    assert not is_done(plan.step("engine"))
    execute(plan)
    assert is_done(plan.step("engine"))
    assert len(programs.read_text().splitlines()) == 3


def test_a_calibrated_engine(parts: Path, tmp_path: Path, programs: Path) -> None:
    set_gpus(tmp_path, ["NVIDIA H100 80GB HBM3, 9.0, 81559"])
    folder, _ = build(parts, tmp_path, make_plan(parts, tmp_path, gpu="h100", quant="fp8", kv_dtype="fp8"))
    call = programs.read_text().splitlines()[0].split()
    assert call[0] == "quantize"
    assert call[call.index("--kv_cache_dtype") + 1] == "fp8"
    assert release.read_manifest(folder).engine is not None


def test_an_engine_of_another_version_is_not_published(
    parts: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTLLM_VERSION", "1.1.0")
    with pytest.raises(ReleaseError, match=r"built by TensorRT-LLM 1\.1\.0, expected 1\.2\.1"):
        build(parts, tmp_path, make_plan(parts, tmp_path))
    assert not (tmp_path / "releases" / "current").exists()


@pytest.mark.parametrize(
    ("versions", "gpus", "message"),
    [
        ({"tensorrt_llm": "1.3.0"}, None, r"planned with TensorRT-LLM 1\.2\.1, here is 1\.3\.0; build .* in nvcr\.io"),
        ({"tensorrt": "10.13.3"}, None, r"is planned with TensorRT 10\.14\.1, here is 10\.13\.3"),
        ({}, ["NVIDIA A30, 8.0, 24576"] * 2, r"2 x a10 \(compute capability 8\.6\), GPUs here have 8\.0, 8\.0; .*-gpu"),
        ({}, ["NVIDIA A10, 8.6, 23028"], r"is planned for 2 x a10 .* GPUs here have 8\.6; "),
        ({}, ["NVIDIA A10, 8.6, 23028", "NVIDIA A2, 8.6, 15356"],
         r"2 x a10 with 22\.5 GiB, GPUs here have 22\.5 GiB \(NVIDIA A10\), 15\.0 GiB \(NVIDIA A2\)"),
    ],
)  # fmt: skip
def test_another_node_than_the_planned_one_builds_nothing(
    parts: Path, tmp_path: Path, programs: Path, versions: dict[str, str], gpus: list[str] | None, message: str
) -> None:
    for package, version in versions.items():
        set_version(tmp_path, package, version)
    if gpus is not None:
        set_gpus(tmp_path, gpus)
    plan = make_plan(parts, tmp_path)
    with pytest.raises(ReleaseError, match=message):
        build(parts, tmp_path, plan)
    assert not programs.read_text()
    assert not any(is_done(step) for step in plan.steps)


def test_a_node_that_cannot_be_looked_at(parts: Path, tmp_path: Path, programs: Path) -> None:
    plan = make_plan(parts, tmp_path)
    program(tmp_path, "nvidia-smi", "echo Driver/library version mismatch; exit 18")
    with pytest.raises(ReleaseError, match=r"step node failed with code 1; .*\nDriver/library version mismatch"):
        execute(plan)
    program(tmp_path, "python3", "echo hello")
    with pytest.raises(ReleaseError, match="expected versions and GPUs of this node as JSON, got 'hello'"):
        execute(plan)


def test_outside_the_container_docker_runs_the_program(parts: Path, tmp_path: Path) -> None:
    plan = make_plan(parts, tmp_path)
    step = plan.step("engine")

    def only_docker(name: str) -> str | None:
        return "/usr/bin/docker" if name == "docker" else None

    command = container_command(step, list(step.argv), plan, only_docker)
    assert command[:4] == ["/usr/bin/docker", "run", "--rm", "--init"]
    image = command.index(BASE_IMAGE)
    assert command[image + 1 :] == list(step.argv)
    assert [command[i + 1] for i, word in enumerate(command) if word == "--env"] == ["HOME=/tmp"]
    mounts = [command[i + 1] for i, word in enumerate(command) if word == "--volume"]
    assert f"{plan.work}:{plan.work}" in mounts
    assert all(str(path).startswith(str(plan.work)) for path in step.inputs)
    with pytest.raises(ReleaseError, match=r"needs TensorRT-LLM; expected `trtllm-build` .* or docker on PATH"):
        container_command(step, list(step.argv), plan, lambda name: None)


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM\n"])
def test_an_interrupted_program_is_stopped(
    parts: Path, tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch, stubborn: str
) -> None:
    """Ctrl-C ends the program, too, and leaves no half step behind."""
    plan = make_plan(parts, tmp_path)
    monkeypatch.setattr(executing, "GRACE", 0.2)
    program(tmp_path, "trtllm-build", f"{stubborn}echo $$ > {tmp_path}/pid\nsleep 60")
    started = executing.subprocess.Popen

    class Interrupted(started):  # type: ignore[misc,valid-type]
        def wait(self, timeout: float | None = None) -> int:
            while not (tmp_path / "pid").exists():
                pass
            monkeypatch.setattr(executing.subprocess, "Popen", started)
            self.wait = super().wait  # type: ignore[method-assign]
            raise KeyboardInterrupt

    execute_before = plan.step("convert")
    monkeypatch.setattr(
        executing.subprocess, "Popen",
        lambda command, **options: (Interrupted if "trtllm-build" in command[0] else started)(command, **options),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        execute(plan)
    assert is_done(execute_before)
    assert not plan.step("engine").output.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_records_of_steps_say_how_long_they_took(parts: Path, tmp_path: Path, programs: Path) -> None:
    plan = make_plan(parts, tmp_path)
    outputs = execute(plan)
    record = json.loads((outputs["engine"] / "step.json").read_text())
    assert record["argv"][0] == "trtllm-build"
    assert record["seconds"] >= 0
    assert set(record["files"]) == {"config.json", "rank0.engine", "rank1.engine"}
