"""What somebody typed after `train.py`: files, options and head, whatever their order.

Nothing of size is imported, so that mistakes are answered at once. All files and options are read
first, the head is chosen, and only then do its arguments mean something.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kanllama_lightning.cli import catalogue
from kanllama_lightning.cli.allowed import problem
from kanllama_lightning.cli.chosen_head import HeadOption, chosen_head, config_of, shipped_configs
from kanllama_lightning.cli.help import no_such_option
from kanllama_lightning.cli.kinds import NotUnderstood, in_tree, of_column, plain, typed

Load = Callable[[Path], dict[str, Any]]
BASE = catalogue.ROOT / "configs" / "base.yaml"
LINKED = {
    "model.lm": "lm",
    "model.seed": "seed_everything",
    "data.seed": "seed_everything",
    "data.tokenizer": "lm.name",
    "model.head.init_args.d_model": "lm.name (the model's width)",
    "model.head.d_model": "lm.name (the model's width)",
    "model.head.init_args.transcoder": "lm.input_point (where a transcoder reads)",
    "model.head.transcoder": "lm.input_point (where a transcoder reads)",
    "model.head.init_args.seed": "seed_everything, or head_seed for the head alone",
    "model.head.seed": "seed_everything, or head_seed for the head alone",
}
"""Arguments that follow from another one; setting them would be ignored silently."""
WANDB = "kanllama_lightning.runs.wandb_logger.RunLogger"
FREE = ("print_config", "weights_only", "verbose", "help")
"""Options that need no value, or mean nothing here."""


class CommandLine(NamedTuple):
    """A command as it is meant."""

    command: str
    files: list[str]
    """Paths of configs, in their order."""
    options: list[tuple[str, str]]
    """Names and values, as the parser takes them; those of the head apart."""
    head_options: list[HeadOption]
    trees: list[dict[str, Any]]
    """What the files say, values as the parser takes them; the first is `configs/base.yaml`."""
    head: Any
    """`model.head`: class and arguments; None where the trees say something else there."""

    def canonical(self) -> list[str]:
        """The same command, typed as the parser would have it."""
        head = [f"--{name}={' '.join(words)}" for name, words in self.head_options]
        return [self.command, *(f"--config={file}" for file in self.files), *head, *self._typed()]

    def for_parser(self) -> list[str]:
        """Arguments of the parser: the base, the files, the head, then the options."""
        trees = [_without_head(tree) for tree in self.trees]
        if self.head is not None:
            trees.append({"model": {"head": self.head}})
        said = [yaml.safe_dump(tree, sort_keys=False) for tree in trees if tree]
        return [self.command, *(f"--config={text}" for text in said), *self._typed()]

    def _typed(self) -> list[str]:
        return [f"--{name}={value}" if value else f"--{name}" if name in FREE else f"--{name}="
                for name, value in self.options]  # fmt: skip


@cache
def annotations() -> Mapping[str, str]:
    """What options of training may be, by their names: annotations of their arguments."""
    known = {o.name: o.type for group in catalogue.fit_groups().values() for o in group}
    return known | {f"trainer.{k}": v for k, v in catalogue.trainer_arguments().items()}


def read(given: Sequence[str], load: Load) -> CommandLine:
    """What was meant.

    Args:
        given: The command and what follows it.
        load: Reads a config file.

    Raises:
        NotUnderstood: A name or a value is wrong.
    """
    command, *rest = given
    files: list[str] = []
    options: list[tuple[str, str]] = []
    head_options: list[HeadOption] = []
    for name, words, joined in spelt(rest):
        if name in ("config", "c"):
            found = [_config(one) for word in words for one in _listed(word)]
            if not found:
                raise NotUnderstood("--config: which? Put a name such as kan, or a file, behind it")
            files += found
            continue
        plus, bare = name.endswith("+"), name.removesuffix("+")
        _refuse_unknown(bare, command)
        if bare == "model.head" or bare.startswith("model.head."):
            head_options.append(HeadOption(bare, words))
        elif bare == "model.optimizer" and words:
            options.append((name, _optimizer(words)))
        elif bare == "trainer.logger" and [w.lower() for w in words] in (["wandb"], ["true"]):
            options.append((name, WANDB))
        elif bare in FREE:
            options.append((name, " ".join(words)))
        elif bare == "allow":
            options += [(name, word) for word in words]
        elif bare in ("data.train", "data.val"):
            kind = annotations()[bare]
            if plus and kind:
                kind += " | str"
            options.append((name, typed(bare, [joined] if joined is not None else words, kind)))
        else:
            value = _optional_text(bare, words, joined)
            options.append((name, value))
            if said := problem(bare, plain(value)):
                raise NotUnderstood(said)
    files += [str(file) for o in head_options if (file := config_of(o)) is not None]
    trees = [_converted(file, load(Path(file))) for file in (str(BASE), *files)]
    head = chosen_head([*zip((str(BASE), *files), trees, strict=True)], head_options, command)
    return CommandLine(command, files, _columns(options), head_options, trees, head)


def _optional_text(name: str, words: list[str], joined: str | None) -> str:
    """The value of an option; an empty one stays what it is."""
    if joined == "" and not words:
        return ""
    return typed(name, words, annotations().get(name, ""))


def spelt(args: Sequence[str]) -> list[tuple[str, list[str], str | None]]:
    """Options with the words behind them, and the text behind `=` as one, where there is any.

    Raises:
        NotUnderstood: A word belongs to no option.
    """
    found: list[tuple[str, list[str], str | None]] = []
    for arg in args:
        if arg.startswith("--") and len(arg) > 2 or arg == "-c":
            name, equals, value = arg.lstrip("-").partition("=")
            found.append((name, [value] if value else [], value if equals else None))
        elif re.fullmatch(r"-(?!inf$|nan$)[A-Za-z][\w.-]+(=.*)?", arg):
            raise NotUnderstood(f"{arg}: an option begins with two dashes: -{arg}")
        elif not found:
            known = arg.removesuffix(".yaml") in shipped_configs() or arg.endswith(".yaml")
            hint = f"a config is named with --config {arg}" if known else "options begin with --"
            raise NotUnderstood(f"{arg}: belongs to no option; {hint}")
        else:
            found[-1][1].append(arg)
    return found


def _listed(word: str) -> list[str]:
    return word.split(",") if "," in word and not Path(word).exists() else [word]


def _config(word: str) -> str:
    """The file that is meant by a path, a run folder, or the name of a shipped config."""
    path, shipped = Path(word), shipped_configs()
    if path.is_file():
        return word
    if path.is_dir() and (path / "config.yaml").is_file():
        return str(path / "config.yaml")
    if Path(f"{word}.yaml").is_file():
        return f"{word}.yaml"
    stem = word.removeprefix("configs/").removesuffix(".yaml").replace("-", "_")
    if stem in shipped:
        return str(shipped[stem])
    within = catalogue.ROOT / word
    if word.startswith("configs/") and within.is_file():
        return str(within)
    near = difflib.get_close_matches(stem.rpartition("/")[2], shipped, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}? " if near else ""
    what = "not a regular file" if path.exists() else "no such file"
    raise NotUnderstood(f"--config {word}: {what}. {hint}Shipped are {', '.join(sorted(shipped))}")


def _refuse_unknown(name: str, command: str) -> None:
    """Refuse an option that there is not, or that follows from another one."""
    for linked, source in LINKED.items():
        if name == linked or linked == "model.lm" and name.startswith("model.lm."):
            raise NotUnderstood(f"--{name}: follows from {source}; set that instead")
    wrong = catalogue.wrong_option([f"--{name}"])
    if wrong is None or name.startswith("model.head."):
        return
    known = [name for name in annotations() if not name.startswith("trainer.") or _ours(name)]
    raise NotUnderstood(no_such_option(wrong, f"python train.py {command}", known))


def _ours(name: str) -> bool:
    return name.removeprefix("trainer.") in catalogue.TRAINER


def _optimizer(words: Sequence[str]) -> str:
    """An optimizer by its short name, such as adamw."""
    word = " ".join(words)
    if "." in word or "{" in word:
        return word
    found = {name.lower(): path for name, path in catalogue.optimizers().items()}
    if word.lower() not in found:
        near = difflib.get_close_matches(word.lower(), found, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise NotUnderstood(
            f"--model.optimizer {word}: no such optimizer.{hint} Known are {', '.join(found)}, "
            "or the path of a class"
        )
    return found[word.lower()]


def _columns(options: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Options in which `--data.train FILE --data.train.column story` is one corpus."""
    made = dict(options)
    for text in ("data.train", "data.val"):
        column = made.get(f"{text}.column")
        plain_text = re.fullmatch(r"[^\[{]+", made.get(text, "["))
        if column and plain_text and not re.fullmatch(r"[A-Z]\w*|[\w.]+\.[A-Z]\w*", made[text]):
            corpus = yaml.safe_dump(of_column(made[text], column), default_flow_style=True)
            options = [(k, corpus.strip() if k == text else v) for k, v in options]
            options = [(k, v) for k, v in options if k != f"{text}.column"]
    return options


def _converted(file: str, tree: dict[str, Any]) -> dict[str, Any]:
    """A config with numbers, switches and names as the parser takes them."""
    for name, annotation in annotations().items():
        node: Any = tree
        *groups, last = name.split(".")
        if groups[:2] == ["model", "head"]:
            continue
        for part in groups:
            node = node.get(part) if isinstance(node, dict) else None
        if groups[:1] == ["model"] and len(groups) > 1 and isinstance(node, dict):
            node = node.get("init_args")
        if isinstance(node, dict) and isinstance(node.get(last), str):
            try:
                node[last] = in_tree(name, node[last], annotation)
            except NotUnderstood as e:
                raise NotUnderstood(f"{str(e).removeprefix('--')} ({file})") from e
    return tree


def _without_head(tree: dict[str, Any]) -> dict[str, Any]:
    model = tree.get("model")
    if not isinstance(model, dict) or "head" not in model:
        return tree
    rest = {key: value for key, value in model.items() if key != "head"}
    out = {key: value for key, value in tree.items() if key != "model"}
    return out | {"model": rest} if rest else out
