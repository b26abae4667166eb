"""Small files, read with suspicion against a schema; JSON that says what is not known by null.

Whatever is wrong with a file (cut short, edited, of another program, not ours to read) is the
user's input: one `InputError` that names the file, what is wrong with it and the way on. Schemas
are type annotations: plain types, `list`, `dict`, unions, `Literal`, `TypedDict` (keys that it does
not name are let through unchecked) and `Annotated` with a `Within` or a `Like`.
"""

import csv
import io
import json
import math
import re
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, Required, Union

import yaml

from kanllama_lightning.errors import InputError
from kanllama_lightning.storage.files import write_text

MOST_BYTES = 64 << 20
MOST_YAML = 1 << 20
"""Bytes of a YAML file, which is slow to read."""
DEPTH, VALUES = 64, 1_000_000
"""What a file may hold at most: lists in lists; and numbers, texts and keys, aliases counted as
often as they stand there."""
MOST_INT = 1 << 63
ANEW = "delete it, it is made anew"
WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}


class Within(NamedTuple):
    """What a number must be."""

    low: float = -math.inf
    high: float = math.inf


class Like(NamedTuple):
    """What a text must be: a regular expression it matches whole, and that in words."""

    pattern: str
    words: str


Count = Annotated[int, Within(0)]
Positive = Annotated[int, Within(1)]
Digest = Annotated[str, Like(r"[0-9a-f]{64}", "64 hexadecimal digits")]
FileName = Annotated[
    str, Like(r"(?!\.\.?$)[^/\\\0]{1,63}", "the name of a file, short and without a folder")
]


class Wrong(ValueError):
    """A value that is not as it should be; says which, and what it must be."""


def check(value: Any, schema: Any, where: str = "") -> Any:
    """The value, if it is as the schema says; whole numbers become floats where those are asked.

    Args:
        value: Of plain types.
        schema: An annotation.
        where: What the value is called.

    Raises:
        Wrong: It is not.
    """
    kind, args = typing.get_origin(schema), typing.get_args(schema)
    if schema is Any:
        return value
    if kind in (Required, NotRequired):
        return check(value, args[0], where)
    if kind is Annotated:
        value = check(value, args[0], where)
        for rule in args[1:]:
            if isinstance(rule, Within) and not rule.low <= value <= rule.high:
                raise _wrong(value, schema, where)
            if isinstance(rule, Like) and not re.fullmatch(rule.pattern, value):
                raise _wrong(value, schema, where)
        return value
    if kind in (Union, types.UnionType):
        own = [one for one in args if one is not type(None)]
        if len(own) == 1 and value is not None:
            return check(value, own[0], where)
        for one in args:
            try:
                return check(value, one, where)
            except Wrong:
                continue
        raise _wrong(value, schema, where)
    if kind is Literal:
        if not any(value == one and type(value) is type(one) for one in args):
            raise _wrong(value, schema, where)
        return value
    if typing.is_typeddict(schema):
        return _record(value, schema, where)
    if kind in (list, Sequence):
        if not isinstance(value, list):
            raise _wrong(value, schema, where)
        return [check(one, args[0], f"{where}[{i}]") for i, one in enumerate(value)]
    if kind is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise _wrong(value, schema, where)
        return [
            check(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True))
        ]
    if kind is dict:
        if not isinstance(value, dict):
            raise _wrong(value, schema, where)
        named = {check(k, args[0], f"key {k!r} of {where or 'it'}"): v for k, v in value.items()}
        return {k: check(v, args[1], _inside(where, k)) for k, v in named.items()}
    if schema is None or schema is type(None):
        fits = value is None
    elif schema is int:
        fits = type(value) is int and -MOST_INT <= value < MOST_INT
    elif schema is float:
        fits = type(value) in (int, float) and abs(value) < MOST_INT**16 and math.isfinite(value)
        value = float(value) if fits else value
    else:
        fits = type(value) is schema
    if not fits:
        raise _wrong(value, schema, where)
    return value


def _record(value: Any, schema: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, dict, where)
    hints = typing.get_type_hints(schema, include_extras=True)
    missing = sorted(schema.__required_keys__ - value.keys())
    if missing:
        raise Wrong(f"{_inside(where, missing[0])} is missing")
    return {k: check(v, hints.get(k, Any), _inside(where, k)) for k, v in value.items()}


