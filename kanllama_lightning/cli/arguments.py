"""Arguments and config files of `train.py`: read, made current, refused where they are wrong."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jsonargparse._loaders_dumpers import yaml_load

from kanllama_lightning import heads
from kanllama_lightning.cli.command_line import LINKED, CommandLine, read
from kanllama_lightning.cli.kinds import NotUnderstood, in_words
from kanllama_lightning.runs.folder import (
    CHECKPOINTS,
    HEAD,
    SUMMARY,
)
from kanllama_lightning.storage.named import (
    current_path,
    current_paths,
    refuse_modules,
)
from kanllama_lightning.storage.small_files import read_yaml, there
from kanllama_lightning.types import InputError

SUBCOMMANDS = ("fit", "validate")


def meant(given: Sequence[str]) -> CommandLine:
    """The command line as it is meant.

    Raises:
        InputError: A name, a value or a file is wrong.
    """
    try:
        return read(given, config_tree)
    except NotUnderstood as e:
        raise InputError(str(e)) from e


def parsed_from(line: CommandLine) -> list[str]:
    """Arguments of the parser, with every class where it is now.

    (jsonargparse 4.53 loses the class path of a callable, our optimizer, that stands in a
    default config file, so `configs/base.yaml` is given as an ordinary one.)
    """
    command, *rest = line.for_parser()
    return [command, *map(_with_current_path, rest)]


def _with_current_path(argument: str) -> str:
    """An argument of the command line, with a class where it is now."""
    option, equals, value = argument.partition("=")
    return option + equals + current_path(value) if equals else current_path(argument)


def refuse_linked(args: Sequence[str]) -> None:
    """Say so when a file sets an argument that follows from another one."""
    for file in config_files(args):
        if not there(Path(file)):
            raise InputError(f"--config {file}: no such file")
        tree = config_tree(Path(file))
        _refuse_linked_in(Path(file), tree)
        if any((Path(file).parent / name).exists() for name in (CHECKPOINTS, HEAD, SUMMARY)):
            _refuse_foreign(Path(file), tree, _allowed(args))


def config_files(args: Sequence[str]) -> list[str]:
    """The files that `--config` names."""
    files = [b for a, b in zip(args, args[1:], strict=False) if a in ("--config", "-c")]
    return files + [a.split("=", 1)[1] for a in args if a.startswith("--config=")]


def mentions(args: Sequence[str], group: str, key: str) -> bool:
    """Whether the command line or one of its config files says something of an argument."""
    if any(re.match(rf"--{group}\.{key}(\+?=|\+?$|\.)", a) for a in args):
        return True
    trees = [config_tree(Path(file)) for file in config_files(args)]
    groups = [tree.get(group) for tree in trees]
    return any(key in said for said in groups if isinstance(said, dict))


def load_yaml(text: str) -> Any:
    """YAML as the parser reads it, with every class where it is now."""
    return current_paths(yaml_load(text))


def config_tree(file: Path) -> dict[str, Any]:
    """What a config file holds."""
    tree = read_yaml(file, dict[str, Any] | None, "mend it, or leave it out") or {}
    return cast(dict[str, Any], current_paths(tree))


def _allowed(args: Sequence[str]) -> list[str]:
    """What `--allow` lists."""
    found: list[str] = []
    listing = False
    for arg in args:
        if listing and not arg.startswith("-"):
            found.append(arg)
        listing = arg == "--allow" or listing and not arg.startswith("-")
        if arg.startswith("--allow="):
            found.append(arg.partition("=")[2])
    return found


def _refuse_foreign(file: Path, tree: dict[str, Any], allow: Sequence[str]) -> None:
    """The configuration in a run folder, which somebody may have sent, names what it may alone."""
    try:
        refuse_modules(tree.get("data"), allow)
        for part in ("model", "trainer"):
            refuse_modules(tree.get(part), allow, every=True)
    except InputError as e:
        raise InputError(f"--config {file}: {e}") from e


def _refuse_linked_in(file: Path, tree: dict[str, Any]) -> None:
    for linked, source in LINKED.items():
        node: Any = tree
        for part in linked.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            raise InputError(f"{linked} in {file}: follows from {source}; set that instead")


def explain(message: str) -> str:
    """One clear message from what the parser says, with a hint where a name is misspelt."""
    text = re.sub(r"\s*\n\s*", " ", message).strip()
    head = re.search(
        r"(?:Expected a dot import path string|not a subclass|import path)[^:]*: (\w+)", text
    )
    known = [n for n in heads.__all__ if n != "SAEHead"]
    option = re.search(r"does not accept option '([\w.]+)'|Option '([\w.]+)' is not accepted", text)
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w.]+)", text)
    if option or unknown:
        name = next(g for m in (option, unknown) if m for g in m.groups() if g)
        hint = " Latents per token are `target_l0`, for every head." if name.endswith("k") else ""
        of = re.search(r'Parser key "([\w.]+)"', text)
        return (
            f"{f'{of[1]}: ' if of else ''}{name}: no such option.{hint} See `python train.py fit "
            "--help`, or for a head `python train.py fit --model.head.help KANEncoder`"
        )
    if "head" in text and head:
        near = difflib.get_close_matches(head[1], known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"model.head={head[1]!r}: no such head.{hint} Known: {', '.join(known)}"
    return in_words(text) or text[:1500]
