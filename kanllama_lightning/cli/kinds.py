"""Values as people type them, by the kind of the argument that they are for.

Kinds are read from annotations, so that a new argument needs nothing here.
"""

import ast
import glob
import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from pathlib import Path
from typing import Any

import yaml

YES = ("true", "yes", "on", "y", "t", "1")
NO = ("false", "no", "off", "n", "f", "0")
NOTHING = ("null", "none", "~")
FORMATS = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
}
"""What number formats are called elsewhere."""
PRECISIONS = {
    "32": "32-true",
    "fp32": "32-true",
    "float32": "32-true",
    "tf32": "32-true",
    "bf16": "bf16-mixed",
    "bfloat16": "bf16-mixed",
    "mixed": "bf16-mixed",
}
TIMES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
NUMBER = re.compile(r"([+-]?[\d_]*\.?[\d_]*(?:e[+-]?\d+)?)\s*([kmgbt%]?)", re.IGNORECASE)
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
COUNT = "a whole number, such as 4096, 1_000_000, 1e6 or 50M"
SHARE = "a number, such as 0.05, 5%, 1/32 or 3e-4"
TEXT = (
    "a file or folder, FILE:column, a dataset of the hub, or a corpus class with its arguments "
    "({class_path: LocalCorpus, init_args: {path: FILE, column: text}})"
)


class NotUnderstood(Exception):
    """One line on what was typed: the option, the value, what is allowed."""


def refuse(option: str, value: str, allowed: str) -> NotUnderstood:
    """The line for a value that is none of its kind."""
    return NotUnderstood(f"--{option} {value}: must be {allowed}")


@cache
def parts(annotation: str) -> tuple[str, ...]:
    """The members of a union, flat: `int | None` and `Optional[int]` alike."""

    def split(node: ast.expr) -> list[str]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return [*split(node.left), *split(node.right)]
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            if node.value.id == "Optional":
                return [*split(node.slice), "None"]
            if node.value.id == "Union":
                several = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                return [part for one in several for part in split(one)]
        return [ast.unparse(node)]

    return tuple(split(ast.parse(annotation, mode="eval").body)) if annotation else ()


def number(word: str) -> Decimal | None:
    """A number with separators, a size (50M), a share (5%, 1/32) or an exponent; None if none."""
    text = word.strip()
    above, slash, below = text.partition("/")
    if slash:
        a, b = number(above), number(below)
        return a / b if a is not None and b else None
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    found = NUMBER.fullmatch(text)
    if found is None or not re.search(r"\d", found[1]):
        return None
    try:
        value = Decimal(found[1].replace("_", ""))
    except InvalidOperation:
        return None
    unit = found[2].lower()
    return value / 100 if unit == "%" else value * TIMES.get(unit, 1)


def as_count(option: str, word: str) -> str:
    """A whole number, in digits."""
    value = number(word)
    if value is None or abs(value) > 10**18 or value != int(value):
        raise refuse(option, word, COUNT)
    return str(int(value))


def as_number(option: str, word: str) -> str:
    """A number, as Python writes it."""
    if word.lower().lstrip("+-.") in ("nan", "inf", "infinity"):
        sign = "-" if word.startswith("-") else ""
        return f"{sign}.{word.lower().lstrip('+-.')[:3]}"
    value = number(word)
    if value is None:
        raise refuse(option, word, SHARE)
    whole = value == int(value) and abs(value) < 10**15 and "e" not in word.lower()
    return str(int(value)) if whole and "." not in word else repr(float(value))


def as_switch(option: str, word: str) -> str:
    """`true` or `false`."""
    if word.lower() in YES:
        return "true"
    if word.lower() in NO:
        return "false"
    raise refuse(option, word, "true or false (yes, no, 1, 0, or nothing for true)")


def as_choice(option: str, word: str, annotation: str) -> str:
    """One of a few words, by whatever it is called elsewhere."""
    node: Any = ast.parse(annotation, mode="eval").body
    several: list[Any] = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    allowed = [str(one.value) for one in several]
    meant = FORMATS.get(word.lower(), word.lower()).removeprefix("torch.")
    if meant not in allowed:
        raise refuse(option, word, " or ".join(allowed))
    return meant


