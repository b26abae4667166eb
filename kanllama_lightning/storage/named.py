"""Classes by name: what is shipped by a short name, others by `module.Name` where one may."""

import importlib
import inspect
import re
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from kanllama_lightning.storage.small_files import Wrong, check
from kanllama_lightning.types import InputError

PACKAGE = "kanllama_lightning"
PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
SHIPPED: dict[str, type] = {}
"""Heads, KAN layers and corpora of this package: what a file may name."""
LIBRARIES = ("torch.optim.", "lightning.pytorch.", f"{PACKAGE}.")
"""What else the configuration of a run names."""
MOVED = {
    "callbacks.": f"{PACKAGE}.callbacks.",
    f"{PACKAGE}.buffer.": f"{PACKAGE}.data.buffer.",
    f"{PACKAGE}.optim.": f"{PACKAGE}.training.optim.",
    f"{PACKAGE}.side_by_side.": f"{PACKAGE}.training.side_by_side.",
    f"{PACKAGE}.wandb_logger.": f"{PACKAGE}.runs.wandb_logger.",
}
"""Where classes are that configurations of earlier versions name elsewhere."""
_allowed: ContextVar[Collection[str] | None] = ContextVar("allowed", default=None)


Kind = TypeVar("Kind", bound=type)


def ship(kind: Kind, name: str = "") -> Kind:
    """Let a class of this package be called by its short name; does nothing to any other.

    Args:
        kind: The class.
        name: What else than its own name it is called, by files of earlier versions.
    """
    if kind.__module__.startswith(f"{PACKAGE}."):
        SHIPPED[name or kind.__name__] = kind
    return kind


def current_path(name: str) -> str:
    """The path of a class, given that or the one it had in an earlier version.

    What does not end like a class, such as the file `callbacks.jsonl`, stays what it is.
    """
    if not name.rpartition(".")[2][:1].isupper():
        return name
    moved = ((new + name.removeprefix(old)) for old, new in MOVED.items() if name.startswith(old))
    return next(moved, name)


def current_paths(tree: Any) -> Any:
    """A configuration with `current_path` of every class that it names."""
    if isinstance(tree, list):
        return [current_paths(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: current_path(part) if key == "class_path" and isinstance(part, str)
        else current_paths(part)
        for key, part in tree.items()
    }  # fmt: skip


@contextmanager
def only(modules: Collection[str]) -> Iterator[None]:
    """In here names come from a file: no module is imported but these.

    Outside of it, where names are typed by the user, `named_class` imports what they name.
    """
    token = _allowed.set(modules)
    try:
        yield
    finally:
        _allowed.reset(token)


def shipped(name: str) -> type | None:
    """The shipped class of a short name, or of its path in this package, now or earlier."""
    module, _, short = name.rpartition(".")
    return SHIPPED.get(short) if not module or f"{module}.".startswith(f"{PACKAGE}.") else None


def name_of(kind: type) -> str:
    """What a class is called in a file: a short name if it is shipped, else `module.Name`."""
    if SHIPPED.get(kind.__name__) is kind:
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def module_of(name: str) -> str | None:
    """The module that has to be imported for a name; None for what is shipped."""
    return None if shipped(name) else name.rpartition(".")[0]


def refuse_module(name: str, modules: Collection[str]) -> None:
    """Refuse a name in a file whose module is neither shipped nor among those allowed.

    Raises:
        InputError: It is; nothing was imported.
    """
    module = module_of(name)
    if module is None or module in modules:
        return
    if not PATH.fullmatch(name) or name.startswith(f"{PACKAGE}."):
        raise InputError(f"class_path {name!r}: there is no such class in {PACKAGE}")
    raise InputError(
        f"class_path {name!r}: a file may only name classes of {PACKAGE}, as importing others runs "
        f"their code; if you trust the module {module}, allow it: `--allow {module}` on the "
        f"command line, `allow=[{module!r}]` in Python"
    )


def refuse_modules(tree: Any, modules: Collection[str], every: bool = False) -> None:
    """Refuse a tree from a file that names a class that it may not.

    Args:
        tree: Of plain values.
        modules: Allowed beside what is shipped.
        every: Whether any text that looks like `module.Name` counts, not `class_path` alone; then
            what configurations name of the libraries used here is allowed too.

    Raises:
        InputError: It does; nothing was imported.
    """
    if isinstance(tree, dict):
        for key, part in tree.items():
            if key == "class_path":
                _refuse_text(str(part), modules, every)
            refuse_modules(part, modules, every)
    elif isinstance(tree, list):
        for part in tree:
            refuse_modules(part, modules, every)
    elif every and isinstance(tree, str) and PATH.fullmatch(tree):
        _refuse_text(tree, modules, every)


def _refuse_text(name: str, modules: Collection[str], libraries: bool) -> None:
    if not libraries or not name.startswith(LIBRARIES) and "." in name:
        refuse_module(name, modules)


def named_class(name: str, base: type) -> Any:
    """The class of a name.

    Raises:
        InputError: There is none, it is no subclass of `base`, or it is named by a file (`only`)
            and of a module that was not allowed.
    """
    found: Any = shipped(name)
    if found is None:
        allowed = _allowed.get()
        if allowed is not None:
            refuse_module(name, allowed)
        module, _, short = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), short)
        except Exception as e:  # whatever that module does
            raise InputError(f"class_path {name!r}: cannot be imported ({e})") from e
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InputError(f"class_path {name!r}: is no {base.__name__}")
    return found


