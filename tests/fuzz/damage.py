"""What happens to files: edits of their bytes and of the tree they hold, drawn by hypothesis."""

import contextlib
import copy
import json
import math
from typing import Any, NamedTuple

from hypothesis import strategies as st

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**70, -(2**70), 0.5, 1e308, -1e308, 1e-320),
    *(math.nan, math.inf, -math.inf, "", "x", "nan", "0", "1e999", "last", "é", "\ud83d", "a\0b"),
    *(
        "../../../etc/passwd",
        "/dev/null",
        "no/such",
        "tests.fuzz.evil.Evil",
        "os.system",
        "KANEncoder",
        "PCA",
    ),
    *("x" * 5000, "\n", "\r\n", "{", "=1+1", [], {}, [None], [[1]], {"a": {}}, {"class_path": "x"}),
    *({"class_path": "tests.fuzz.evil.Evil", "init_args": {}}, DEEP, list(range(300)), "9" * 400),
)
RAW = (
    *(b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"Infinity", b"1e999", b"9" * 5000, b"\r"),
    *(
        b"{",
        b"}",
        b"[" * 100_000,
        b"]",
        b'"',
        b",",
        b":",
        b"\n",
        b"\\ud800",
        b"null",
        b"-",
        b"&a *a",
    ),
    *(b"!!python/name:os.system ", b"\xed\xa0\x80", b"- ", b"'", b"\t", b"true", b"..", b"%"),
)


class Edit(NamedTuple):
    """One thing that happens; what it means depends on what is edited."""

    how: int
    where: int
    what: int
    much: int


edits = st.lists(
    st.builds(
        Edit,
        st.integers(0, 11),
        st.integers(0, 9999),
        st.integers(0, 999),
        st.integers(0, 999),
    ),
    min_size=1,
    max_size=3,
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Containers and keys of everything in a tree."""
    found: list[tuple[Any, Any]] = []
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def edited(tree: Any, changes: list[Edit]) -> Any:
    """A tree after edits of its values and keys."""
    tree = copy.deepcopy(tree)
    for change in changes:
        found = places(tree) if isinstance(tree, dict | list) else []
        if not found or change.how == 11:
            return copy.deepcopy(ODD[change.what % len(ODD)])
        holder, key = found[change.where % len(found)]
        odd = copy.deepcopy(ODD[change.what % len(ODD)])
        number = isinstance(holder[key], int | float) and not isinstance(holder[key], bool)
        if change.how in (0, 1, 2, 3):
            holder[key] = odd
        elif change.how == 4:
            del holder[key]
        elif change.how == 5 and isinstance(holder, dict):
            holder[str(odd)[:50]] = holder.pop(key)
        elif change.how == 6 and isinstance(holder, dict):
            holder[f"more{change.much}"] = odd
        elif change.how == 7:
            other, place = found[change.much % len(found)]
            with contextlib.suppress(KeyError, IndexError):
                holder[key] = copy.deepcopy(other[place])
        elif change.how == 8 and number:
            holder[key] = holder[key] * (-1) ** change.much * 10 ** (change.what % 25)
        elif change.how == 9 and number:
            holder[key] = holder[key] + change.much - 500
        elif change.how == 10:
            holder[key] = [holder[key]] if change.much % 2 else str(holder[key])
    return tree


def broken(data: bytes, changes: list[Edit]) -> bytes:
    """Bytes after edits: cut, flipped, overwritten, put in, taken out, doubled."""
    for change in changes:
        at = change.where * (len(data) + 1) // 10_000
        piece = RAW[change.what % len(RAW)]
        end = min(len(data), at + 1 + change.much % 40)
        how = change.how % 8
        if how == 0:
            data = data[:at]
        elif how == 1:
            data = (
                data[:at]
                + bytes(b ^ (1 << change.what % 8) for b in data[at : at + 1])
                + data[at + 1 :]
            )
        elif how == 2:
            data = data[:at] + piece + data[at:]
        elif how == 3:
            data = data[:at] + piece + data[at + len(piece) :]
        elif how == 4:
            data = data[:at] + data[end:]
        elif how == 5:
            data = data[:at] + data[at:end] * 2 + data[end:]
        elif how == 6:
            data = data[:at] + bytes([change.what % 256]) * (end - at) + data[end:]
        else:
            data = data[:at] + data[end:] + data[at:end]
    return data


def damaged_json(data: bytes, changes: list[Edit]) -> bytes:
    """A JSON file after edits: half of the time of its tree, else of its bytes."""
    if changes[0].much % 3 == 0:
        return broken(data, changes)
    return json.dumps(edited(json.loads(data), changes)).encode("utf-8", "surrogatepass")
