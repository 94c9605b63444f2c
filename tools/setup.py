"""Make the environment: `.venv` from requirements.lock, and perf_analyzer in `.tools` for the benchmarks.

    python3 tools/setup.py        (what `make setup` runs)

Standard library only, and written for any Python 3.8+, so that a wrong Python gets a message instead of a
traceback. A stamp is written last: an interrupted set-up continues on the next call, and one that is up to
date does nothing.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "sightline-setup"
PERF_ANALYZER = ROOT / ".tools" / "perf_analyzer"
PROJECTS = ("client", ".")

PYTHON = (3, 11)
MACHINES = ("x86_64", "aarch64")
GLIBC = (2, 35)  # what nvidia-pytriton's tritonserver is built for
DISK_BYTES = 3_000_000_000
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# perf_analyzer: from 2.58 on PyPI has it, for glibc 2.38 and later. Older systems run the one that
# tritonclient's 2.51 wheel carried; the two libraries that it does not carry come with nvidia-pytriton.
PERF_ANALYZER_NEW = (
    "perf-analyzer==2.60.0"
    " --hash=sha256:23ef56b107ae9233e5cf09fbdf508dd9b936a52f1bae2f63f53c8117087b3f25"  # x86-64
    " --hash=sha256:c2ece0adb7760ea1abc258222d80bf8e367fa9639401406b96da2c9b55131d29"  # aarch64
)
PERF_ANALYZER_OLD = (
    "tritonclient==2.51.0"
    " --hash=sha256:c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52"  # x86-64
    " --hash=sha256:ee6f5a508409f6c95069f4d77d34e97bef84fb4a1aedb5d82ad0ad311ad128d5"  # aarch64
)


class SetupError(Exception):
    """Something that the person at the keyboard can mend; the message is one line and says how."""


# --- decisions: pure, tested without a network --------------------------------------------------------


def check_machine(system: str, machine: str, glibc: tuple[int, ...]) -> None:
    """Raise SetupError where tritonserver cannot run."""
    if system != "Linux" or machine not in MACHINES:
        raise SetupError(f"this is {system} on {machine}; tritonserver needs Linux on x86-64 or aarch64. "
                         "Use such a machine, or a container on one.")
    if glibc < GLIBC:
        got = "no glibc" if not glibc else "glibc " + ".".join(map(str, glibc))
        raise SetupError(f"{got} here; tritonserver needs glibc 2.35 or later: Ubuntu 22.04, Debian 12 "
                         "or newer.")


def check_disk(free: int, present: int) -> None:
    """Raise SetupError unless `free` bytes hold the environment, of which `present` are there already."""
    needed = max(DISK_BYTES - present, 200_000_000)
    if free < needed:
        raise SetupError(f"{free / 1e9:.1f} GB free in {ROOT}, about {needed / 1e9:.1f} GB needed. "
                         "Free some disk and run it again.")


def perf_analyzer_source(glibc: tuple[int, ...]) -> str:
    """The pinned requirement whose wheel carries a perf_analyzer that this glibc runs."""
    return PERF_ANALYZER_NEW if glibc >= (2, 38) else PERF_ANALYZER_OLD


def explain_pip(output: str) -> str:
    """One line from pip's output: why it failed and what to do."""
    if "No space left on device" in output:
        return "the disk is full. Free some space (about 3 GB in all) and run it again; it continues."
    signs = ("NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ProxyError", "SSLError",
             "name resolution", "Connection refused", "Network is unreachable")
    if any(sign in output for sign in signs):
        return ("the package index cannot be reached. Connect, or set PIP_INDEX_URL or PIP_FIND_LINKS to "
                "a mirror, and run it again; it continues.")
    errors = [line.strip() for line in output.splitlines() if re.match(r"\s*(ERROR|\w+Error): ", line)]
    return f"pip failed: {errors[-1] if errors else last_line(output)}"


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1]


