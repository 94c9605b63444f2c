"""What `make bench-hot` runs: progress and tables to stderr; the JSON document is the last line of stdout."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.hot import __doc__ as question
from benchmarks.hot.measure import Bench, HotOptions
from benchmarks.hot.report import markdown, write_report
from benchmarks.program import say
from sightline.errors import SightlineError


def parse(argv: Sequence[str] | None) -> HotOptions:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hot", description=(question or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it works, measures little")
    default: Any
    for name, kind, default, what in (
        ("items", int, HotOptions.items, "in the catalogue"),
        ("users", int, HotOptions.users, "in the catalogue"),
        ("candidates", int, HotOptions.candidates, "items per request"),
        ("limit", float, HotOptions.limit, "ms that the 99th percentile may have"),
        ("rounds", int, HotOptions.rounds, "over all contenders; the report has their medians"),
        ("seconds", float, HotOptions.seconds, "of every measurement"),
        ("out", Path, HotOptions.out, "folder for data, steps and reports"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=f"{what} (default {default})", default=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=argparse.SUPPRESS,
                        help=f"contenders: {', '.join(HotOptions.only)}")  # fmt: skip
    given = vars(parser.parse_args(argv))
    if "only" in given:
        given["only"] = tuple(given["only"])
    quick = given.pop("quick")
    assert set(given) <= {one.name for one in fields(HotOptions)}
    return HotOptions.quick(**given) if quick else HotOptions(**given)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, _terminated)
    say((question or "").strip() + "\n")
    try:
        options = parse(argv)
        bench = Bench(options, lambda text: say(f"{datetime.now():%H:%M:%S}  {text}"))
        document = bench.run()
        folder = options.out / datetime.now().strftime("%Y%m%d-%H%M%S")
        document["report"] = str(folder)
        write_report(folder, document)
        bench.finish()
    except SightlineError as error:
        say(f"bench-hot: {error}")
        return 1
    except KeyboardInterrupt:
        say("bench-hot: interrupted; run it again, it goes on")
        return 130
    say("\n" + markdown(document))
    for found in document["contenders"].values():
        del found["probes"]  # a line for every measurement; the report has them
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
