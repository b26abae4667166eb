"""Commands as people type them: what is understood, and what is answered in one line."""

import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from kanllama_lightning.cli import evaluate_command, evaluate_options, main, train_command
from kanllama_lightning.cli.command_line import CommandLine, read
from kanllama_lightning.cli.fit import told_of
from kanllama_lightning.cli.kinds import NotUnderstood, in_words
from kanllama_lightning.heads import PCA, KANEncoder

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def table(name: str) -> list[tuple[str, str]]:
    """The rows of a table of two columns."""
    lines = (HERE / name).read_text().splitlines()[1:]
    return [(a, b) for a, b in (line.split("\t") for line in lines)]


WRONG, RIGHT = table("wrong_forms.tsv"), table("right_forms.tsv")


def load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text()) or {}


def meant(*typed: str) -> CommandLine:
    return read(["fit", *typed], load)


def words(typed: str) -> list[str]:
    lexer = shlex.shlex(typed, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    lexer.quotes = "'"
    return list(lexer)


@pytest.mark.parametrize(("command", "said"), WRONG, ids=[command for command, _ in WRONG])
def test_a_wrong_form_is_one_line_with_a_remedy(command, said, monkeypatch, capsys):
    def started(_: Any) -> int:
        raise AssertionError("the command was started")

    monkeypatch.setattr(train_command, "main", started)
    monkeypatch.setattr(evaluate_command, "main", started)
    program, *args = words(command)
    began = time.process_time()
    code = (main.train if program == "train.py" else main.evaluate)(args)
    assert time.process_time() - began < 2
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert not printed.out


def test_there_are_enough_wrong_forms():
    assert len({command for command, _ in WRONG}) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "fit --config kan --lr 3", "fit --config kan --x y"])
