"""A run's folder, and tables that outlive a kill."""

import json
import math

import pytest

from kanllama_lightning.runs.checkpoints import checkpoints
from kanllama_lightning.runs.folder import Table, make_folder
from kanllama_lightning.storage.small_files import write_json
from kanllama_lightning.types import InputError
from tests.conftest import read_rows

COLUMNS = ("step", "name", "loss")


def steps(path):
    return [int(row["step"]) for row in read_rows(path)]


def row(step, name="n", loss=1.5):
    return {"step": step, "name": name, "loss": loss}


@pytest.fixture
def table(tmp_path):
    made = Table(tmp_path / "t.csv", COLUMNS)
    made.put(1, [row(1, "n1", 1 / 3)])
    made.put(2, [row(2, "n2", 2 / 3), row(2, 'a "b", c', math.pi * 1e-20)])
    return made


def test_rows_read_back_exactly(table):
    assert read_rows(table.path)[2] == {
        "step": "2",
        "name": 'a "b", c',
        "loss": repr(math.pi * 1e-20),
    }
    assert [float(row["loss"]) for row in read_rows(table.path)] == [1 / 3, 2 / 3, math.pi * 1e-20]
    assert table.path.read_text().count("step") == 1  # one header


def test_rows_of_a_step_take_the_place_of_those_of_it_and_later_ones(table):
    before = table.path.read_bytes()
    table.put(3, [])
    assert table.path.read_bytes() == before
    table.put(2, [row(2, "again")])
    assert [(r["step"], r["name"]) for r in read_rows(table.path)] == [("1", "n1"), ("2", "again")]
    table.put(1, [])
    assert steps(table.path) == []
    table.put(9, [row(9)])
    assert steps(table.path) == [9]
    assert [p.name for p in table.path.parent.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("left", ["2", "2,", "2,n"])
def test_a_last_line_that_misses_columns_goes(table, left):
    with table.path.open("a", newline="") as file:
        file.write(left)
    table.put(3, [row(3)])
    assert steps(table.path) == [1, 2, 2, 3]
    assert read_rows(table.path)[-1] == {"step": "3", "name": "n", "loss": "1.5"}


@pytest.mark.parametrize("n_left", [0, 1, 20])
def test_a_last_line_cut_short_within_its_last_field_goes(table, n_left):
    """3.14...e-20 would become nothing, 3, or 3.14...e-2."""
    data = table.path.read_bytes()
    table.path.write_bytes(data[: data.rindex(b",") + 1 + n_left])
    table.put(100, [])
    assert steps(table.path) == [1, 2]


def test_a_torn_header_leaves_an_empty_table(table):
    table.path.write_text("step,na")
    table.put(3, [row(3)])
    assert read_rows(table.path) == [{"step": "3", "name": "n", "loss": "1.5"}]


def test_a_table_of_others_is_named_and_left_alone(table):
    for data in (b"step,name\r\n1,a\r\n", b"\xff\xfe\r\n\r\n", b"step,name,loss\r\nx,y,z\r\n"):
        table.path.write_bytes(data)
        with pytest.raises(InputError, match=r"t\.csv: .*; move it away"):
            table.put(9, [row(9)])
        assert table.path.read_bytes() == data
    assert [p.name for p in table.path.parent.iterdir()] == ["t.csv"]


def test_unknown_columns_are_refused(table):
    before = table.path.read_bytes()
    with pytest.raises(ValueError, match="los"):
        table.put(1, [{"step": 1, "name": "", "los": 1.0}])
    assert table.path.read_bytes() == before


def test_make_folder(tmp_path):
    made = make_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert make_folder(made) == made  # again


def test_make_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"run folder .*file.*cannot be made.*--runs_dir"):
            make_folder(folder)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (1000, 200, 30):
        (folder / f"step={step:09d}.ckpt").touch()
    (folder / "step=000000900.ckpt.tmp").touch()  # being written when the run was killed
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path)] == [30, 200, 1000]
    assert checkpoints(tmp_path / "nowhere") == []


def test_write_json_replaces_the_file_whole(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": [1, 2, 3], "b": "long " * 100})
    write_json(path, {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1.5}
