"""What a Triton process needs on this machine: its binary, a backend folder, an environment, free ports."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sightline.errors import ServingError

RETRIEVE = "retrieve"  # the model that is served only where there is a gallery
# The python-based CPU backends lie beside this package in the repository.
STAND_INS = Path(__file__).parents[1] / "backends"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Triton as the `nvidia-pytriton` wheel carries it."""

    binary: Path
    python_backend: Path
    stub: Path
    libraries: Path

    @classmethod
    def find(cls) -> Runtime:
        """Locate the wheel's parts for the running Python. Raises ServingError naming what is missing."""
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise ServingError(
                "tritonserver: not found; expected the package nvidia-pytriton in this environment, "
                "run `make setup`"
            )
        package = Path(spec.origin).parent
        server = package / "tritonserver"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        found = cls(
            binary=server / "bin" / "tritonserver",
            python_backend=server / "backends" / "python",
            stub=server / "python_backend_stubs" / python / "triton_python_backend_stub",
            libraries=package.parent / "nvidia_pytriton.libs",
        )
        for path in (found.binary, found.python_backend, found.stub, found.libraries):
            if not path.exists():
                raise ServingError(
                    f"{path}: missing; expected nvidia-pytriton with a stub for Python {python}, "
                    "run `make setup`"
                )
        return found

    def make_backends(self, folder: Path) -> None:
        """Fill a backend folder: the python backend with the stub of this Python, and the CPU stand-ins.

        Copies, because Triton refuses a library that a symlink takes out of the backend folder.
        """
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(self.python_backend, folder / "python", ignore=skip)
        shutil.copy(self.stub, folder / "python")
        shutil.copytree(STAND_INS, folder, ignore=skip, dirs_exist_ok=True)

    def environment(self) -> dict[str, str]:
        """This process's environment, changed so that stubs find this interpreter and its packages."""
        libraries = [str(self.libraries), str(sysconfig.get_config_var("LIBDIR"))]
        return os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join([*libraries, *_entries("LD_LIBRARY_PATH")]),
            # A stub takes its packages from the first python3 on the path.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), *_entries("PATH")]),
            # Torch's threads spin while they wait for each other. On cores that anything else uses, too, a token
            # then takes tens of milliseconds in place of one or two.
            "OMP_WAIT_POLICY": "passive",
        }


def link_models(source: Path, folder: Path, without: Collection[str] = ()) -> list[str]:
    """Make `folder` a model repository of links into `source`; returns the models' names, some left out.

    A stub writes bytecode beside a model.py (and heeds no PYTHONDONTWRITEBYTECODE), and a model is loaded again by
    giving its version folder a new time; but a release has to stay what was verified. So folders are made, python
    files are copied, and links lead to the rest.
    """
    models = sorted(path for path in source.iterdir() if path.is_dir() and path.name not in without)
    folder.mkdir()
    for path in (path for model in models for path in (model, *sorted(model.rglob("*")))):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copy(path, target) if path.suffix == ".py" else target.symlink_to(path)
    return [model.name for model in models]


def choose_port(name: str, host: str, port: int) -> int:
    """`port` if nothing listens there, a free one for 0. Raises ServingError naming the option otherwise."""
    with socket.socket() as probe:
        # As Triton does: a connection in TIME_WAIT from an earlier run does not make the port busy.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"{name} {port}: cannot listen on {host}:{port} ({error.strerror}); "
                "stop what uses it or choose another port"
            ) from error
        return int(probe.getsockname()[1])


def _entries(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]