def arguments_of(kind: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Arguments of a class's constructor with their types, in the order of their definition.

    Those that it hands on to its parents (`**shared`) are the parents' own.
    """
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for owner in kind.__mro__:
        init: Any = vars(owner).get("__init__")
        if init is None or not inspect.isfunction(init):
            continue
        hints = typing.get_type_hints(init)
        own = list(inspect.signature(init).parameters.values())[1:]
        named = {p.name: (p, hints.get(p.name, Any)) for p in own}
        rest = [p.name for p in own if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found |= {name: value for name, value in named.items() if name not in [*found, *rest]}
        if not rest:
            break
    return found


def checked_args(kind: type, args: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a class from a file, if they are of the types that its constructor asks for.

    Raises:
        InputError: One is missing, unknown, or of another type.
    """
    known = arguments_of(kind)
    unknown = sorted(args.keys() - known.keys())
    if unknown and not _takes_anything(kind):
        raise InputError(f"{where}.{unknown[0]}: {kind.__name__} has no such argument")
    missing = [name for name, (p, _) in known.items() if p.default is p.empty and name not in args]
    if missing:
        raise InputError(f"{where}.{missing[0]}: is missing; {kind.__name__} needs it")
    anything = (None, Any)
    try:
        return {k: check(v, known.get(k, anything)[1], f"{where}.{k}") for k, v in args.items()}
    except Wrong as e:
        raise InputError(f"{e}, for {kind.__name__}") from e


def _takes_anything(kind: type) -> bool:
    """Whether a constructor takes arguments that no parent of its own names."""
    inits = (vars(owner).get("__init__") for owner in kind.__mro__)
    return all(
        any(p.kind is p.VAR_KEYWORD for p in inspect.signature(init).parameters.values())
        for init in inits
        if inspect.isfunction(init)
    )


def check_nulls(values: Any, kind: type, where: str) -> None:
    """Refuse null where there must be something; parsers take it for anything that has a default.

    Args:
        values: Arguments by name.
        kind: Whose arguments they are.
        where: What they are arguments of, such as `data`.

    Raises:
        InputError: Names the argument and its default.
    """
    hints = typing.get_type_hints(vars(kind)["__init__"])
    for name, given in inspect.signature(kind).parameters.items():
        may_be_left_out = given.default is not inspect.Parameter.empty
        may_be_null = type(None) in typing.get_args(hints.get(name))
        if may_be_left_out and not may_be_null and name in values and values[name] is None:
            raise InputError(
                f"{where}.{name}=null: must be something; leave it out for {given.default!r}"
            )
