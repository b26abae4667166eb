"""Documents say what is there: each command is tried or marked with what it needs, files exist."""

import contextlib
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from kanllama_lightning.cli import evaluate_command as evaluate
from kanllama_lightning.cli import train_command as cli
from kanllama_lightning.cli.main import evaluate as evaluate_main
from kanllama_lightning.cli.plan_command import PlanCLI
from train import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKS = {
    *("a login", "a GPU", "GPUs", "a key", "a network"),
    *("a server", "a package", "a compiler", "a run"),
}
"""What a command may need that a test has not: `# needs a login, a GPU: what it does`."""
SHELL = ("git", "cd", "mkdir", ".venv/bin/pre-commit")
"""Commands that need no test."""


class Command(NamedTuple):
    """A command of a page."""

    page: str
    line: str
    needs: set[str] | None
    """What it is marked with; None in prose, where sentences say it."""


class Parsed(Exception):  # noqa: N818
    """Parsing is done; nothing is built."""


def commands(page: str, text: str) -> list[Command]:
    """Commands of shell blocks, and in the prose those of make and of the project."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            if not line or line.startswith("# "):  # what the lines below have in common
                continue
            command, _, remark = re.sub(r"\s+#\s", "\n", line, count=1).partition("\n")
            needs = re.match(r"needs ([^:;]+)", remark)
            marks = set(needs[1].strip().split(", ")) if needs else set()
            found += [Command(page, part, marks) for part in command.split(" && ")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`((?:python (?:train|evaluate)\.py|make)\s[^`]+)`", prose)
    whole = [" ".join(line.split()) for line in inline if "..." not in line]
    return found + [Command(page, line, None) for line in whole]


def words(line: str) -> list[str]:
    """Words of a command, without variables in front; the environment's Python is Python."""
    found = shlex.split(line.replace(".venv/bin/", ""))
    while re.match(r"[A-Z_]+=", found[0]):
        found.pop(0)
    return found


COMMANDS = [c for path in PAGES for c in commands(path.name, path.read_text())]
BLOCKS = [c for c in COMMANDS if c.needs is not None]


def of(*begin: str) -> list[Command]:
    """Commands to try that begin so, each once."""
    kept = {c.line: c for c in reversed(COMMANDS) if words(c.line)[: len(begin)] == [*begin]}
    return [c for c in kept.values() if "a package" not in (c.needs or ())]


def named(command: Command) -> str:
    return f"{command.page}: {command.line}"


def test_there_are_commands() -> None:
    assert len(of("python", "train.py")) > 20
    assert len(of("python", "evaluate.py")) > 15
    readme = {c.line for c in COMMANDS if c.page == "README.md"}
    assert {"make demo", "make test"} <= readme


def test_every_command_is_tried_or_marked() -> None:
    tried = {c.line for first in ("python", "make") for c in of(first)}
    for command in BLOCKS:
        assert command.needs <= MARKS, command
        free = command.line in tried or command.line.startswith(SHELL)
        assert free or command.needs, f"neither tried nor marked with `# needs ...`: {command}"


@pytest.mark.parametrize("command", of("python", "train.py"), ids=named)
def test_commands_parse(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(parsed: cli.KanllamaCLI) -> None:
        raise Parsed(parsed.config[parsed.subcommand].lm.name)

    monkeypatch.chdir(ROOT)
    for kind in (cli.KanllamaCLI, PlanCLI):
        monkeypatch.setattr(kind, "before_instantiate_classes", stop)
    given = words(command.line)[2:]
    if any(word.endswith("help") for word in given):
        assert main(given) == 0
        return
    with pytest.raises(Parsed) as caught:
        main(given)
    if command.needs is not None:  # the weights of Llama are given to those who are logged in
        assert ("a login" in command.needs) == caught.value.args[0].startswith("meta-llama/")


@pytest.mark.parametrize("command", of("python", "evaluate.py"), ids=named)
def test_commands_of_the_record_parse(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, _, name, *more = words(command.line)
    if name == "list":
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        assert evaluate_main([name, *more]) == 0
        return
    parsed: list[str] = []
    monkeypatch.chdir(ROOT)
    for kind in evaluate.COMMANDS:
        run = lambda _, kind=kind: parsed.append(kind)  # noqa: E731
        monkeypatch.setitem(evaluate.COMMANDS, kind, run)
    assert evaluate.main([name, *more]) == 0
    assert parsed == [name]
    asked = "interpretability" in more and "--interpretability.dry_run" not in more
    assert asked == ("a key" in (command.needs or ()))


@pytest.mark.parametrize("command", of("python", "-c"), ids=named)
def test_one_liners_run(command: Command) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            exec(words(command.line)[2], {})
    finally:
        torch.set_default_device(None)
    assert float(said.getvalue().removeprefix("tensor(").rstrip(")\n")) > 0


@pytest.mark.parametrize("command", of("python"), ids=named)
def test_scripts_have_their_options(command: Command) -> None:
    _, script, *more = words(command.line)
    if script == "-m":
        script, *more = more
        script = "" if script == "pytest" else f"{script.replace('.', '/')}.py"
    if script in ("-c", "train.py", "evaluate.py"):
        return
    text = (ROOT / script).read_text() if script else ""
    for word in more if script else ():
        assert not word.startswith("--") or word in text, word
    for word in more:
        assert not word.startswith("tests/") or (ROOT / word).exists()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        word
        for command in of("make")
        for word in words(command.line)[1:]
        if "=" not in word and not word.startswith("-")
    ]
    assert len(targets) > 5
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_make_llama_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    run, saved = tmp_path / "llama", tmp_path / "llama" / "checkpoints"
    saved.mkdir(parents=True)

    def fits() -> list[str]:
        asked = ["make", "--dry-run", "llama", f"LLAMA={run}"]
        told = subprocess.check_output(asked, cwd=ROOT, text=True)
        return [line for line in told.splitlines() if "train.py fit" in line]

    (begins,) = fits()
    assert f"--run {run}" in begins
    assert "--ckpt_path" not in begins
    (saved / "step=000000001.ckpt").touch()
    (goes_on,) = fits()
    assert f"--ckpt_path {run}" in goes_on


def test_named_files_exist() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## What is where")[1]
    tree = tree.split("\n## ")[0]
    assert "exchange/" in tree
    for name in re.findall(r"\b[\w/]+\.py\b", tree):
        places = (ROOT / name, ROOT / "kanllama_lightning" / name)
        assert any(p.exists() for p in places), name
    for path in PAGES:
        for name in re.findall(r"configs/\w+\.yaml", path.read_text()):
            assert (ROOT / name).exists() or "half_topk" in name, name


def test_ci_calls_the_readmes_commands() -> None:
    assert "make lint test test-slow" in (ROOT / ".ci" / "run").read_text()


def test_the_finder_finds() -> None:
    """On made-up text, so that the tests above can fail."""
    block = "```sh\n# x\n\nmake demo  # needs a GPU, a login: x\ncd x && A=1 hf  # needs time\nls\n"
    found = commands(
        "p", block + "```\n`python train.py\nfit` or `make x` or `python evaluate.py ...`"
    )
    assert found == [
        Command("p", "make demo", {"a GPU", "a login"}),
        Command("p", "cd x", {"time"}),
        Command("p", "A=1 hf", {"time"}),
        Command("p", "ls", set()),
        Command("p", "python train.py fit", None),
        Command("p", "make x", None),
    ]
    assert words("A=1 .venv/bin/python 'a b'") == ["python", "a b"]
