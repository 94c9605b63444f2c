"""All processes of one server, found by a mark in their environment: processor time, memory, who accepted what.

Parent ids would not do: servers start daemons that end up as children of init.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

MARK = "SIGHTLINE_BENCH_MARK"
_PROC = Path("/proc")
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Tree:
    """The processes whose environment, as they were started, carries the mark."""

    mark: str = field(default_factory=lambda: uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        """What to start the server with."""
        return {MARK: self.mark}

    def pids(self) -> list[int]:
        """Ascending."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in _PROC.iterdir():
            if folder.name.isdigit():
                try:
                    if wanted in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:  # it has ended, or is somebody else's
                    continue
        return sorted(found)

    def cpu(self) -> dict[int, float]:
        """Process → seconds of user and system time so far."""
        found = {}
        for pid, text in self._read("stat"):
            fields = text.rpartition(")")[2].split()
            found[pid] = (int(fields[11]) + int(fields[12])) / _TICK  # utime, stime: fields 14 and 15 of proc(5)
        return found

    def cpu_since(self, before: dict[int, float]) -> float:
        """Seconds spent since `cpu`, but for processes that have ended meanwhile."""
        return sum(seconds - before.get(pid, 0.0) for pid, seconds in self.cpu().items())

    def memory_mb(self) -> dict[str, float]:
        """`rss`: resident, summed, so that shared pages count once per process; `pss`: shared pages are shared out."""
        sums = {"Rss": 0, "Pss": 0}
        for _, text in self._read("smaps_rollup"):
            for line in text.splitlines():
                name, _, value = line.partition(":")
                if name in sums:
                    sums[name] += int(value.split()[0])
        return {name.lower(): round(kilobytes / 1024, 1) for name, kilobytes in sums.items()}

    def owners(self, server_port: int, client_ports: Sequence[int]) -> list[int | None]:
        """Which process has accepted the connection from each client port; None: nobody of ours, or not yet."""
        inodes = dict(_sockets(server_port))
        holders: dict[str, int] = {}
        for pid in self.pids():
            try:
                for descriptor in os.scandir(_PROC / str(pid) / "fd"):
                    target = os.readlink(descriptor.path)
                    if target.startswith("socket:["):
                        holders.setdefault(target[8:-1], pid)
            except OSError:
                continue
        return [holders.get(inodes.get(port, "")) for port in client_ports]

    def end(self, seconds: float = 3.0) -> None:
        """Ask all to end, then make them."""
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
            until = time.monotonic() + patience
            for pid in self.pids():
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            while self.pids() and time.monotonic() < until:
                time.sleep(0.05)

    def _read(self, name: str) -> Iterator[tuple[int, str]]:
        for pid in self.pids():
            try:
                yield pid, (_PROC / str(pid) / name).read_text()
            except OSError:
                continue


def _sockets(server_port: int) -> Iterator[tuple[int, str]]:
    """Client port and inode of every connection that a server on the port has accepted."""
    for table in ("tcp", "tcp6"):
        for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == server_port:
                yield int(fields[2].rpartition(":")[2], 16), fields[9]
