"""Which head is meant, and with which arguments, from all configs and options together.

What a config says that names a language model, and no head (`configs/embedded.yaml`), are defaults:
whatever another file or the command line says of the head counts before it.
"""

import copy
import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kanllama_lightning.cli import catalogue
from kanllama_lightning.cli.help import no_such_option
from kanllama_lightning.cli.kinds import NotUnderstood, in_tree, parts, plain, typed

SIDE_BY_SIDE = "SideBySide"
OF_A_MEMBER = ("class_path", "lr", "optimizer")
"""What is said of one of several heads beside its arguments."""
NONE = (
    "model.head: no head is chosen. Add --config kan, or --model.head kan; on a laptop: --config "
    "kan embedded. `python train.py fit --help` lists the heads"
)


class HeadOption(NamedTuple):
    """An option of the head as it was typed."""

    name: str
    words: list[str]

    @property
    def path(self) -> list[str]:
        """What follows `model.head`, `init_args` left out."""
        found = self.name.split(".")[2:]
        return found[1:] if found[:1] == ["init_args"] else found


@cache
def shipped_configs() -> Mapping[str, Path]:
    """Configs that lie in `configs/`, by their names."""
    return {file.stem: file for file in sorted((catalogue.ROOT / "configs").glob("*.yaml"))}


@cache
def head_configs() -> Mapping[str, dict[str, Any]]:
    """`model.head` of the shipped configs that choose one, by their names."""
    found = {}
    for name, file in shipped_configs().items():
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        head = (tree.get("model") or {}).get("head") or {}
        if "class_path" in head:
            found[name] = head
    return found


def config_of(option: HeadOption) -> Path | None:
    """The config that `--model.head kan` means; None if it names a class."""
    if option.path or not option.words:
        return None
    word = " ".join(option.words)
    if word in catalogue.heads():
        return None
    stem = word.removeprefix("configs/").removesuffix(".yaml").replace("-", "_").lower()
    return shipped_configs()[stem] if stem in head_configs() else None


def head_class(word: str) -> str:
    """The class of a head, by its name in any case, or by that of its config.

    Raises:
        NotUnderstood: There is none.
    """
    known = catalogue.heads()
    if "." in word or word in known or word == SIDE_BY_SIDE:
        return word
    configs = head_configs()
    by_case = {name.lower(): name for name in (*known, SIDE_BY_SIDE)}
    stem = word.lower().replace("-", "_")
    if stem in configs:
        return str(configs[stem]["class_path"])
    if stem.replace("_", "") in by_case:
        return by_case[stem.replace("_", "")]
    names = {**by_case, **{name: name for name in configs}}
    near = difflib.get_close_matches(stem, names, n=1, cutoff=0.6)
    hint = f" Did you mean {names[near[0]]}?" if near else ""
    raise NotUnderstood(
        f"model.head={word!r}: no such head.{hint} Known: {', '.join(known)}; or by config: "
        f"{', '.join(configs)}"
    )


def arguments(class_path: str) -> Mapping[str, str] | None:
    """Annotations of the arguments of a head; None of one that is not shipped."""
    module, _, name = class_path.rpartition(".")
    if module and not module.startswith("kanllama_lightning."):
        return None
    if name == SIDE_BY_SIDE:
        found = catalogue.arguments("training/side_by_side.py", name, "")
    elif name in catalogue.heads():
        found = [o._replace(name=o.name.removeprefix("model.head."))
                 for o in catalogue.head_options(name)]  # fmt: skip
    else:
        return None
    return {o.name: o.type for o in found} | {"seed": "int", "d_model": "int", "transcoder": "bool"}


class _Said(NamedTuple):
    key: str
    value: Any
    file: str
    kind: str | None
    """The head that the file names."""


