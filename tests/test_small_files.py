"""Small files: what is right comes back as it is, everything else is one InputError."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from kanllama_lightning.storage.small_files import (
    Count,
    Digest,
    FileName,
    Within,
    Wrong,
    check,
    from_json,
    from_yaml,
    plain,
    read_csv,
    read_json,
    read_yaml,
    there,
    write_json,
)
from kanllama_lightning.types import InputError


class Thing(TypedDict):
    name: str
    size: Count
    rate: NotRequired[float | None]
    parts: NotRequired[list[Annotated[int, Within(0, 9)]]]


@pytest.mark.parametrize(
    ("value", "schema", "want"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (None, float | None, None),
        ({"a": [1, 2]}, dict[str, list[int]], {"a": [1, 2]}),
        ({"name": "x", "size": 0, "more": object}, Thing, {"name": "x", "size": 0, "more": object}),
        ("b", Literal["a", "b"], "b"),
        ("ab" * 32, Digest, "ab" * 32),
        ("step=1.ckpt", FileName, "step=1.ckpt"),
        ([1, "x", None], list[Any], [1, "x", None]),
    ],
)
def test_check_returns_what_is_as_the_schema_says(value, schema, want):
    got = check(value, schema)
    assert got == want
    assert type(got) is type(want)


@pytest.mark.parametrize(
    ("value", "schema", "says"),
    [
        (True, int, "it=True must be a whole number"),
        (1, bool, "true or false"),
        (2**70, int, "a whole number"),
        (math.nan, float, "it=nan must be a finite number"),
        (math.inf, float, "a finite number"),
        (10**400, float, "a finite number"),
        ("1", float, "a finite number"),
        ({"name": "x"}, Thing, "size is missing"),
        ({"name": "x", "size": -1}, Thing, "size=-1 must be a whole number of at least 0"),
        ({"name": "x", "size": 1, "rate": "1"}, Thing, "rate='1' must be a finite number"),
        ({"name": "x", "size": 1, "parts": [1, 10]}, Thing, r"parts\[1\]=10 .* at least 0 up to 9"),
        ([1], Thing, "must be an object with keys"),
        ({1: 2}, dict[str, int], "key 1 of it=1 must be a text"),
        ("../x", FileName, "without a folder"),
        ("..", FileName, "without a folder"),
        ("c", Literal["a", "b"], "'a' or 'b'"),
        (1, Literal[True], "must be True"),
        (None, int | str, "a whole number or a text"),
    ],
)
def test_check_says_what_must_be(value, schema, says):
    with pytest.raises(Wrong, match=says):
        check(value, schema)


BAD_JSON = {
    "cut short": b'{"a": 1',
    "no object": b"[1]",
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflow": b'{"a": 1e999}',
    "a long integer": b'{"a": ' + b"9" * 5000 + b"}",
    "a large integer": b'{"a": ' + b"9" * 39 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "no utf-8": b'{"a": "\xff"}',
    "half a character": b'{"a": "\\ud83d"}',
    "nul": b'{"a": "\\u0000"}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested": b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}",
    "empty": b"",
    "zeros": b"\0" * 100,
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_damaged_json_is_one_error_that_names_file_and_remedy(tmp_path, name):
    path = tmp_path / "thing.json"
    path.write_bytes(BAD_JSON[name])
    with pytest.raises(InputError) as error:
        read_json(path, remedy="make it again")
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert said.endswith("; make it again")
    assert len(said) < 400 + len(str(path))
    assert "\n" not in said


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(65 << 20)
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, says in {
        "folder": "is a folder where a file should be",
        "pipe": "is no ordinary file",
        "big": "67,108,864 are the most",
        "none": "is missing",
        "loop": "cannot be read",
        "x" * 300: "cannot be read .*too long",
    }.items():
        with pytest.raises(InputError, match=says):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="is missing"):
        read_json(big / "below.json")
    assert there(big)
    assert not there(tmp_path / "none.json")
    assert not there(big / "below.json")


def test_a_file_one_may_not_read_says_so():
    """In a process of its own, which is nobody's if it would be root's."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.json"
        path.write_text("{}")
        path.chmod(0)
        path.parent.chmod(0o755)
        read, write = os.pipe()
        if not os.fork():
            said = "nothing"
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                read_json(path)
            except BaseException as e:
                said = repr(e)
            os.write(write, said.encode())
            os._exit(0)
        os.wait()
        said = os.read(read, 4096).decode()
    assert said.startswith("InputError(")
    assert "Permission denied" in said
    assert "chmod" in said


