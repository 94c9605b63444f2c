"""The docker command, what the container runs, and that deploy/ agrees with both and with requirements.lock."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving import container
from serving.container import Gpu, gpu_release, parse_gpus, run_command
from serving.container_entry import claim_cache, server_command, server_environment
from sightline import node, release
from sightline.cli import app
from sightline.errors import ReleaseError, ServingError
from sightline.features import Versions
from sightline.store import open_store
from tests.fake_trtllm import set_version

ROOT = Path(__file__).parents[2]
CONTAINERFILE = (ROOT / "deploy" / "Containerfile").read_text()
PORTS = {"grpc_port": 9501, "http_port": 9500, "metrics_port": 9502}


def with_lane(source: Path, folder: Path, lane: str) -> Path:
    """Copy a release to `folder` as one of another lane: id and manifest are right, the models stay what they are."""
    shutil.copytree(source, folder)
    manifest = release.read_manifest(folder)
    changed: dict[str, Any] = {"lane": lane, "release": release.release_id(lane, folder, manifest.release)}
    for name in release.ID_BEARERS:
        bearer = folder / name
        bearer.write_text(bearer.read_text().replace(manifest.release, changed["release"]))
    changed["files"] = release.hash_files(folder)
    (folder / release.MANIFEST).write_text(manifest.model_copy(update=changed).model_dump_json())
    return folder


@pytest.fixture(scope="module")
def releases(releases_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A releases folder whose current release says that it is of lane trtllm."""
    folder = tmp_path_factory.mktemp("gpu releases")
    with_lane(release.current(releases_dir), folder / "release", "trtllm")
    (folder / "current").symlink_to("release")
    return folder


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    service: dict[str, Any] = document["services"]["triton"]
    return service


def command_for(releases: Path) -> list[str]:
    return run_command(
        releases / "current", release_name(releases), host="127.0.0.1", store="artifacts/features",
        queue="artifacts/queue", **PORTS,
    )  # fmt: skip


def release_name(releases: Path) -> str:
    return release.read_manifest(releases / "current").release


def options(command: list[str]) -> dict[str, list[str]]:
    """`--name=value` arguments by name."""
    found: dict[str, list[str]] = {}
    for argument in command:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            found.setdefault(name, []).append(value)
    return found


# --- the docker command -------------------------------------------------------------------------------


def test_docker_run(releases: Path) -> None:
    command = command_for(releases)
    assert command[:2] == ["docker", "run"]
    assert command[-1] == container.IMAGE, "what follows the image would go to tritonserver"
    given = options(command)
    assert given["--gpus"] == ["all"]
    assert given["--publish"] == ["127.0.0.1:9500:8500", "127.0.0.1:9501:8501", "127.0.0.1:9502:8502"]
    assert given["--ulimit"] == ["memlock=-1", "stack=67108864"]
    assert given["--mount"] == [
        # The release itself, not the link: a rollback must not change what a running server reads.
        f"type=bind,source={releases / 'release'},target={node.MOUNT},readonly",
        f"type=volume,source=sightline-cache-{release_name(releases)},target={node.CACHE}",
        f"type=bind,source={Path.cwd()}/artifacts/features,target={node.STATE}/features",
        f"type=bind,source={Path.cwd()}/artifacts/queue,target={node.STATE}/nearline",
    ]
    assert given["--env"] == [
        f"SIGHTLINE_STORE={node.STATE}/features", f"SIGHTLINE_QUEUE={node.STATE}/nearline",
    ]  # fmt: skip


