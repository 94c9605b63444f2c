"""The container's entry and health check with the real server: on a CPU, with the stand-ins as its backends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serving.runtime import Runtime, choose_port
from sightline import release
from tests.unit.test_container import with_lane

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(releases_dir: Path, tmp_path: Path) -> Path:
    """A release of lane trtllm whose only GPU configuration is one of score, for another batch size."""
    source = tmp_path / "source"
    shutil.copytree(release.current(releases_dir), source)
    for configs in source.glob("model_repository/*/configs"):
        shutil.rmtree(configs)  # they ask for a GPU
    config = source / "model_repository" / "score" / "config.pbtxt"
    special = config.parent / "configs" / "gpu.pbtxt"
    special.parent.mkdir()
    special.write_text(re.sub(r"(?m)^max_batch_size: \d+$", "max_batch_size: 77", config.read_text()))
    return with_lane(source, tmp_path / "release", "trtllm")


def test_the_entry_serves_answers_the_health_check_and_ends_on_the_stop_signal(folder: Path, tmp_path: Path) -> None:
    import tritonclient.grpc as triton

    runtime = Runtime.find()
    runtime.make_backends(tmp_path / "backends")
    environment = runtime.environment()
    environment["PATH"] = f"{runtime.binary.parent}:{environment['PATH']}"
    environment["SIGHTLINE_STORE"] = str(tmp_path / "features")
    (tmp_path / "cache").mkdir()
    port = choose_port("port", "127.0.0.1", 0)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.container_entry", str(folder), str(tmp_path / "cache"),
             f"--backend-directory={tmp_path / 'backends'}", f"--grpc-port={port}", "--allow-http=false",
             "--allow-metrics=false", "--backend-config=python,shm-region-prefix-name=sightline_container_test"],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while "Started GRPCInferenceService" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        probe = subprocess.run(
            [sys.executable, "-m", "serving.probe", f"localhost:{port}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (probe.returncode, probe.stdout[:8]) == (0, "score 0."), probe.stderr
        with triton.InferenceServerClient(f"localhost:{port}") as client:
            assert client.get_model_config("score").config.max_batch_size == 77
            assert client.get_model_config("rank_media").config.max_batch_size == 32
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert f"serving release {release.read_manifest(folder).release} (lane trtllm)" in log.read_text()
