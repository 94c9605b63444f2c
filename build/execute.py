"""Run a plan: finished steps are skipped, an interrupted build goes on where it stopped.

A step writes into `<output>.part`, renamed when it succeeded: a step's folder is whole or not there. Its log lies
beside it. Nothing here touches a published release.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build.hardware import GIB, MIB
from build.plan import NODE, Plan, Step
from sightline.errors import ReleaseError, SightlineError
from sightline.node import BASE_IMAGE, Node, require_node

RECORD = "step.json"
TAIL = 15  # lines of a failed step's log in the error
GRACE = 30  # seconds that an interrupted program has to end by itself
# Drivers report a GPU's memory a little differently: this share of the planned one is as good as all of it.
MEMORY = 0.97


def execute(plan: Plan, *, progress: Callable[[str], None] = lambda line: None) -> dict[str, Path]:
    """Run the steps that have not run yet; returns step name → output folder.

    Raises:
        ReleaseError: a step failed, with the end of its log, or the node is not the planned one; what was done before
            is kept.
    """
    plan.work.mkdir(parents=True, exist_ok=True)
    # A build may go on on another node: as long as something is left for the container, the node is looked at again.
    there = any(step.where == "container" and not is_done(step) for step in plan.steps)
    for number, step in enumerate(plan.steps, 1):
        what = f"step {number}/{len(plan.steps)} {step.name}"
        if is_done(step) and not (there and step.name == NODE):
            progress(f"{what}: unchanged, {step.output.name}")
            continue
        progress(f"{what}: {step.command()}")
        began = time.monotonic()
        part = step.output.with_name(step.output.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        argv = [str(part) if word == str(step.output) else word for word in step.argv]
        log = step.output.with_name(step.output.name + ".log")
        if step.where == "here":
            _run_here(step, argv, log)
        else:
            _run_there(step, argv, plan, log)
        if step.name == NODE:
            node = Node.parse(log.read_text())
            check_node(plan, node)
            (part / "node.json").write_text(json.dumps(asdict(node), indent=1) + "\n")
        record = {"step": step.name, "key": step.key, "seconds": round(time.monotonic() - began, 1),
                  "argv": list(step.argv), "files": _sizes(part)}  # fmt: skip
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(step.output, ignore_errors=True)
        part.rename(step.output)
        progress(f"{what}: {record['seconds']} s")
    return {step.name: step.output for step in plan.steps}


def is_done(step: Step) -> bool:
    """Whether the step's folder is there with every file in its size."""
    try:
        record: dict[str, Any] = json.loads((step.output / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return bool(record["key"] == step.key and record["files"] == _sizes(step.output))


def check_node(plan: Plan, node: Node) -> None:
    """Hold what the container sees to what the plan is for: GPUs and their memory, versions.

    Raises:
        ReleaseError: what differs, and what to do.
    """
    assert plan.options is not None
    assert plan.engine is not None
    gpu, gpus = plan.options.gpu, plan.options.gpus
    remedy = f"build on such a node in {BASE_IMAGE}, or plan for the GPUs here with --gpu"
    require_node(
        plan.engine, capabilities=node.capabilities, tensorrt_llm=node.tensorrt_llm, tensorrt=node.tensorrt,
        was="is planned", remedy=remedy,
    )  # fmt: skip
    if any(device.mib * MIB < MEMORY * gpu.memory for device in node.gpus[:gpus]):
        here = ", ".join(f"{device.mib * MIB / GIB:.1f} GiB ({device.name})" for device in node.gpus)
        raise ReleaseError(
            f"the engine is planned for {gpus} x {gpu.name} with {gpu.memory / GIB:.1f} GiB, GPUs here have {here}; "
            f"{remedy}"
        )


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def _run_here(step: Step, argv: list[str], log: Path) -> None:
    """An own step: `python -m build.steps …`, in this process.

    Raises:
        ReleaseError: the step's own, or that one of its inputs cannot be used, whatever the library says of it.
    """
    from build import steps

    assert argv[:3] == [sys.executable, "-m", "build.steps"], f"this is a bug: {argv} is not a step of Sightline's"
    try:
        steps.run(argv[3:])
    except SightlineError:
        raise
    except Exception as error:
        log.write_text(traceback.format_exc())
        inputs, reason = ", ".join(map(str, step.inputs)), (str(error).splitlines() or [""])[0]
        raise ReleaseError(
            f"step {step.name} failed on {inputs}: {type(error).__name__}: {reason}; check that its files are whole. "
            f"The traceback is in {log}"
        ) from error


def container_command(step: Step, argv: list[str], plan: Plan, which: Callable[[str], str | None]) -> list[str]:
    """How a TensorRT-LLM program is started: as it is inside the container, through docker outside.

    Raises:
        ReleaseError: neither is possible.
    """
    if which("trtllm-build"):
        return argv
    docker = which("docker")
    if docker is None:
        raise ReleaseError(
            f"step {step.name}: needs TensorRT-LLM; expected `trtllm-build` (inside {BASE_IMAGE}) or docker on PATH. "
            "`sightline build plan` shows the whole plan on any machine"
        )
    folders = sorted({str(plan.work.resolve()), *(str(path.resolve()) for path in step.inputs)})
    user = f"{os.getuid()}:{os.getgid()}"  # files belong to the caller, not to root
    return [
        docker, "run", "--rm", "--init", "--gpus", "all", "--ipc=host",
        "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--user", user,
        *(word for folder in folders for word in ("--volume", f"{folder}:{folder}")),
        *(word for name, value in step.env.items() for word in ("--env", f"{name}={value}")),
        BASE_IMAGE, *argv,
    ]  # fmt: skip


def _run_there(step: Step, argv: list[str], plan: Plan, log: Path) -> None:
    command = container_command(step, argv, plan, shutil.which)
    environment: Mapping[str, str] = os.environ | dict(step.env)
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ReleaseError(f"step {step.name}: {command[0]} cannot be started: {error}") from error
        try:
            code = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            raise
    if code:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        raise ReleaseError(f"step {step.name} failed with code {code}; its log, {log}, ends with:\n{end}")