def chosen_head(
    trees: Sequence[tuple[str, dict[str, Any]]], options: Sequence[HeadOption], command: str
) -> Any:
    """`model.head` of a run.

    Args:
        trees: Files with what they say, in their order.
        options: Those of the head, in their order.
        command: What they are options of.

    Raises:
        NotUnderstood: No head is chosen, or it has no such argument.
    """
    kind: str | None = None
    more: dict[str, Any] = {}
    defaults: list[_Said] = []
    said: list[_Said] = []
    for file, tree in trees:
        model = tree.get("model")
        head = model.get("head") if isinstance(model, dict) else None
        if isinstance(head, str):
            head = {"class_path": head}
        if head is None:
            continue
        if not isinstance(head, dict) or not isinstance(head.get("class_path", ""), str):
            return head  # the parser says what is wrong
        own = head.get("class_path")
        if own is not None:
            kind = own
        args = head.get("init_args", {} if own is not None else None)
        if args is None:
            args = {} if "init_args" in head else dict(head)
        if not isinstance(args, dict):
            return head
        of_a_model = own is None and "name" in (tree.get("lm") or {})
        (defaults if of_a_model else said).extend(
            _Said(str(key), copy.deepcopy(value), file, own) for key, value in args.items()
        )
        more |= {k: v for k, v in head.items() if k not in ("class_path", "init_args")
                 and args is not head and "init_args" in head}  # fmt: skip
    extra: dict[str, Any] = {}
    for option in options:
        word = " ".join(option.words)
        if option.path in ([], ["class_path"]) and word:
            if word.startswith("{"):
                whole = plain(word)
                whole = whole if isinstance(whole, dict) else {}
                kind = whole.get("class_path", kind)
                extra |= whole.get("init_args") or {}
            elif config_of(option) is None:
                kind = head_class(word)
    if kind is None:
        _refuse_argument_of_none(options, command)
        raise NotUnderstood(NONE)
    known = arguments(kind)
    args = {}
    for one in defaults:
        if known is None or one.key in known:
            args[one.key] = one.value
    for one in said:
        if known is not None and one.key not in known:
            if one.kind not in (None, kind) and _short(one.kind) != _short(kind):
                continue
            raise NotUnderstood(
                f"model.head.{one.key} in {one.file}: {_short(kind)} has no such argument."
                f"{_near(one.key, known)}"
            )
        annotation = None if known is None else known[one.key]
        _refuse_null(f"{one.key} in {one.file}", one.value, annotation)
        args[one.key] = one.value
    if known is not None:
        args = {k: _in_file(k, v, known[k]) for k, v in args.items()}
    args |= extra
    if kind.rpartition(".")[2] == SIDE_BY_SIDE and "heads" in args:
        args["heads"] = _members(args["heads"])
    for option in options:
        if option.path and option.path not in (["class_path"], ["help"]):
            _set(args, option, kind, known, command)
    return {"class_path": kind, "init_args": args} | more


def _in_file(key: str, value: Any, annotation: str) -> Any:
    return in_tree(f"model.head.{key}", value, annotation)


def _refuse_null(name: str, value: Any, annotation: str | None) -> None:
    if value is None and annotation and "None" not in parts(annotation):
        raise NotUnderstood(
            f"model.head.{name}=null: must be something; leave it out for its default"
        )


def _short(kind: str | None) -> str:
    return (kind or "").rpartition(".")[2]


def _refuse_what_no_head_has(option: HeadOption, command: str) -> None:
    names = [o.name for o in catalogue.all_head_options()]
    name = f"model.head.{option.path[0]}"
    if name not in names and option.path[0] not in ("dict_kwargs", "class_path", "help"):
        raise NotUnderstood(no_such_option(name, f"python train.py {command}", names))


def _near(name: str, known: Mapping[str, str]) -> str:
    shown = [one for one in known if one not in ("seed", *catalogue.FOLLOWS)]
    near = difflib.get_close_matches(name, shown, n=1, cutoff=0.5)
    others = [
        head for head in catalogue.heads()
        if name in {o.name.removeprefix("model.head.") for o in catalogue.head_options(head)}
    ]  # fmt: skip
    if others:
        return f" It is one of {', '.join(others)}"
    return f" Did you mean {near[0]}?" if near else f" It has {', '.join(shown)}"


