"""tools/: what the set-up decides, and the closure check on fabricated environments."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from importlib.metadata import PathDistribution, distributions
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load("setup")
closure = load("closure")


# --- decisions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("glibc", "package"), [
    ((2, 35), "tritonclient==2.51.0"), ((2, 37), "tritonclient==2.51.0"),
    ((2, 38), "perf-analyzer==2."), ((2, 41), "perf-analyzer==2."), ((3, 0), "perf-analyzer==2."),
])
def test_perf_analyzer_is_chosen_by_glibc(glibc: tuple[int, int], package: str) -> None:
    source = setup.perf_analyzer_source(glibc)
    assert source.startswith(package)
    assert source.count("--hash=sha256:") == 2, "one hash for x86-64, one for aarch64"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_supported_machines_pass(machine: str) -> None:
    setup.check_machine("Linux", machine, (2, 35))


@pytest.mark.parametrize(("system", "machine", "glibc", "message"), [
    ("Darwin", "arm64", (), "Darwin on arm64.*Linux"),
    ("Windows", "AMD64", (), "Windows on AMD64.*Linux"),
    ("Linux", "riscv64", (2, 39), "riscv64"),
    ("Linux", "x86_64", (2, 31), "glibc 2.31 here.*2.35"),
    ("Linux", "x86_64", (), "no glibc here"),
])
def test_other_machines_are_told_why(system: str, machine: str, glibc: tuple[int, ...], message: str) -> None:
    with pytest.raises(setup.SetupError, match=message):
        setup.check_machine(system, machine, glibc)


def test_disk_needed_shrinks_with_what_is_there() -> None:
    setup.check_disk(free=3_100_000_000, present=0)
    setup.check_disk(free=700_000_000, present=2_400_000_000)
    with pytest.raises(setup.SetupError, match=r"0\.7 GB free .* about 3\.0 GB needed"):
        setup.check_disk(free=700_000_000, present=0)


@pytest.mark.parametrize(("output", "message"), [
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(...)'\n"
     "ERROR: No matching distribution found for torch==2.13.0", "package index cannot be reached"),
    ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
    ("looking\nERROR: Could not find a version\nERROR: No matching distribution found for x==1\n",
     "pip failed: ERROR: No matching distribution found for x==1"),
    ("  OSError: Readme file does not exist: README.md\n  [end of output]\n\nhint: See above for details.",
     "pip failed: OSError: Readme file does not exist: README.md"),
    ("", "pip failed: no output"),
])
def test_pip_failures_become_one_line(output: str, message: str) -> None:
    explained = setup.explain_pip(output)
    assert message in explained
    assert "\n" not in explained


def test_python_311_is_searched_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "sys", SimpleNamespace(version_info=(3, 13, 0), executable="/other/python"))
    shim, real = tmp_path / "shims" / "python3.11", tmp_path / "bin" / "python3.11"
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{real.parent}")
    for path, script in ((shim, "echo 'pyenv: command not found' >&2; exit 127"), (real, "echo True")):
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    assert setup.find_python() == str(real)

    real.unlink()
    with pytest.raises(setup.SetupError, match=r"Python 3\.11 is needed.*no working python3\.11"):
        setup.find_python()


def test_torch_is_the_only_pin_installed_apart() -> None:
    pins = [line for line in setup.LOCK.read_text().splitlines() if setup.is_torch(line)]
    assert pins == ["torch==2.13.0"]


# --- the stamp ------------------------------------------------------------------------------------------


def test_interrupted_setup_continues_and_a_finished_one_does_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==1.26.4\n")
    python = tmp_path / "python"
    python.touch()
    paths = {"LOCK": lock, "VENV": tmp_path, "VENV_PYTHON": python, "STAMP": tmp_path / "stamp"}
    for name, path in paths.items():
        monkeypatch.setattr(setup, name, path)
    done: list[str] = []

    def no_network() -> None:
        raise setup.SetupError("no network")

    def steps(second: object) -> tuple[tuple[str, object], ...]:
        return ("first", lambda: done.append("first")), ("second", second)

    monkeypatch.setattr(setup, "STEPS", steps(no_network))
    with pytest.raises(setup.SetupError, match="no network"):
        setup.main()
    monkeypatch.setattr(setup, "STEPS", steps(lambda: done.append("second")))
    setup.main()
    assert done == ["first", "first", "second"]
    setup.main()
    assert done == ["first", "first", "second"], "up to date, yet a step ran"
    lock.write_text("numpy==1.26.3\n")
    setup.main()
    assert done[3:] == ["first", "second"], "the lock changed, yet nothing ran"


# --- the closure ------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path):
    """Fabricates an environment: `installed("a 1.0: b>=2; c[x]")` writes real dist-info folders."""
    def make(*packages: str) -> list[PathDistribution]:
        for package in packages:
            head, _, requirements = package.partition(":")
            name, version = head.split()
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            needs = [f"Requires-Dist: {r}" for r in requirements.split("|") if r.strip()]
            info.joinpath("METADATA").write_text(
                "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *needs, ""]))
        return list(distributions(path=[str(tmp_path)]))
    return make


def test_complete_environment_has_no_problems(installed) -> None:
    environment = installed("a 1.0: b>=2", "b 2.1: c; python_version < '3'", "torch 2.13.0+cpu")
    lock = closure.read_lock("# comment\na==1.0  # why\n\nb==2.1\ntorch==2.13.0\n")
    assert closure.problems(environment, lock) == []


@pytest.mark.parametrize(("packages", "lock", "problem"), [
    (["a 1.0: b>=2"], "a==1.0", "a needs b>=2, which is not installed"),
    (["a 1.0: b>=2", "b 1.9"], "a==1.0\nb==1.9", "a needs b>=2, but b 1.9 is installed"),
    (["a 1.0"], "a==1.1", "requirements.lock needs a==1.1, but a 1.0 is installed"),
    (["a 1.0"], "a==1.0\nB_x==3", "requirements.lock needs B_x==3, which is not installed"),
    (["a 1.0: b[fast]", "b 1.0: c>3; extra == 'fast'"], "", "b needs c>3, which is not installed"),
])
def test_gaps_are_named(installed, packages: list[str], lock: str, problem: str) -> None:
    assert closure.problems(installed(*packages), closure.read_lock(lock)) == [problem]


def test_an_extra_that_nothing_asks_for_is_not_needed(installed) -> None:
    assert closure.problems(installed("a 1.0: b", "b 1.0: c>3; extra == 'fast'"), []) == []


def test_a_pin_of_another_machine_is_not_needed(installed) -> None:
    lock = closure.read_lock("a==1.0\nb==2.0; platform_machine == 'pdp11'  # why\nc==3.0; python_version > '3'")
    assert closure.problems(installed("a 1.0"), lock) == ["requirements.lock needs c==3.0, which is not installed"]


def test_the_cpu_build_of_fbgemm_stands_in_for_the_cuda_build(installed) -> None:
    assert closure.problems(installed("torchrec 1.8.0: fbgemm-gpu", "fbgemm_gpu-cpu 1.8.0"), []) == []


def test_without_either_fbgemm_the_gap_is_seen(installed) -> None:
    assert closure.problems(installed("torchrec 1.8.0: fbgemm-gpu"), []) == [
        "torchrec needs fbgemm-gpu, which is not installed"]


def test_this_environment_is_the_locked_one() -> None:
    assert closure.problems(distributions(), closure.read_lock(setup.LOCK.read_text())) == []


# --- make -----------------------------------------------------------------------------------------------


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    assert targets == set(phony[1].split())
    lines = subprocess.run(
        ["make", "-s", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split()[1] for line in lines} == targets
    assert all(len(line.split()) > 3 for line in lines), "a target without a description"