def as_precision(option: str, word: str) -> str:
    """The number format of a step, as Lightning calls it."""
    meant = PRECISIONS.get(word.lower(), word)
    if not re.fullmatch(r"(16|bf16|32|64)(-mixed|-true)?|transformer-engine(-float16)?", meant):
        raise refuse(option, word, "32-true or bf16-mixed")
    return meant


def as_mapping(option: str, word: str) -> str:
    """`{grid_size: 5}`, also typed as `grid_size=5,order=3` or without its blanks."""
    text = word.strip()
    if not text.startswith("{"):
        pairs = [pair.partition("=") for pair in re.split(r"[,\s]+", text)]
        if any(not equals for _, equals, _ in pairs):
            raise refuse(option, word, "arguments by name, such as grid_size=5 or {grid_size: 5}")
        text = "{" + ", ".join(f"{key}: {value}" for key, _, value in pairs) + "}"
    return re.sub(r"([\w'\"]):(?=\S)", r"\1: ", text)


def as_list(option: str, word: str, kind: str) -> str:
    """`[1, 2]`, also typed as `1,2` or `1 2`."""
    words = [one for one in re.split(r"[,\s]+", word.strip().strip("[]")) if one]
    convert = {"int": as_count, "float": as_number}.get(kind, lambda _, one: one)
    return "[" + ", ".join(convert(option, one) for one in words) + "]"


def as_text(option: str, words: Sequence[str], several: bool) -> str:
    """Where text comes from: files, folders, patterns, columns of them, datasets, corpus classes.

    Args:
        option: Name of the option.
        words: What was typed after it.
        several: Whether it may be several texts, or none.
    """
    joined = " ".join(words).strip()
    if joined.lower() in (*NOTHING, "", "false", "no", "[]"):
        if several:
            return "null"
        raise refuse(option, joined or "''", TEXT)
    if joined.startswith("{") or joined.startswith("[") and ("{" in joined or ":" in joined):
        return joined
    given = joined[1:-1] if joined.startswith("[") and joined.endswith("]") else None
    listed = re.split(r"\s*,\s*", given) if given is not None else list(words)
    found = [one for word in listed for one in _texts(option, word.strip("'\""))]
    if len(found) == 1 and given is None:
        return found[0] if isinstance(found[0], str) else json.dumps(found[0])
    if several:
        return json.dumps(found)
    return json.dumps(_mixed(option, joined, found))


def _texts(option: str, word: str) -> list[Any]:
    """The texts that one word names."""
    if not word or _there(word):
        return [word] if word else []
    pattern = re.search(r"[*?]", word) or re.search(r"\[.+\]", word)
    if pattern and "://" not in word:
        matching = sorted(glob.glob(str(Path(word).expanduser()), recursive=True))
        if not matching:
            raise NotUnderstood(f"--{option} {word}: matches no file; check the pattern")
        return list(matching)
    if "," in word:
        return [one for part in word.split(",") for one in _texts(option, part.strip())]
    file, colon, column = word.rpartition(":")
    if colon and re.fullmatch(r"\w+", column) and file and not file.startswith(("hf:", "http")):
        return [of_column(file, column)]
    return [word]


def of_column(text: str, column: str) -> dict[str, Any]:
    """The corpus class of one column of a file, or of a dataset."""
    where = "path" if _there(text) or Path(text).suffix or text[0] in "./~" else "name"
    kind = "LocalCorpus" if where == "path" else "HubCorpus"
    return {"class_path": kind, "init_args": {where: text, "column": column}}


def _mixed(option: str, typed: str, texts: Sequence[Any]) -> dict[str, Any]:
    """Several files as one text, each with the weight of its size."""
    files = [Path(text if isinstance(text, str) else text["init_args"].get("path", "")).expanduser()
             for text in texts]  # fmt: skip
    if not texts or not all(file.is_file() for file in files):
        raise refuse(
            option, typed, "one text, or files; others are mixed with weights: {class_path: "
            "Mixture, init_args: {corpora: [A, B], weights: [1, 2]}}"
        )  # fmt: skip
    weights = [max(1, file.stat().st_size) for file in files]
    return {"class_path": "Mixture", "init_args": {"corpora": [*texts], "weights": weights}}