def test_a_store_on_a_server_is_not_mounted(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its password is in no list of processes."""
    monkeypatch.setenv("SIGHTLINE_STORE_PASSWORD", "s3cret")
    command = run_command(
        releases / "current", "r", host="127.0.0.1", store="redis://features:6379/0", queue=None, **PORTS
    )
    given = options(command)
    assert len(given["--mount"]) == 2
    assert given["--env"] == ["SIGHTLINE_STORE=redis://features:6379/0", "SIGHTLINE_STORE_PASSWORD"]
    assert "s3cret" not in " ".join(command)


def test_a_gallery_is_mounted_or_named(releases: Path) -> None:
    def gallery(location: str) -> dict[str, list[str]]:
        return options(run_command(
            releases / "current", "r", host="127.0.0.1", store="redis://features:6379/0", queue=None, gallery=location,
            **PORTS,
        ))  # fmt: skip

    folder, server = gallery("artifacts/gallery"), gallery("http://milvus:19530")
    inside = f"{node.STATE}/gallery"
    assert f"type=bind,source={Path.cwd()}/artifacts/gallery,target={inside}" in folder["--mount"]
    assert f"SIGHTLINE_GALLERY={inside}" in folder["--env"]
    assert "SIGHTLINE_GALLERY=http://milvus:19530" in server["--env"]
    assert len(server["--mount"]) == 2


def test_shared_memory_is_enough_for_every_release(releases: Path) -> None:
    from serving.doctor import INSTANCE_BYTES, python_instances

    models = releases / "release" / "model_repository"
    needed = python_instances(models, "gpu") * INSTANCE_BYTES + gpu_release(releases / "current").limits.media_bytes
    shm = options(command_for(releases))["--shm-size"]
    assert shm == [f"{container.SHM_GIB}g"]
    assert 2 * needed < container.SHM_GIB * 2**30


def test_print_shows_a_command_that_a_shell_takes(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no docker
    result = CliRunner().invoke(
        app, ["serve", "--target", "gpu", "--print", "--releases", str(releases), "--grpc-port", "9501",
              "--http-port", "9500", "--metrics-port", "9502"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert shlex.split(result.stdout) == command_for(releases)


def test_without_docker_the_message_says_what_to_do(releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ServingError, match=r"docker: not found.*install both.*--print"):
        serve(releases)


def test_without_the_image_the_message_says_how_to_build_it(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(tmp_path, monkeypatch, "echo 'No such image' >&2; exit 1")
    how = r"No such image.*docker build --tag sightline:\S+ --file deploy/Containerfile \."
    with pytest.raises(ServingError, match=how):
        serve(releases)


def test_serving_becomes_docker(releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line, in a process of its own, with a docker that writes down what it is asked."""
    docker(tmp_path, monkeypatch, f'[ "$1" = image ] && echo [] || printf "%s\\n" "$$" "$@" > {tmp_path}/asked')
    process = subprocess.Popen(
        [sys.executable, "-m", "sightline.cli", "serve", "--target=gpu", f"--releases={releases}",
         "--grpc-port=0", "--http-port=0", "--metrics-port=0"], cwd=ROOT)  # fmt: skip
    assert process.wait() == 0
    pid, run, *_, image = (tmp_path / "asked").read_text().splitlines()
    assert (int(pid), run, image) == (process.pid, "run", container.IMAGE)


def docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `docker` that runs `script` first on PATH."""
    tool(folder, "docker", script)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def serve(releases: Path) -> None:
    container.serve_in_container(
        releases / "current", host="127.0.0.1", grpc_port=0, http_port=0, metrics_port=0,
        store="artifacts/features", queue=None, print_only=False,
    )  # fmt: skip


def test_a_release_of_the_cpu_is_refused(releases_dir: Path) -> None:
    with pytest.raises(ReleaseError, match=r"is of lane cpu.*make build-engines LANE=trtllm"):
        gpu_release(release.current(releases_dir))


def test_a_damaged_release_is_refused(releases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(releases / "release", folder)
    with (folder / "model_repository" / "embed" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ReleaseError, match=r"model_repository/embed/1/model\.onnx: changed"):
        gpu_release(folder)


def test_print_is_for_the_gpu_only() -> None:
    result = CliRunner().invoke(app, ["serve", "--print"])
    assert "--print: shows the docker command of --target gpu" in str(result.exception)


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [([], []), (["TARGET=gpu"], ["--target", "gpu"]), (["TARGET=gpu", "PRINT=1"], ["--target", "gpu", "--print"])],
)
def test_make_serve_passes_the_target_on(variables: list[str], arguments: list[str]) -> None:
    shown = subprocess.run(
        ["make", "--just-print", "--no-print-directory", "serve", *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert shown[-1].split() == [".venv/bin/sightline", "serve", *arguments]


# --- what the container runs ----------------------------------------------------------------------------


def test_the_server_loads_every_model_with_its_gpu_configuration(
    releases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SIGHTLINE_GALLERY", raising=False)
    given = options(server_command(releases / "release"))
    models = {path.parent.name for path in releases.glob("release/model_repository/*/config.pbtxt")}
    assert len(models) == 11
    assert set(given["--load-model"]) == models - {"retrieve"}
    monkeypatch.setenv("SIGHTLINE_GALLERY", "/var/lib/sightline/gallery")
    assert set(options(server_command(releases / "release"))["--load-model"]) == models
    assert given["--model-control-mode"] == ["explicit"]
    assert given["--model-config-name"] == ["gpu"]
    assert [given[f"--{name}-port"] for name in ("http", "grpc", "metrics")] == [["8500"], ["8501"], ["8502"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected the folders of the release and of its cache"),
        (["/nowhere", "/tmp"], "/nowhere/manifest.json: missing"),
    ],
)
def test_the_entry_refuses_in_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "serving.container_entry", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_entry_refuses_an_engine_of_another_gpu(releases: Path, tmp_path: Path) -> None:
    """As the container would: nvidia-smi says what is there, the manifest what the engine was built for."""
    folder = tmp_path / "release"
    shutil.copytree(releases / "release", folder)
    built = release.Engine(
        gpu="h100", gpus=1, capability="9.0", tensorrt_llm=node.TENSORRT_LLM, tensorrt=node.TENSORRT,
        quantization="fp16", dtype="float16", max_batch_size=8, max_input_len=2048, max_seq_len=2560, images=1,
    )  # fmt: skip
    manifest = release.read_manifest(folder).model_copy(update={"engine": built})
    (folder / release.MANIFEST).write_text(manifest.model_dump_json())
    (tmp_path / "cache").mkdir()
    answers = {
        "nvidia-smi": "echo Tesla T4, 7.5, 15360", "tritonserver": "echo started $*",
        "python3": f'PYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"',
    }  # fmt: skip
    set_version(tmp_path, "tensorrt_llm", "1.2.1")
    set_version(tmp_path, "tensorrt", "10.14.1.48")
    for name, script in answers.items():
        tool(tmp_path, name, script)
    command = [sys.executable, "-m", "serving.container_entry", str(folder), str(tmp_path / "cache")]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment["SIGHTLINE_STORE"] = str(tmp_path / "features")

    def enter() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    refused = enter()
    assert refused.returncode == 1
    assert "the engine was built for 1 x h100" in refused.stderr
    tool(tmp_path, "nvidia-smi", "echo NVIDIA H100, 9.0, 81559")
    assert enter().stdout.startswith("started --model-repository=")
    with open_store(str(tmp_path / "features"), readonly=True) as store:
        assert store.read_items([5], [Versions.read(folder / "model_repository/lookup/1").items.version]).status == [0]
    del environment["SIGHTLINE_STORE"]
    assert "SIGHTLINE_STORE: expected the location of the feature store" in enter().stderr
    environment["SIGHTLINE_STORE"] = str(tmp_path / "features")
    set_version(tmp_path, "tensorrt_llm", "1.3.0")
    assert "the engine was built with TensorRT-LLM 1.2.1, here is 1.3.0" in enter().stderr
    shutil.rmtree(tmp_path / "packages")
    missing = r"python3 here finds no tensorrt_llm, tensorrt or GPU \(.*PackageNotFoundError: .*tensorrt_llm\)"
    assert re.search(missing, enter().stderr)


def test_tensor_parallel_engines_get_a_server_per_gpu(releases: Path) -> None:
    """Rank 0 answers; the other holds its part of the engine and listens nowhere."""
    command = server_command(releases / "release", gpus=2)
    assert command[:3] == ["mpirun", "-n", "1"]
    first, other = " ".join(command).split(" : ")
    assert "--load-model=rank_media" in first
    assert "--grpc-port=8501" in first
    assert other.split()[:3] == ["-n", "1", "tritonserver"]
    assert [word for word in other.split() if word.startswith("--load-model")] == ["--load-model=tensorrt_llm"]
    assert "--allow-grpc=false" in other


def test_python_models_run_with_the_pinned_packages_except_beside_the_llm_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/opt/image/bin")
    assert server_environment("trtllm")["PATH"] == f"{Path(sys.executable).parent}:/opt/image/bin"
    assert server_environment("llmapi")["PATH"] == "/opt/image/bin"


def test_a_cache_belongs_to_one_release(tmp_path: Path) -> None:
    claim_cache(tmp_path, "trtllm-a")
    claim_cache(tmp_path, "trtllm-a")
    with pytest.raises(ServingError, match="the cache of release trtllm-a, expected an empty one or that of trtllm-b"):
        claim_cache(tmp_path, "trtllm-b")
    with pytest.raises(ServingError, match="missing/release: cannot be written"):
        claim_cache(tmp_path / "missing", "trtllm-a")


def test_gpus_as_nvidia_smi_lists_them() -> None:
    first, second = parse_gpus("NVIDIA H200, 9.0, 143771, 590.44.01\nTesla T4, 7.5, 15360, 535.86.10\n")
    assert first == Gpu(name="NVIDIA H200", capability="9.0", memory_bytes=143771 * 2**20, driver="590.44.01")
    assert (second.name, second.capability) == ("Tesla T4", "7.5")


def test_the_probe_fails_where_nothing_answers() -> None:
    command = [sys.executable, "-m", "serving.probe", "localhost:1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the canary inference on localhost:1 failed" in result.stderr


# --- deploy/ --------------------------------------------------------------------------------------------


def packages() -> list[str]:
    found = re.search(r'^ARG PACKAGES="([^"]+)"', CONTAINERFILE, re.MULTILINE)
    assert found is not None
    return found[1].replace("\\\n", " ").split()


def test_the_image_installs_packages_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(r"^([\w-]+)==", lock, re.MULTILINE)
    assert set(packages()) <= set(pinned)
    assert packages() == sorted(packages())


def test_the_image_has_everything_that_runs_in_it(releases: Path) -> None:
    """Imports with only the image's packages: all that the python models, the entry and the probe import."""
    served = [path.read_text() for path in releases.glob("release/model_repository/*/1/model.py")]
    assert len(served) == 6
    imports = sorted({
        line for text in served for line in text.splitlines()
        if line.startswith(("import ", "from ")) and "triton_python_backend_utils" not in line
    } | {
        "import serving.container_entry", "import serving.probe", "import tritonclient.grpc",
        "import sightline.gallery.embedded", "import sightline.gallery.server",
    })  # fmt: skip
    guard = f"""
import sys
from importlib.metadata import packages_distributions

def name(distribution):
    return distribution.lower().replace("_", "-").replace(".", "-")

ALLOWED = {{*{packages()!r}, "sightline"}}
FOREIGN = {{top for top, found in packages_distributions().items() if not ALLOWED & set(map(name, found))}}

class Refuse:
    def find_spec(self, module, path=None, target=None):
        if module.partition(".")[0] in FOREIGN:
            raise ModuleNotFoundError(f"{{module}} is not in the image", name=module)

sys.meta_path.insert(0, Refuse())
"""
    ordered = [line for line in imports if "__future__" in line] + [
        line for line in imports if "__future__" not in line
    ]
    code = "\n".join([ordered[0], guard, *ordered[1:]])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    refused = subprocess.run(
        [sys.executable, "-c", f"{guard}\nimport typer"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "typer is not in the image" in refused.stderr, "the guard lets everything through"


def test_the_image_is_made_from_the_pinned_one() -> None:
    assert f"ARG TRTLLM_IMAGE={node.BASE_IMAGE}\n" in CONTAINERFILE
    assert f"ARG TENSORRT_LLM={node.TENSORRT_LLM}\n" in CONTAINERFILE
    assert CONTAINERFILE.index("USER triton-server") < CONTAINERFILE.index("ENTRYPOINT")
    entry = re.search(r"^ENTRYPOINT (\[[^]]*\])$", CONTAINERFILE, re.MULTILINE)
    assert entry is not None
    runs = ["/opt/sightline/venv/bin/python", "-m", "serving.container_entry", node.MOUNT, node.CACHE]
    assert yaml.safe_load(entry[1].replace("\\\n", " "))[-5:] == runs
    ports = {container.HTTP_PORT, container.GRPC_PORT, container.METRICS_PORT}
    exposed = re.search(r"^EXPOSE (.*)$", CONTAINERFILE, re.MULTILINE)
    assert exposed is not None
    assert set(map(int, exposed[1].split())) == ports


def test_compose_starts_what_the_command_starts(compose: dict[str, Any]) -> None:
    given = options(
        run_command(
            Path("x"), "x", host="127.0.0.1", grpc_port=8501, http_port=8500, metrics_port=8502, store="f", queue="q"
        )
    )
    assert compose["image"] == container.IMAGE
    assert [compose["gpus"]] == given["--gpus"]
    assert compose["init"] == ("--init" in given)
    assert [compose["ipc"]] == given["--ipc"]
    assert compose["shm_size"] == f"{container.SHM_GIB}gb"
    assert [f"{name}={limit}" for name, limit in compose["ulimits"].items()] == given["--ulimit"]
    assert compose["security_opt"] == given["--security-opt"]
    assert compose["ports"] == given["--publish"]
    assert [compose["stop_grace_period"]] == [f"{seconds}s" for seconds in given["--stop-timeout"]]
    mount, cache, state = compose["volumes"]
    assert (mount["type"], mount["target"], mount["read_only"]) == ("bind", node.MOUNT, True)
    assert (cache["type"], cache["target"]) == ("volume", node.CACHE)
    assert (state["type"], state["target"]) == ("volume", node.STATE)
    defaults = [f"{name}=${{{name}:-{value}}}" for name, value in (one.split("=") for one in given["--env"])]
    assert [f"{name}={value}" for name, value in compose["environment"].items() if value] == defaults
    assert compose["restart"] == "unless-stopped"


def test_compose_repeats_the_images_health_check(compose: dict[str, Any]) -> None:
    found = re.search(r"^HEALTHCHECK (.*) \\\n +CMD (.*)$", CONTAINERFILE, re.MULTILINE)
    assert found is not None
    check = {name.replace("_", "-"): str(value) for name, value in compose["healthcheck"].items() if name != "test"}
    assert check == {name[2:]: value[0] for name, value in options(found[1].split()).items()}
    assert compose["healthcheck"]["test"] == ["CMD", *yaml.safe_load(found[2])]


def test_compose_builds_from_the_containerfile(compose: dict[str, Any]) -> None:
    context = (ROOT / "deploy" / compose["build"]["context"]).resolve()
    assert context == ROOT
    ignored = (context / "deploy" / "Containerfile.dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(\S+)", CONTAINERFILE, re.MULTILINE)
    assert {f"!{path}" for path in copied} == {line for line in ignored if line.startswith("!")}
    assert all((context / path).exists() for path in copied)
