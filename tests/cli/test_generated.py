"""Command lines drawn at random: each is planned, or refused in a line without a traceback."""

import random
import re

import pytest

from kanllama_lightning.cli import catalogue, evaluate_command, evaluate_options
from kanllama_lightning.cli.chosen_head import arguments, head_configs
from kanllama_lightning.cli.command_line import annotations
from kanllama_lightning.cli.main import evaluate, train

JUNK = (
    *("0", "-1", "1", "2", "7", "50M", "5%", "1e6", "1e400", "nan", "-inf", "none", "true", "no"),
    *("", "abc", "a,b", "[1,2]", "{a: 1}", "{", "[", "]", "1/0", "1/32", "1h", "auto", "9" * 30),
    *("ü", "'", '"', ":", ":x", "*", "~", "0.5", "bf16", "/nowhere/x.jsonl", "README.md", "- 1"),
    *("README.md:text", "model.layers.1.mlp", "{class_path: Nothing}", "{class_path: 3}", "\x00"),
    *("a b", "1,000", "x=1", "!!python/name:os.system", "&a [*a]", "LocalCorpus", "os.system"),
)
RIGHT = {
    "int": ("1", "2", "4k", "64", "1_000", "1e3", "700"),
    "float": ("0.5", "5%", "1/32", "1e-3", "2", "0.9"),
    "bool": ("yes", "no", "0", "true"),
    "str": ("abc", "null", "model.layers.2", "embedded", "bf16", "32", "simple", "cpu", "auto"),
    "Corpus": ("README.md", "README.md:text", "none", "README.md,LOG.md", "StoryWorldCorpus"),
}
"""Values of each kind, which may still be wrong for the option."""
HEADS = (*head_configs(), *catalogue.heads(), "KAN", "kann", "os.path", "{class_path: TopK}")
BARE = {"print_config", "help", "config", "run"}
RAW = re.compile(r"Traceback|<class '|typing\.|Union|NoneType|Subtypes")
"""What no line for people holds."""


def typed(rng: random.Random) -> list[str]:
    """A command line on the embedded model: a head, and up to four options."""
    config = rng.choice([*head_configs()])
    own = arguments(str(head_configs()[config]["class_path"])) or {}
    kinds = {name: kind for name, kind in annotations().items() if "model.head." not in name}
    kinds |= {f"model.head.{name}": kind for name, kind in own.items()}
    names = [name for name in kinds if name not in BARE]
    given = [] if rng.random() < 0.9 else ["--model.head", rng.choice(HEADS)]
    for _ in range(rng.choice((1, 2, 3, 4))):
        name = rng.choice(names)
        of_kind = [v for kind, some in RIGHT.items() if kind in kinds[name] for v in some]
        value = rng.choice(of_kind if of_kind and rng.random() < 0.7 else JUNK)
        if rng.random() < 0.04:
            name = name.replace(rng.choice(name), rng.choice("abc_."), 1)
        given += [f"--{name}={value}"] if rng.random() < 0.5 else [f"--{name}", *value.split()]
    files = ["--config", "embedded", config]
    return [*files, *given] if rng.random() < 0.5 else [*given, *files]


def line_of(capsys: pytest.CaptureFixture[str], code: int, args: list[str]) -> None:
    """Judge what a command said."""
    said = capsys.readouterr()
    assert code in (0, 2), args
    assert not RAW.search(said.err), (args, said.err)
    if code == 2:
        errors = [one for one in said.err.splitlines() if one.startswith("error: ")]
        assert len(errors) == 1, (args, said.err)


@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(i, marks=pytest.mark.slow) for i in range(12, 300))]
)
def test_a_generated_command_line_is_planned_or_refused(seed, capsys):
    args = ["plan", *typed(random.Random(seed))]
    line_of(capsys, train(args), args)


def test_generated_commands_of_evaluation_are_read_or_refused(capsys, monkeypatch):
    monkeypatch.setattr(evaluate_command, "main", lambda _: 0)
    rng = random.Random(0)
    for _ in range(300):
        command = rng.choice(["report", "compare", "try"])
        args = [command, "last"]
        for name in rng.sample(evaluate_options.names(command), 2):
            args += [f"--{name}", *rng.choice(JUNK).split()]
        line_of(capsys, evaluate(args), args)
