"""The command line as a whole: what it costs to start, what its help says of things that are defined elsewhere."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sightline import cli
from sightline.cli import app

ROOT = Path(__file__).parents[2]


def test_help_imports_nothing_heavy() -> None:
    """A command imports what it needs when it runs, so that help and a mistyped option are answered at once."""
    code = """
import sys
from typer.testing import CliRunner
from sightline.cli import app
assert CliRunner().invoke(app, ["train", "ranker", "--help"]).exit_code == 0
print({"torch", "transformers", "pyarrow", "numpy", "tritonclient", "grpc", "matplotlib"} & sys.modules.keys())
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_every_command_is_in_the_program() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    for name in ("data", "store", "train", "caption", "build", "release", "serve", "doctor", "rank", "events",
                 "nearline", "tokens", "evaluate", "quality", "explain", "bench", "demo"):  # fmt: skip
        assert re.search(rf"^\W*{name}\s", shown, re.MULTILINE), name


def test_the_help_of_arms_and_models_names_those_that_exist() -> None:
    from sightline.commands import evaluate, train
    from sightline.tokens import KINDS
    from trainer.ranker import ARMS
    from trainer.ranker_model import MODELS

    def named(command: object, option: str) -> set[str]:
        text = help_of(command, option)
        return set(re.findall(r"\w+", text.split(";")[0].split(":")[-1].rstrip(".")))

    assert named(train.train_ranker, "arm") == set(ARMS)
    assert named(train.train_ranker, "model") == named(evaluate.evaluate_content, "model") == set(MODELS)
    assert named(evaluate.tokens, "family") == set(KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "--root", "{}/full"], r"error: --root .*/full: is emptied first, but holds something else than"),
        (["quality", "--root", "{}/full/mine"], r"error: .*/full/mine: Not a directory"),
        (["build", "plan", "--checkpoint", "{}/damaged"], r"error: --checkpoint .*/damaged: one of its files cannot"),
        (["build", "plan", "--checkpoint", "llava-1.5-7b", "--ranker", "{}"], r"error: --ranker .*: expected a folder"),
        (["serve", "--grpc-port", "9000", "--http-port", "9000"], r"error: --grpc-port 9000, .*: expected three"),
        (["explain", "--user", "7", "--item", "5", "--out", "x.svg"], r"error: --out x\.svg: expected .*\.png"),
        (["explain", "--user", "7", "--item", "5", "--caption", "x", "--context", "hour=--5"], "error: --context: exp"),
        (["serve", "--grpc-port", "70000"], "(?s).*--grpc-port"),
    ],
)  # fmt: skip
def test_a_mistake_ends_in_a_line_and_changes_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    for folder, file in (("full", "mine"), ("damaged", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("of great value")
    command = [sys.executable, "-m", "sightline.cli", *(word.format(tmp_path) for word in arguments)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode in (1, 2)
    assert re.match(message, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "full" / "mine").read_text() == "of great value"


def test_ctrl_c_is_acknowledged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = typer.Typer()

    @program.command()
    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", program)
    monkeypatch.setattr(sys, "argv", ["sightline"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def help_of(command: object, option: str) -> str:
    """Of a command's option, as the source has it."""
    hints = inspect.get_annotations(command, eval_str=True)  # type: ignore[arg-type]
    (described,) = (value for value in hints[option].__metadata__ if isinstance(value, typer.models.OptionInfo))
    assert described.help is not None
    return described.help