def test_a_process_says_so_in_two_seconds(command):
    """Of a processor's time: others may be busy beside it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = [sys.executable, str(ROOT / "train.py"), *command.split()]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(("typed", "said"), RIGHT, ids=[typed for typed, _ in RIGHT])
def test_values_are_read_as_people_type_them(typed, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("w1\n")
    (tmp_path / "b.txt").write_text("w1 w2\n")
    name, _, value = said.partition("=")
    assert meant("--config", "kan", *words(typed)).options == [(name, value)]


def test_a_config_may_say_the_same(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "model: {tokens: 50M, head: {init_args: {alpha_aux: 1/32}}}\n"
        "data: {val_fraction: 5%, append_eos: 'no'}\nlm: {dtype: bf16}\n"
    )
    line = meant("--config", "kan", str(own))
    said = line.trees[-1]
    assert said["model"]["tokens"] == 50_000_000
    assert said["data"] == {"val_fraction": 0.05, "append_eos": False}
    assert said["lm"]["dtype"] == "bfloat16"
    assert line.head["init_args"]["alpha_aux"] == 1 / 32
    own.write_text("model: {tokens: 50X}\n")
    with pytest.raises(NotUnderstood, match=r"model.tokens 50X: .*own.yaml"):
        meant("--config", "kan", str(own))


def head(*typed: str) -> dict[str, Any]:
    found: dict[str, Any] = meant(*typed).head
    return {"class_path": found["class_path"]} | found["init_args"]


ON_EMBEDDED = {"class_path": "KANEncoder", "d_sae": None, "target_l0": 16}


@pytest.mark.parametrize(
    "typed",
    [
        "--config kan embedded",
        "--config embedded kan",
        "--config embedded --config kan",
        "--config=kan,embedded",
        "--config embedded --model.head kan",
        "--model.head KANEncoder --config embedded",
        "--model.head kanencoder --config embedded",
        "--model.head.class_path KANEncoder --config embedded",
    ],
)
def test_files_and_options_in_any_order(typed):
    assert head(*typed.split()) == ON_EMBEDDED


@pytest.mark.parametrize(
    "typed",
    [
        "OWN embedded kan",
        "embedded kan OWN",
        "kan OWN embedded",
        "kan embedded --model.head.target_l0 8",
        "kan --model.head.init_args.target_l0=8 --config embedded",
    ],
)
def test_what_is_said_of_a_head_counts_before_what_an_overlay_of_a_model_says(typed, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("model: {head: {init_args: {target_l0: 8}}}\n")
    given = typed.replace("OWN", str(own)).split()
    assert head("--config", *given) == ON_EMBEDDED | {"target_l0": 8}


def test_the_command_line_counts_after_all_files():
    line = meant("--model.tokens", "40k", "--config", "kan", "embedded")
    assert line.for_parser()[-1] == "--model.tokens=40000"


def test_a_config_of_a_head_brings_its_arguments_and_its_optimizer():
    line = meant("--model.head", "gated", "--config", "embedded")
    assert line.head["class_path"] == "Gated"
    assert line.trees[-1]["model"]["optimizer"]["init_args"] == {"betas": [0.0, 0.999]}
    assert head("--model.head", "kan-relu-dense-latent")["latent_hidden"] is True


def test_one_of_several_heads_is_changed():
    given = "--config side_by_side --model.head.kan.target_l0 8 --model.head.kan_l0_32.lr 1e-3"
    given += " --model.head.heads.batch_topk.init_args.d_sae 2k --model.head.kan.kan_args.order 2"
    heads = head(*given.split())["heads"]
    kan = {"target_l0": 8, "kan_args": {"order": 2}}
    assert heads["kan"] == {"class_path": "KANEncoder", "init_args": kan}
    assert heads["kan_l0_32"]["lr"] == 0.001
    assert heads["batch_topk"]["init_args"] == {"d_sae": 2000}
    assert heads["batch_topk_l0_32"]["init_args"] == {"target_l0": 32}


@pytest.mark.parametrize(
    ("typed", "names"),
    [("TopK,KANEncoder", ["TopK", "KANEncoder"]), ("topk,kan", ["topk", "kan"]),
     ("{a: topk, b: KANEncoder}", ["a", "b"]), ("[topk, kan]", ["topk", "kan"])],
)  # fmt: skip
def test_heads_are_listed_as_people_list_them(typed, names):
    heads = head("--model.head", "SideBySide", f"--model.head.heads={typed}")["heads"]
    assert list(heads) == names
    assert [spec["class_path"] for spec in heads.values()] == ["TopK", "KANEncoder"]


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("report last --png --again", "report last --png=true --again=true"),
        ("report last --reports a,b", "--reports a: no such report"),
        ("report last --reports losses,latents", "report last --reports losses latents"),
        ("report last --reports [losses,latents]", "report last --reports losses latents"),
        ("report --reports losses latents last", "report last --reports losses latents"),
        ("report last --documents 2k --wandb no", "report last --documents=2000 --wandb=false"),
        ("try last --text hi --steer 12:8,13=4", "try last --text=hi --steer 12=8 13=4"),
        ("report last --lm.untrained", "report last --lm.untrained=true"),
        ("report last --dtype bf16", "report last --dtype=bfloat16"),
    ],
)
def test_evaluation_is_read_as_people_type_it(typed, read):
    if ": " in read:
        with pytest.raises(NotUnderstood, match=read):
            evaluate_options.read(typed.split())
    else:
        assert evaluate_options.read(typed.split()) == read.split()


@pytest.mark.parametrize("line", ["train plan", "train fit", "evaluate report last"])
def test_a_pipe_for_a_config_is_refused(line, tmp_path, capsys):
    """Nobody may ever write into it."""
    os.mkfifo(tmp_path / "own.yaml")
    program, *command = line.split()
    run = {"train": train_command.main, "evaluate": evaluate_command.main}[program]
    assert run([*command, "--config", str(tmp_path / "own.yaml")]) == 2
    assert "own.yaml: " in capsys.readouterr().err


def test_a_run_says_first_what_it_trains():
    head = KANEncoder(d_model=16, d_sae=None, target_l0=4)
    said = told_of("kan", head, {"lr": 0.003})
    assert said == "head kan: KANEncoder, 128 latents on 16 coordinates, L0 4, learning rate 0.003"
    assert told_of("", PCA(16, 8), {}).endswith("learning rate that of the optimizer")


def test_no_type_of_python_is_shown():
    message = (
        'Parser key "trainer.deterministic": Does not validate against any of the Union subtypes '
        "Subtypes: [<class 'bool'>, typing.Literal['warn'], <class 'NoneType'>] Errors: - Expected "
        "a <class 'bool'> Given value type: <class 'str'> Given value: 1/0"
    )
    assert in_words(message) == "--trainer.deterministic 1/0: must be true or false or warn or none"
    message = (
        'Parser key "model.optimizer": Parser key "betas": Expected a tuple with 2 elements. x'
    )
    assert in_words(message) == "--model.optimizer.betas: must be a tuple with 2 elements"
    assert in_words("something else") is None