def setup_key() -> str:
    """Changes when anything changes that the environment is made from."""
    digest = hashlib.sha256(f"{ROOT} {PYTHON} {platform.machine()} {glibc_version()}".encode())
    projects = [ROOT / project / "pyproject.toml" for project in PROJECTS]
    for path in (LOCK, *projects, *sorted((ROOT / "tools").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the machine ----------------------------------------------------------------------------------------


def glibc_version() -> tuple[int, ...]:
    """(2, 36), or () where the C library is not glibc."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else ()


def find_python() -> str:
    """A Python 3.11: the running one, or the first that answers on PATH."""
    if sys.version_info[:2] == PYTHON:
        return sys.executable
    probe = "import sys; print(sys.version_info[:2] == (3, 11))"
    for folder in os.get_exec_path():
        candidate = shutil.which("python3.11", path=folder)
        # A pyenv shim is on PATH whether or not it leads anywhere, so the answer counts, not the file.
        if candidate and run([candidate, "-c", probe]).stdout.strip() == "True":
            return candidate
    raise SetupError(f"Python 3.11 is needed; this is {platform.python_version()} and PATH has no working "
                     "python3.11. Install it (Debian, Ubuntu: python3.11 and python3.11-venv), or name one: "
                     "make setup PYTHON=/path/to/python3.11")


def run(command: list) -> subprocess.CompletedProcess:
    """Run quietly; stdout and stderr come back together."""
    return subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, check=False)


def pip(*arguments: object) -> None:
    result = run([VENV_PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])
    if result.returncode != 0:
        raise SetupError(explain_pip(result.stdout))


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3):
            return True
    except OSError:
        return False


# --- steps: each leaves alone what is already right -------------------------------------------------------


def make_venv() -> None:
    """`.venv` of a Python 3.11 with pip. One that was moved here, or is of another Python, is made anew."""
    config = VENV / "pyvenv.cfg"
    ours = config.exists() and "version = 3.11" in config.read_text() and str(VENV) in config.read_text()
    if ours and run([VENV_PYTHON, "-m", "pip", "--version"]).returncode == 0:
        return
    result = run([find_python(), "-m", "venv", "--clear", VENV])
    if result.returncode != 0:
        raise SetupError(f"the virtual environment could not be made: {last_line(result.stdout)}. On "
                         "Debian and Ubuntu, install python3.11-venv; then run it again.")


def install_packages() -> None:
    """The lock without torch."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(line for line in LOCK.read_text().splitlines(keepends=True) if not is_torch(line))
        file.flush()
        pip("install", "--quiet", "--no-deps", "-r", file.name)


def is_torch(line: str) -> bool:
    return line.startswith("torch==")


def install_torch() -> None:
    """torch's CPU build.

    PyPI's x86-64 wheel is the CUDA build, whose libraries the lock leaves out, so the vendor's CPU index goes
    first; behind a firewall the configured index has to have a CPU build.
    """
    pin = next(filter(is_torch, LOCK.read_text().splitlines())).strip()
    probe = f"import torch; assert torch.__version__.split('+')[0] == {pin.split('==')[1]!r}"
    if run([VENV_PYTHON, "-c", probe]).returncode == 0:
        return
    index = ["--index-url", TORCH_CPU_INDEX] if reachable(f"{TORCH_CPU_INDEX}/torch/") else []
    pip("install", "--quiet", "--no-deps", "--force-reinstall", *index, pin)
    check = run([VENV_PYTHON, "-c", probe])
    if check.returncode != 0:
        raise SetupError(f"torch is installed but does not import: {last_line(check.stdout)}. Probably the "
                         f"CUDA build came. Make {TORCH_CPU_INDEX} reachable, or put the CPU wheel into a "
                         "folder and set PIP_FIND_LINKS to it, and run it again.")


def install_project() -> None:
    for project in PROJECTS:
        pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ROOT / project)


def check_closure() -> None:
    result = run([VENV_PYTHON, ROOT / "tools" / "closure.py", LOCK])
    if result.returncode != 0:
        raise SetupError("the environment does not match requirements.lock: "
                         + "; ".join(result.stdout.strip().splitlines()))


def install_perf_analyzer() -> None:
    """`.tools/perf_analyzer/perf_analyzer`: a wrapper that finds its libraries, around the pinned binary."""
    requirement = perf_analyzer_source(glibc_version())
    wrapper = PERF_ANALYZER / "perf_analyzer"
    pinned = PERF_ANALYZER / "requirement.txt"
    if pinned.exists() and pinned.read_text() == requirement:
        return
    shutil.rmtree(PERF_ANALYZER, ignore_errors=True)
    PERF_ANALYZER.mkdir(parents=True)
    asked = PERF_ANALYZER / "asked.txt"
    asked.write_text(requirement)
    pip("download", "--quiet", "--no-deps", "--require-hashes", "-r", asked, "-d", PERF_ANALYZER)
    (wheel,) = PERF_ANALYZER.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("bin/perf_analyzer"))
        binary = PERF_ANALYZER / "perf_analyzer.bin"
        binary.write_bytes(archive.read(member))
    wheel.unlink()
    libraries = VENV / "lib" / "python3.11" / "site-packages" / "nvidia_pytriton.libs"
    for hashed, name in (("libcudart-*.so.12.*", "libcudart.so.12"), ("libb64-*.so.0d", "libb64.so.0d")):
        (source,) = glob.glob(str(libraries / hashed))
        shutil.copyfile(source, PERF_ANALYZER / name)
    wrapper.write_text('#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\n'
                       'LD_LIBRARY_PATH="$here" exec "$here/perf_analyzer.bin" "$@"\n')
    for path in (wrapper, binary):
        path.chmod(0o755)
    check = run([wrapper, "--version"])
    if check.returncode != 0:
        print(f"  perf_analyzer does not run here, nor will `make bench`: {last_line(check.stdout)}")
        return
    asked.rename(pinned)


STEPS = (
    ("virtual environment", make_venv),
    ("packages (first time: 400 MB to download)", install_packages),
    ("torch (first time: 200 MB to download)", install_torch),
    ("this project", install_project),
    ("check that nothing is missing", check_closure),
    ("perf_analyzer", install_perf_analyzer),
)


def main() -> None:
    key = setup_key()
    if VENV_PYTHON.exists() and STAMP.exists() and STAMP.read_text() == key:
        return
    check_machine(platform.system(), platform.machine(), glibc_version())
    present = sum(path.lstat().st_size for path in VENV.rglob("*")) if VENV.exists() else 0
    check_disk(shutil.disk_usage(ROOT).free, present)
    started = time.monotonic()
    for number, (name, step) in enumerate(STEPS, start=1):
        print(f"setup {number}/{len(STEPS)}: {name}", flush=True)
        step()
    STAMP.write_text(key)
    print(f"setup: ready after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
    except KeyboardInterrupt:
        sys.exit("setup: interrupted; run it again, it continues.")