def _refuse_argument_of_none(options: Sequence[HeadOption], command: str) -> None:
    """Say of an argument that it is one, where it is not said of which head."""
    for option in options:
        if option.path:
            _refuse_what_no_head_has(option, command)
            raise NotUnderstood(
                f"--{option.name}: is an option of a head, and no head is chosen. Add --config "
                "kan, or --model.head kan; `python train.py fit --help` lists the heads"
            )


def _set(
    args: dict[str, Any],
    option: HeadOption,
    kind: str,
    known: Mapping[str, str] | None,
    command: str,
) -> None:
    """Put an option among the arguments."""
    first, *inner = option.path
    members = args.get("heads") if _short(kind) == SIDE_BY_SIDE else None
    if isinstance(members, dict) and (first == "heads" and inner or first in members):
        _set_member(members, option, inner if first == "heads" else option.path)
        return
    if first == "dict_kwargs" or known is None:
        known = None
    elif first not in known:
        if isinstance(members, dict):
            told = f" Its heads are {', '.join(map(str, members))}: --model.head.NAME.ARGUMENT"
        else:
            _refuse_what_no_head_has(option, command)
            told = _near(first, known)
        raise NotUnderstood(f"--{option.name}: {_short(kind)} has no such argument.{told}")
    annotation = "" if known is None or inner or first == "heads" else known[first]
    value = _value(option, annotation)
    if first == "heads":
        value = _members(value)
    _refuse_null(option.name.removeprefix("model.head."), value, annotation)
    if not inner:
        args[first] = value
        return
    node = args
    for part in (first, *inner[:-1]):
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[inner[-1]] = value


def _value(option: HeadOption, annotation: str) -> Any:
    text = typed(option.name, option.words, annotation)
    if annotation == "str" or annotation.startswith("Literal"):
        return text
    return plain(text)


def _set_member(members: dict[str, Any], option: HeadOption, path: list[str]) -> None:
    """Change one of several heads."""
    whole = ".".join(path)
    name = max((n for n in members if whole == n or whole.startswith(f"{n}.")), key=len, default="")
    if not name:
        raise NotUnderstood(
            f"--{option.name}: there is no head {path[0]}; there are {', '.join(members)}"
        )
    inner = [part for part in whole[len(name) + 1 :].split(".") if part and part != "init_args"]
    if not inner:
        members |= _members({name: plain(" ".join(option.words))})
        return
    spec = members[name]
    if inner[0] in OF_A_MEMBER:
        node, keys = spec, inner
        annotation = "float" if inner[-1] == "lr" else ""
    else:
        known = arguments(str(spec.get("class_path")))
        if known is not None and inner[0] not in known:
            raise NotUnderstood(
                f"--{option.name}: {name} is a {_short(spec['class_path'])}, which has no such "
                f"argument.{_near(inner[0], known)}"
            )
        if not isinstance(spec.get("init_args"), dict):
            spec["init_args"] = {}
        node, keys = spec["init_args"], inner
        annotation = known[inner[0]] if known is not None and len(inner) == 1 else ""
    for part in keys[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    value = _value(option, annotation)
    node[keys[-1]] = head_class(str(value)) if keys == ["class_path"] else value


def _members(value: Any) -> Any:
    """Heads side by side by their names, from a mapping or a list of kinds."""
    if isinstance(value, str):
        value = [one.strip() for one in value.split(",")]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = {one: one for one in value}
    if not isinstance(value, dict):
        return value
    return {name: _member(spec) for name, spec in value.items()}


def _member(spec: Any) -> Any:
    if not isinstance(spec, str):
        return spec
    own = head_configs().get(spec.lower().replace("-", "_"))
    return copy.deepcopy(own) if own is not None else {"class_path": head_class(spec)}