def _there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError):  # too long for a name, or none
        return False


CONVERTERS: Mapping[frozenset[str], Callable[[str, str], str]] = {
    frozenset({"int"}): as_count,
    frozenset({"float"}): as_number,
    frozenset({"int", "float"}): as_number,
    frozenset({"bool"}): as_switch,
    frozenset({"_PRECISION_INPUT"}): as_precision,
}
"""What is made of one word, by what the argument may be."""


def typed(option: str, words: Sequence[str], annotation: str) -> str:
    """The value of an option, as its parser takes it.

    Args:
        option: Its name.
        words: What was typed after it.
        annotation: What its argument is, in Python; "" where that is not known.

    Raises:
        NotUnderstood: It is no value of that kind.
    """
    members = parts(annotation)
    kinds = frozenset(members) - {"None"}
    if any(kind in ("Corpus", "list[Corpus]", "list[str | Corpus]") for kind in kinds):
        return as_text(option, words, "None" in members)
    word = " ".join(words)
    if not words:
        if "bool" in kinds:
            return "true"
        raise NotUnderstood(f"--{option}: its value is missing; put it behind the option")
    if word.lower() in NOTHING and (kinds - {"str"} or "None" in members):
        return "null"
    if kinds in CONVERTERS:
        return CONVERTERS[kinds](option, word)
    (kind,) = kinds if len(kinds) == 1 else ("",)
    if kind.startswith("Literal["):
        return as_choice(option, word, kind)
    if kind.startswith("dict["):
        return as_mapping(option, word)
    if kind.startswith("list["):
        return as_list(option, word, kind[5:-1])
    if "bool" in kinds and word.lower() in (*YES, *NO):
        return as_switch(option, word)
    if kind == "str":
        if "None" in members and word.lower() in ("true", "false"):
            raise refuse(option, word, "a name or a path")
        if len(words) > 1:
            raise NotUnderstood(f"--{option} {word}: is {len(words)} words; put quotes around them")
    return word


WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "none",
    "list": "a list",
    "dict": "arguments by name",
}
"""What types are called in a message."""


def in_words(message: str) -> str | None:
    """What a parser says of a value, without the types of Python; None if it says none.

    Args:
        message: In one line.
    """
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.*?)(?: Given value type.*)?$", message)
    said = re.split("(?:Given|Got) v", message)[0]
    asked = re.findall(r"<class '([\w.]+)'>|Literal\[([^\]]+)\]", said)
    if key is None or not asked:
        *_, last = message.rpartition('Parser key "')
        inner = re.fullmatch(r'([\w.]+)": (Expected [^.]+?)\..*', last)
        if key is None or inner is None:
            return None
        name = inner[1] if inner[1] == key[1] else f"{key[1]}.{inner[1]}"
        return f"--{name}: {inner[2].replace('Expected', 'must be')}"
    wanted = [
        ", ".join(re.findall(r"'([^']+)'", literal)) if literal
        else WORDS.get(name, f"a {name.rpartition('.')[2]} by its class_path")
        for name, literal in asked
    ]  # fmt: skip
    value = f" {given[1][:80]}" if given else ""
    return f"--{key[1]}{value}: must be {' or '.join(dict.fromkeys(wanted))}"


def in_tree(where: str, value: Any, annotation: str) -> Any:
    """A value of a config file, with numbers, switches and names as people write them there."""
    members = parts(annotation)
    kinds = frozenset(members) - {"None"}
    simple = kinds in CONVERTERS or any(kind.startswith("Literal[") for kind in kinds)
    if not isinstance(value, str) or not simple or len(members) > 3:
        return value
    if kinds == {"_PRECISION_INPUT"} or any(kind.startswith("Literal[") for kind in kinds):
        return typed(where, [value], annotation)
    return plain(typed(where, [value], annotation))


def plain(text: str) -> Any:
    """What a text says in YAML, numbers such as 1e-3 included."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+e[+-]?\d+", value, re.IGNORECASE):
        return float(value)
    return value