BAD_YAML = {
    "nul": b"a: 1\0",
    "a key twice": b"a: 1\nb: {c: 1, c: 2}\n",
    "cut short": b"a: [1, 2",
    "a list": b"- 1\n",
    "a date": b"a: 2020-01-01\n",
    "no date": b"a: 2020-99-99\n",
    "nan": b"a: .nan\n",
    "a set": b"a: !!set {b}\n",
    "python": b"a: !!python/object/apply:os.system [echo]\n",
    "bytes": b"a: !!binary aGVsbG8=\n",
    "tab": b"a:\n\t- b\n",
    "number as a key": b"1: 2\n",
    "a list as a key": b"? [a, b]\n: 1\n",
    "deep": b"a: " + b"[" * 3000 + b"]" * 3000,
    "a bomb": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
    "itself": b"a: &a [*a]\n",
    "a long integer": b"a: " + b"9" * 5000,
    "large": b"# " + b"x" * (1 << 20),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_damaged_yaml_is_one_error(tmp_path, name):
    path = tmp_path / "thing.yaml"
    path.write_bytes(BAD_YAML[name])
    with pytest.raises(InputError) as error:
        read_yaml(path, remedy="make it again")
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert said.endswith("; make it again")
    assert "\n" not in said


def test_yaml_that_is_right_comes_back():
    text = "a: &x {b: [1, 2.5, true, null, text], d: .inf}\nc: *x\n"
    tree = {"b": [1, 2.5, True, None, "text"], "d": math.inf}
    assert from_yaml(text) == {"a": tree, "c": tree}


def test_csv_is_read_by_its_types(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'step,x,name,more\r\n1,0.5,"a,\r\nb",z\r\n2,,nan,\r\n')
    columns = {"step": int, "x": float | None, "name": str}
    assert read_csv(path, columns) == [
        {"step": 1, "x": 0.5, "name": "a,\r\nb", "more": "z"},
        {"step": 2, "x": None, "name": "nan", "more": ""},
    ]
    for text, says in {
        b"step,x\r\n1,2\r\n": "no column 'name'",
        b"step,step,x,name\r\n": "more than once",
        b"step,x,name\r\n1,2\r\n": "row 2 has 2 cells, the header 3",
        b"step,x,name\r\n1.5,2,a\r\n": r"row 2, step='1\.5' must be a whole number",
        b"step,x,name\r\n1,nan,a\r\n": "row 2, x=nan must be a finite number",
        b"step,x,name\r\n1,1e999,a\r\n": "finite",
        b'step,x,name\r\n1,2,"a\r\n': "unexpected end of data",
        b"step,x,name\r\n" + b"9" * 5000 + b",2,a\r\n": "whole number",
        b"step,x,name\r\n1,2,\xff\r\n": "no text in UTF-8",
        b"": "no column 'step'",
    }.items():
        path.write_bytes(text)
        with pytest.raises(InputError, match=says):
            read_csv(path, columns)
    path.write_bytes(b"step,x,name\r\n1,2,a\r\n2,3")
    with pytest.raises(InputError, match="row 3"):
        read_csv(path, columns)
    assert [r["step"] for r in read_csv(path, columns, whole=False)] == [1]


def test_what_is_not_known_is_null(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": math.inf}, "e": (1, "x")})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": None},
        "e": [1, "x"],
    }
    assert read_json(path)["b"] == [1.5, None]
    assert plain(1.5) == 1.5


def test_json_keeps_what_python_would_change():
    assert from_json('{"a": 1.0, "b": "\\u00e4\\ud83d\\ude00"}') == {"a": 1.0, "b": "ä😀"}