def _inside(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def _wrong(value: Any, schema: Any, where: str) -> Wrong:
    shown = repr(value)
    shown = f"{shown[:80]}..." if len(shown) > 83 else shown
    return Wrong(f"{where or 'it'}={shown} must be {words(schema)}")


def words(schema: Any) -> str:
    """What a schema asks for, in words."""
    kind, args = typing.get_origin(schema), typing.get_args(schema)
    if kind is Annotated:
        rule = args[1]
        if isinstance(rule, Like):
            return rule.words
        low = f" of at least {rule.low:g}" if rule.low > -math.inf else ""
        return words(args[0]) + low + (f" up to {rule.high:g}" if rule.high < math.inf else "")
    if kind in (Union, types.UnionType):
        return " or ".join(words(one) for one in args)
    if kind is Literal:
        return " or ".join(repr(one) for one in args)
    if kind in (list, Sequence):
        return f"a list, each {words(args[0])}"
    if kind is tuple:
        return f"a list of {len(args)}, each {words(args[0])}"
    if kind is dict or schema is dict or typing.is_typeddict(schema):
        return "an object with keys"
    if schema is None or schema is type(None):
        return "null"
    return WORDS.get(schema, getattr(schema, "__name__", str(schema)))


def there(path: Path) -> bool:
    """Whether there is something at a path, whatever it is.

    Raises:
        InputError: One may not look.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as e:
        raise _unreadable(path, e) from e
    return True


def _unreadable(path: Path, error: Exception) -> InputError:
    why = getattr(error, "strerror", None) or str(error)
    remedy = "give its name anew"
    if isinstance(error, PermissionError):
        remedy = "ask its owner for the right to read it (chmod), or copy it"
    return InputError(f"{str(path)!r}: cannot be read ({why}); {remedy}")


def ordinary_size(path: Path, remedy: str = ANEW) -> int:
    """Bytes of an ordinary file; of anything else, a pipe say, reading might wait for ever.

    Raises:
        InputError: There is none, it is no file, or one may not look.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise InputError(f"{path}: is missing; {remedy}") from e
    except OSError as e:
        raise _unreadable(path, e) from e
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
        raise InputError(f"{path}: is {what} where a file should be; {remedy}")
    return found.st_size


def read_bytes(path: Path, remedy: str = ANEW, most: int = MOST_BYTES) -> bytes:
    """What is in a file.

    Args:
        path: The file.
        remedy: What to do about a damaged one; ends the message.
        most: Bytes that a file of its kind has at most.

    Raises:
        InputError: There is none, it is no file, may not be read, or is too large.
    """
    size = ordinary_size(path, remedy)
    if size > most:
        raise InputError(
            f"{path}: has {size:,} bytes, {most:,} are the most that such a file holds; {remedy}"
        )
    try:
        return path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e) from e


