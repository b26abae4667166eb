"""Help and misspelt options: answered at once, and of the options that the commands really have."""

import subprocess
import sys
from collections.abc import Collection
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from kanllama_lightning import comparison, heads
from kanllama_lightning.cli import catalogue, evaluate_options, train_command
from kanllama_lightning.cli.evaluate_command import REPORTS, add_arguments
from kanllama_lightning.cli.fit import KanllamaCLI
from kanllama_lightning.cli.main import evaluate, kanllama, train
from kanllama_lightning.storage.named import arguments_of


class Parsed(Exception):
    """Carries the parser out of a command that is not to run."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, ArgumentParser]:
    """The parsers of `fit` and `validate`."""

    def carry(_: KanllamaCLI, parser: Any, __: Any) -> None:
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KanllamaCLI, "parse_arguments", carry)
        with pytest.raises(Parsed) as caught:
            train_command._run(["fit", "--model.head=kan"], started=False)
    return caught.value.args[0]._subcommands_action._name_parser_map


def offered(parser: ArgumentParser, groups: Collection[str]) -> set[str]:
    """Options that a parser shows and that can be set."""
    return {
        action.dest
        for action in parser._actions
        if action.help != "==SUPPRESS=="
        and "Link" not in type(action).__name__
        and not action.dest.endswith("help")
        and action.dest not in groups
        and action.dest not in catalogue.UNSHOWN
    }


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_the_help_of_training_lists_what_its_parser_takes(parsers, command):
    listed = {o.name for group in catalogue.fit_groups().values() for o in group}
    inner = ("model.head.", "model.optimizer.", "model.buffer.")
    shown = {name for name in listed if not name.startswith(inner)}
    classes = {"model.head", "model.optimizer", "model.buffer"}
    assert shown | classes == offered(parsers[command], ("lm", "data", "model", "trainer"))


@pytest.mark.parametrize("name", heads.__all__)
def test_the_options_of_a_head_are_its_arguments(name):
    if name == "SAEHead":
        return
    options = {o.name.removeprefix("model.head.") for o in catalogue.head_options(name)}
    arguments = arguments_of(getattr(heads, name))
    assert options == arguments.keys() - {"d_model", "transcoder"}
    assert all(o.help for o in catalogue.head_options(name))


def test_every_head_is_listed():
    assert catalogue.heads().keys() == set(heads.__all__) - {"SAEHead"}


@pytest.mark.parametrize("command", evaluate_options.PLACES)
def test_the_help_of_evaluation_lists_what_its_parser_takes(command):
    parser = ArgumentParser()
    groups = ["lm", *(kind.name for kind in REPORTS)] if command == "report" else ["lm"]
    add_arguments(parser, command)
    assert set(evaluate_options.names(command)) == offered(parser, groups) - {
        "run",
        "runs",
        "repository",
        "print_config",
    }
    assert f"(default: {comparison.MATCHED})" in evaluate_options.help_of("compare")


def test_every_option_says_what_it_is():
    groups = [catalogue.fit_groups(), *map(evaluate_options.groups, evaluate_options.SETTINGS)]
    for group in groups:
        for options in group.values():
            assert [o.name for o in options if len(o.help) < 8] == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--modle.head", "KAN"], "--modle.head: no such option. Did you mean --model.head"),
        (["fit", "--model.head.taget_l0=3"], "Did you mean --model.head.target_l0?"),
        (["fit", "--model.head.init_args.k=3"], "Latents per token are --model.head.target_l0"),
        (["plan", "--data.ctxlen", "3"], "Did you mean --data.ctx_len? See `python train.py plan"),
        (["fit", "--trainer.max_stepz", "3"], "Did you mean --trainer.max_steps?"),
        (["fit", "--config", "kan", "--embedded"], "Did you mean --config embedded?"),
        (["fit", "--batch-topk"], "Did you mean --config batch_topk?"),
        (["ft"], "error: ft: no such command; there are fit, validate, plan"),
    ],
)
def test_a_misspelt_option_is_one_line(args, message, capsys):
    assert train(args) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_misspelt_option_of_evaluation_is_one_line(capsys):
    assert evaluate(["report", "last", "--losses.tokns", "3"]) == 2
    error = capsys.readouterr().err
    assert "--losses.tokns: no such option. Did you mean --losses.tokens?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.callbacks+=LogitLens", "--trainer.callbacks.block=3"],
        ["--model.head.init_args.target_l0", "3", "--model.head.help", "KANEncoder"],
        ["--trainer.enable_checkpointing=true", "--model.lm.name=x", "--data.seed=3"],
        ["--model.optimizer.betas=[0, 0.9]", "--data.train.init_args.name=x", "-c", "x.yaml"],
    ],
)
def test_what_the_parser_has_to_judge_is_left_to_it(args):
    assert catalogue.wrong_option(args) is None


HELP = """
import sys
from kanllama_lightning.cli.main import {0}
{0}({1})
print(sorted(sys.modules))
"""


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("train", ["--help"]),
        ("train", ["plan", "--help"]),
        ("train", ["fit", "--modle.head=KAN"]),
        ("train", ["fit", "--model.head.help=KANEncoder"]),
        ("evaluate", ["report", "--help"]),
    ],
)
def test_nothing_of_size_is_loaded_for_an_answer(command, args):
    code = HELP.format(command, args)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, modules = done.stdout.strip().split("\n")
    heavy = {"torch", "lightning", "transformers", "numpy", "pandas", "jsonargparse"}
    assert not {f"'{name}'" for name in heavy if f"'{name}'" in modules}


def test_commands_say_what_they_do(capsys):
    assert train(["--help"]) == 0
    said = capsys.readouterr().out
    assert "plan " in said
    assert said.startswith("usage: python train.py COMMAND")
    assert train(["plan", "--help"]) == 0
    assert "Says what a run with these options would take" in capsys.readouterr().out
    assert train(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kanllama-lightning 0.")
    assert train([]) == 2


def test_the_installed_command_speaks_of_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kanllama", "--help"])
    assert kanllama() == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: kanllama COMMAND")
    assert "kanllama fit --config kan embedded" in said
    assert "kanllama report last" in said
    monkeypatch.setattr(sys, "argv", ["kanllama", "reprot", "last"])
    assert kanllama() == 2
    error = capsys.readouterr().err
    assert "reprot: no such command; there are fit, validate" in error
    assert "Did you mean report? See `kanllama --help`" in error
