"""Is the environment complete, and is it the one that the lock describes?

    .venv/bin/python tools/closure.py requirements.lock

The lock is installed with --no-deps, so nothing else would notice a missing or conflicting dependency.
Prints one line per problem; exit code 1 if there is any. Runs in the environment that it checks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# torchrec's metadata names the CUDA build; the CPU build has the same modules under another name.
SUBSTITUTES = {"fbgemm-gpu": "fbgemm-gpu-cpu"}


def read_lock(text: str) -> list[Requirement]:
    """The pins of a lock file; comments and empty lines are skipped."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def problems(installed: Iterable[Distribution], lock: Iterable[Requirement]) -> list[str]:
    """One line per pin that is not installed as written, and per requirement that nothing installed meets.

    Requirements of extras count where an installed package asks for that extra.
    """
    have = {str(canonicalize_name(d.name)): d for d in installed}
    here = (pin for pin in lock if not pin.marker or pin.marker.evaluate())
    found = {line for pin in here for line in _unmet(pin, have, "requirements.lock")}

    todo = [(name, "") for name in have]  # (package, extra); the empty extra is the package itself
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        for requirement in map(Requirement, have[name].requires or []):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            found |= _unmet(requirement, have, name)
            target = _target(requirement)
            new = {(target, e) for e in requirement.extras if target in have} - seen
            seen |= new
            todo.extend(new)
    return sorted(found)


def _target(requirement: Requirement) -> str:
    name = str(canonicalize_name(requirement.name))
    return SUBSTITUTES.get(name, name)


def _unmet(requirement: Requirement, have: dict[str, Distribution], wanted_by: str) -> set[str]:
    name = _target(requirement)
    wanted = f"{wanted_by} needs {requirement.name}{requirement.specifier}"
    if name not in have:
        return {f"{wanted}, which is not installed"}
    if not requirement.specifier.contains(have[name].version, prereleases=True):
        return {f"{wanted}, but {name} {have[name].version} is installed"}
    return set()


if __name__ == "__main__":
    lines = problems(distributions(), read_lock(Path(sys.argv[1]).read_text()))
    print("\n".join(lines))
    sys.exit(1 if lines else 0)
