"""What the container runs: check the mounted release against this node, then become tritonserver.

    python -m serving.container_entry RELEASE CACHE [TRITONSERVER OPTION…]
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from serving.container import GRPC_PORT, HTTP_PORT, METRICS_PORT, gpu_release
from serving.runtime import RETRIEVE
from sightline.errors import ServingError, SightlineError
from sightline.features import seed
from sightline.node import BASE_IMAGE, PROBE, STATE, Node, require_node
from sightline.store import open_store


def this_node() -> Node:
    """TensorRT-LLM and TensorRT of the image, and the GPUs that it sees.

    Raises:
        ServingError: one of them is not there.
    """
    command = ["/usr/bin/env", "python3", "-c", PROBE]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ServingError(
            f"python3 here finds no tensorrt_llm, tensorrt or GPU ({reason}); run this with --gpus=all in the image "
            f"that deploy/Containerfile makes from {BASE_IMAGE}"
        )
    return Node.parse(found.stdout)


def server_command(release_dir: Path, gpus: int = 1) -> list[str]:
    """The argv for a release that was verified; with tensor parallelism one server per GPU under mpirun.

    Rank 0 answers requests; the others hold their part of the engine and listen nowhere.
    """
    repository = release_dir / "model_repository"
    without = () if "SIGHTLINE_GALLERY" in os.environ else (RETRIEVE,)
    models = sorted(path.name for path in repository.iterdir() if path.is_dir() and path.name not in without)
    first = [
        "tritonserver",
        f"--model-repository={repository}",
        # With explicit control, a model whose python stub died can be loaded again while the others answer.
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
        f"--model-load-thread-count={len(models)}",
        "--disable-auto-complete-config",
        # configs/gpu.pbtxt where a model has one, else its config.pbtxt.
        "--model-config-name=gpu",
        f"--http-port={HTTP_PORT}",
        f"--grpc-port={GRPC_PORT}",
        f"--metrics-port={METRICS_PORT}",
    ]
    if gpus == 1:
        return first
    other = [
        "tritonserver", f"--model-repository={repository}", "--model-control-mode=explicit",
        "--load-model=tensorrt_llm", "--disable-auto-complete-config", "--model-config-name=gpu",
        "--allow-http=false", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    ranks = [word for _ in range(gpus - 1) for word in (":", "-n", "1", *other)]
    return ["mpirun", "-n", "1", *first, *ranks]


def server_environment(lane: str) -> dict[str, str]:
    """This process's environment with the python3 first on PATH that Triton's stubs take their packages from.

    Ours, as pinned; but in lane llmapi a python model imports TensorRT-LLM, which only the image's own python3 has.
    There the image's packages go first and ours fill the gaps (sightline.pth, see deploy/Containerfile).
    """
    if lane == "llmapi":
        return dict(os.environ)
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def claim_cache(cache: Path, release: str) -> None:
    """Take an empty cache folder for `release`, or find that it is this release's already.

    ONNX Runtime's TensorRT engines are named by the graph, not by its weights: with the cache of another release,
    a model would silently answer with that one's weights.

    Raises:
        ServingError: the cache is another release's, or cannot be written.
    """
    owner = cache / "release"
    try:
        if not owner.exists():
            owner.write_text(release)
        if (found := owner.read_text()) != release:
            raise ServingError(
                f"{cache}: the cache of release {found}, expected an empty one or that of {release}; give each release "
                f"a volume of its own, like sightline-cache-{release}"
            )
    except OSError as error:
        raise ServingError(f"{owner}: cannot be written ({error.strerror}); mount a volume at {cache}") from error


def main(arguments: list[str]) -> None:
    """Never returns: the process becomes the server, which so gets the container's signals itself."""
    try:
        if len(arguments) < 2:
            raise ServingError(f"expected the folders of the release and of its cache, got {arguments}")
        release_dir, cache = Path(arguments[0]), Path(arguments[1])
        manifest = gpu_release(release_dir)
        if manifest.engine is not None:
            node = this_node()
            require_node(
                manifest.engine, capabilities=node.capabilities, tensorrt_llm=node.tensorrt_llm, tensorrt=node.tensorrt
            )
        claim_cache(cache, manifest.release)
        if "SIGHTLINE_STORE" not in os.environ:
            raise ServingError(
                f"SIGHTLINE_STORE: expected the location of the feature store, a folder mounted at {STATE}/features or "
                "redis://host:port/db; `sightline serve --target gpu --store …` sets it"
            )
        with open_store(os.environ["SIGHTLINE_STORE"]) as store:
            seed(release_dir, store)
        print(f"serving release {manifest.release} (lane {manifest.lane})", file=sys.stderr, flush=True)
        gpus = manifest.engine.gpus if manifest.engine else 1
        command = [*server_command(release_dir, gpus), *arguments[2:]]
        os.execvpe(command[0], command, server_environment(manifest.lane))
    except FileNotFoundError:
        sys.exit("error: tritonserver: not found on PATH; this runs in the image that deploy/Containerfile makes")
    except SightlineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