def read_text(path: Path, remedy: str = ANEW, most: int = MOST_BYTES) -> str:
    """What is in a file of UTF-8; raises InputError as `read_bytes` does, or where it is none."""
    try:
        return read_bytes(path, remedy, most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: is no text in UTF-8 (byte {e.start:,}); {remedy}") from e


def read_json(path: Path, schema: Any = dict[str, Any], remedy: str = ANEW) -> Any:
    """A JSON file that is as its schema says.

    Raises:
        InputError: It is not, or cannot be read.
    """
    text = read_text(path, remedy)
    try:
        return check(from_json(text), schema)
    except Wrong as e:
        raise InputError(f"{path}: {e}; {remedy}") from e


def read_yaml(path: Path, schema: Any = dict[str, Any], remedy: str = ANEW) -> Any:
    """A YAML file that is as its schema says; raises InputError where it is not."""
    text = read_text(path, remedy, MOST_YAML)
    try:
        return check(from_yaml(text), schema)
    except Wrong as e:
        raise InputError(f"{path}: {e}; {remedy}") from e


def read_csv(
    path: Path,
    columns: Mapping[str, Any],
    remedy: str = ANEW,
    whole: bool = True,
    optional: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, their cells by the types of their columns.

    Args:
        path: The file.
        columns: Columns that it must have, and what is in them: `int`, `float`, `str`, annotated
            or not, or one of these or None, which an empty cell is. Cells of other columns stay as
            they are.
        remedy: What to do about a damaged one.
        optional: Columns that it may have, likewise.
        whole: Whether a last line cut short is damage, or what a killed writer leaves and is left
            out.

    Raises:
        InputError: It is damaged, or cannot be read.
    """
    text = read_text(path, remedy)
    if not whole and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        if not text:
            return []
    rows: list[dict[str, Any]] = []
    schemas = dict(columns) | dict(optional or {})
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(lines, [])
        missing = [name for name in columns if name not in header]
        if missing or len(set(header)) < len(header):
            raise Wrong(
                f"has no column {missing[0]!r}" if missing else "names a column more than once"
            )
        known = [(name, schema) for name, schema in schemas.items() if name in header]
        for n, line in enumerate(lines, start=2):
            if not line:
                continue
            if len(line) != len(header):
                raise Wrong(f"row {n} has {len(line)} cells, the header {len(header)}")
            row: dict[str, Any] = dict(zip(header, line, strict=True))
            for name, schema in known:
                row[name] = _cell(row[name], schema, f"row {n}, {name}")
            rows.append(row)
    except (csv.Error, Wrong) as e:
        raise InputError(f"{path}: is damaged: {e}; {remedy}") from e
    return rows


def _cell(text: str, schema: Any, where: str) -> Any:
    union = typing.get_origin(schema) in (Union, types.UnionType)
    kinds = [k for k in (typing.get_args(schema) if union else (schema,)) if k is not type(None)]
    if text == "" and union:
        return None
    plain_kind = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) else kinds[0]
    try:
        value = plain_kind(text)
    except (ValueError, OverflowError):
        raise _wrong(text, schema, where) from None
    return check(value, kinds[0], where)


def from_json(text: str) -> Any:
    """What JSON says, strictly: no NaN, no key twice, no lone surrogate, not too deep.

    Raises:
        Wrong: It is none; says why.
    """

    def constant(name: str) -> Any:
        raise Wrong(f"{name} is no JSON; a number that is not known is null")

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise Wrong(f"{digits[:40]} is beyond what a number can be")
        return value

    def whole(digits: str) -> int:
        if len(digits) > 40:
            raise Wrong(f"{digits[:40]}... is beyond what a number can be")
        return int(digits)

    def pairs(given: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(given)
        if len(found) < len(given):
            names = [name for name, _ in given]
            twice = next(name for name in names if names.count(name) > 1)
            raise Wrong(f"the key {twice!r} stands there twice")
        return found

    try:
        value = json.loads(
            text,
            parse_constant=constant,
            parse_float=number,
            parse_int=whole,
            object_pairs_hook=pairs,
        )
    except Wrong:
        raise
    except ValueError as e:
        raise Wrong(f"is no valid JSON ({e})") from e
    except RecursionError:
        raise Wrong("is nested too deeply") from None
    _measure(value, {}, 0)
    return value


class _Loader(yaml.SafeLoader):
    """YAML with every key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        for name in seen:
            if seen.count(name) > 1 and name != "<<":
                raise Wrong(
                    f"the key {name!r} stands there twice (line {node.start_mark.line + 1})"
                )
        return super().construct_mapping(node, deep)


def from_yaml(text: str) -> Any:
    """What YAML says: plain values, every key once, no NaN, not too deep, no bomb of aliases.

    Raises:
        Wrong: It is none; says why.
    """
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except Wrong:
        raise
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise Wrong(f"is no valid YAML ({e.problem}{line})") from e
    except RecursionError:
        raise Wrong("is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError, LookupError) as e:
        said = str(e).strip().splitlines() or [type(e).__name__]
        raise Wrong(f"is no valid YAML ({said[0]})") from e
    _measure(value, {}, 0)
    return value


def _measure(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are, what is shared counted as often as it stands there."""
    if depth > DEPTH:
        raise Wrong(f"is nested more than {DEPTH} deep")
    if isinstance(value, str):
        if "\0" in value:
            raise Wrong(f"the text {value[:40]!r} holds a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Wrong(f"the text {value[:40]!r} holds half a character (a surrogate)") from None
        return 1
    if isinstance(value, float) and math.isnan(value):
        raise Wrong("NaN is no value; one that is not known is null")
    if isinstance(value, int) and not -(1 << 128) < value < 1 << 128:
        raise Wrong(f"{str(hex(value))[:40]}... is beyond what a number can be")
    if not isinstance(value, dict | list):
        if value is None or isinstance(value, bool | int | float):
            return 1
        raise Wrong(f"{value!r:.60} is neither text, number, list nor object")
    if id(value) not in known:
        known[id(value)] = VALUES + 1  # of one that contains itself
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        total = 1
        for part in parts:
            total += _measure(part, known, depth + 1)
        known[id(value)] = total
    if known[id(value)] > VALUES:
        raise Wrong(f"holds more than {VALUES:,} values")
    return known[id(value)]


def plain(value: Any) -> Any:
    """The same as JSON can say it: what is no finite number becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file whole; NaN and infinity are written as null."""
    write_text(path, json.dumps(plain(values), indent=2, allow_nan=False) + "\n")
