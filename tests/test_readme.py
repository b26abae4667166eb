"""The README says what is there: its commands parse, its files and targets exist."""

import re
import shlex
from pathlib import Path

import pytest

from kanllama_lightning.cli import evaluate_command as evaluate
from kanllama_lightning.cli import train_command as cli
from kanllama_lightning.cli.plan_command import PlanCLI
from train import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"^python train\.py (.+?)(?:\s+#.*)?$", SHELL, re.MULTILINE)


RECORD = re.findall(r"^python evaluate\.py (?!list\b)(.+?)(?:\s+#.*)?$", SHELL, re.MULTILINE)


class Parsed(Exception):  # noqa: N818
    """Parsing is done; nothing is built."""


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4
    assert "make demo" in SHELL
    assert "make test" in SHELL


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: cli.KanllamaCLI) -> None:
        raise Parsed

    monkeypatch.chdir(ROOT)
    for kind in (cli.KanllamaCLI, PlanCLI):
        monkeypatch.setattr(kind, "before_instantiate_classes", stop)
    with pytest.raises(Parsed):
        main(shlex.split(command))


@pytest.mark.parametrize("command", RECORD)
def test_commands_of_the_record_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    monkeypatch.chdir(ROOT)
    for name in evaluate.COMMANDS:
        run = lambda _, name=name: parsed.append(name)  # noqa: E731
        monkeypatch.setitem(evaluate.COMMANDS, name, run)
    assert evaluate.main(shlex.split(command)) == 0
    assert parsed == [command.split()[0]]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", SHELL, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_named_files_exist() -> None:
    tree = README.split("## What is where")[1]
    for name in re.findall(r"\b[\w/]+\.py\b", tree):
        places = (ROOT / name, ROOT / "kanllama_lightning" / name)
        assert any(p.exists() for p in places), name
    for name in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).exists(), name


def test_ci_calls_the_readmes_commands() -> None:
    assert "make lint test test-slow" in (ROOT / ".ci" / "run").read_text()
