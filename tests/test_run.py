"""A run's folder, and tables that outlive a kill."""

import json
import math

import pytest

from kanllama_lightning.run import Table, make_folder
from kanllama_lightning.saved import checkpoints
from kanllama_lightning.small_files import write_json
from kanllama_lightning.types import InputError
from tests.conftest import read_rows

COLUMNS = ("step", "name", "loss")


def steps(path):
    return [int(row["step"]) for row in read_rows(path)]


@pytest.fixture
def table(tmp_path):
    made = Table(tmp_path / "t.csv", COLUMNS)
    made.append([{"step": s, "name": f"n{s}", "loss": s / 3} for s in (1, 2)])
    made.append([{"step": 2, "name": 'a "b", c', "loss": math.pi * 1e-20}])
    return made


def test_rows_read_back_exactly(table):
    assert read_rows(table.path)[2] == {
        "step": "2",
        "name": 'a "b", c',
        "loss": repr(math.pi * 1e-20),
    }
    assert [float(row["loss"]) for row in read_rows(table.path)] == [1 / 3, 2 / 3, math.pi * 1e-20]
    assert table.path.read_text().count("step") == 1  # one header


def test_cut_drops_later_steps(table):
    before = table.path.read_bytes()
    table.cut(2)
    assert table.path.read_bytes() == before
    table.cut(1)
    assert steps(table.path) == [1]
    table.cut(0)
    assert steps(table.path) == []
    table.append([{"step": 9, "name": "n", "loss": 0.5}])
    assert steps(table.path) == [9]
    assert [p.name for p in table.path.parent.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("left", ["2", "2,", "2,n"])
def test_cut_drops_a_last_line_that_misses_columns(table, left):
    with table.path.open("a", newline="") as file:
        file.write(left)
    table.cut(100)
    assert steps(table.path) == [1, 2, 2]
    table.append([{"step": 3, "name": "n", "loss": 1.5}])
    assert read_rows(table.path)[-1] == {"step": "3", "name": "n", "loss": "1.5"}


@pytest.mark.parametrize("n_left", [0, 1, 20])
def test_cut_drops_a_last_line_cut_short_within_its_last_field(table, n_left):
    """3.14...e-20 would become nothing, 3, or 3.14...e-2."""
    data = table.path.read_bytes()
    table.path.write_bytes(data[: data.rindex(b",") + 1 + n_left])
    table.cut(100)
    assert steps(table.path) == [1, 2]


def test_cut_of_a_torn_header_leaves_an_empty_table(table):
    table.path.write_text("step,na")
    table.cut(100)
    table.append([{"step": 3, "name": "n", "loss": 1.5}])
    assert read_rows(table.path) == [{"step": "3", "name": "n", "loss": "1.5"}]


def test_cut_without_a_file(tmp_path):
    Table(tmp_path / "none.csv", COLUMNS).cut(3)
    assert not list(tmp_path.iterdir())


def test_unknown_columns_are_refused(table):
    with pytest.raises(ValueError, match="los"):
        table.append([{"step": 1, "name": "", "los": 1.0}])


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
