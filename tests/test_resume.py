"""Which checkpoint a run goes on from, and which it must not."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import yaml

from kanllama_lightning.cli.resume import compare, find_checkpoint
from kanllama_lightning.runs.checkpoints import remove, seal
from kanllama_lightning.runs.seals import written
from kanllama_lightning.types import InputError
from tests.fuzz.areas import CHECKPOINT, run_folder
from tests.fuzz.areas import CONFIG as OWN

CONFIG = {
    "seed_everything": 0,
    "runs_dir": "runs",
    "model": {"tokens": 1000, "head": {"class_path": "TopK", "init_args": {"target_l0": 4}}},
    "trainer": {"max_steps": -1, "devices": 1, "precision": "32-true", "logger": {"a": 1}},
    "data": {"val": [{"path": "a"}], "options": {}},
}


def text(**changes):
    """The configuration as YAML, with `a.b=value` changed."""
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return yaml.safe_dump(config)


def run(folder, config=None, steps=(1,), finished=None, age=0):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config or text())
    for step in steps:
        path = folder / "checkpoints" / f"step={step:09d}.ckpt"
        torch.save(CHECKPOINT, path)
        seal(path, [written(path)])
        os.utime(path, (1e9 - age, 1e9 - age))
    if finished is not None:
        summary = {"finished": finished, "steps": steps[-1], "tokens": 1000}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "head").mkdir()
        (folder / "head" / "head.json").touch()
    return folder


def find(asked, runs_dir="nowhere", config=None, run=None, exact=True):
    return find_checkpoint(asked, str(runs_dir), config or text(), run, exact)


# ------------------------------------------------------------------------- compare


def test_the_same_configuration():
    assert compare(text(), text()) == []


def test_what_differs_is_named_with_both_values():
    given = text(model__head__init_args__target_l0=8, data__val=[{"path": "b"}], seed_everything=1)
    assert compare(text(), given) == [
        "data.val: [{'path': 'a'}] in the run, [{'path': 'b'}] now",
        "model.head.init_args.target_l0: 4 in the run, 8 now",
        "seed_everything: 0 in the run, 1 now",
    ]


def test_what_is_missing_or_new_differs():
    more = text(model__head__init_args={"target_l0": 4, "seed": 3})
    assert compare(text(), more) == ["model.head.init_args.seed: None in the run, 3 now"]
    assert compare(more, text()) == ["model.head.init_args.seed: 3 in the run, None now"]
    assert compare(text(), text(data__options={"a": 1})) != []


@pytest.mark.parametrize(
    "change",
    [
        {"runs_dir": "elsewhere"},
        {"model__tokens": 5000},
        {"ckpt_path": "last"},
        {"trainer__max_steps": 10},
        {"trainer__devices": 2},
        {"trainer__logger": {"a": 2, "b": {"c": 3}}},
        {"trainer__logger": None},
    ],
)
def test_what_may_differ(change):
    assert compare(text(), text(**change)) == []


@pytest.mark.parametrize("key", ["trainer__precision", "trainer__devices_", "model__tokens_seen"])
def test_names_that_only_begin_like_a_free_one_are_not_free(key):
    assert len(compare(text(), text(**{key: "other"}))) == 1


# ----------------------------------------------------------------- find_checkpoint


def test_last_is_the_newest_unfinished_run_of_this_configuration(tmp_path):
    run(tmp_path / "older", age=30)
    want = run(tmp_path / "wanted", steps=(5, 40, 300), age=20)
    run(tmp_path / "other", text(seed_everything=9), age=10)
    run(tmp_path / "done", finished=True)
    run(tmp_path / "empty", steps=())
    (tmp_path / "a file").touch()
    found = find("last", tmp_path)
    assert found == want / "checkpoints" / "step=000000300.ckpt"


def test_a_run_that_was_cut_short_is_unfinished(tmp_path):
    """Stopped by a limit, it has a summary too."""
    short = run(tmp_path / "short", finished=False)
    assert find("last", tmp_path).parent.parent == short


def test_last_with_nothing_to_go_on_from(tmp_path):
    with pytest.raises(InputError, match="nothing to go on with") as error:
        find("last", tmp_path / "none")
    assert "Unfinished" not in str(error.value)


def test_last_names_runs_of_other_configurations(tmp_path):
    other = run(tmp_path / "other", text(seed_everything=9))
    with pytest.raises(InputError) as error:
        find("last", tmp_path)
    assert f"{other} differs in seed_everything: 9 in the run, 0 now" in str(error.value)


def test_last_of_a_named_run(tmp_path):
    mine = run(tmp_path / "mine", steps=(1, 2), age=10)
    run(tmp_path / "newer")
    assert find("last", tmp_path, run=str(mine)).name == "step=000000002.ckpt"
    assert find("last", tmp_path, run=str(mine)).parent.parent == mine


def test_a_folder_or_a_file(tmp_path):
    mine = run(tmp_path / "mine", steps=(1, 2))
    file = mine / "checkpoints" / "step=000000001.ckpt"
    assert find(str(mine)).name == "step=000000002.ckpt"
    assert find(mine).name == "step=000000002.ckpt"
    assert find(str(file)) == file


def test_another_configuration_is_refused_where_it_has_to_be_the_same(tmp_path):
    mine = run(tmp_path / "mine")
    other = text(model__head__init_args__target_l0=8)
    with pytest.raises(
        InputError, match=r"another configuration:\n.*init_args\.target_l0: 4 in.*8 now"
    ):
        find(str(mine), config=other)
    assert find(str(mine), config=other, exact=False).is_file()


def test_a_run_without_checkpoints(tmp_path):
    mine = run(tmp_path / "mine", steps=())
    with pytest.raises(InputError, match="holds no whole checkpoint to go on from"):
        find(str(mine))
    with pytest.raises(InputError, match="holds no whole checkpoint to go on from"):
        find("last", tmp_path, run=str(mine))


@pytest.mark.parametrize("exact", [True, False])
def test_no_such_file(tmp_path, exact):
    with pytest.raises(InputError, match=r"no such file; give a checkpoint file"):
        find(str(tmp_path / "nowhere.ckpt"), exact=exact)
    with pytest.raises(InputError, match="no such file"):
        find("last", tmp_path, run=str(tmp_path / "nowhere"), exact=exact)


def test_a_checkpoint_outside_its_run(tmp_path):
    alone = tmp_path / "a" / "step=000000001.ckpt"
    alone.parent.mkdir()
    torch.save(CHECKPOINT, alone)
    seal(alone, [written(alone)])
    with pytest.raises(InputError, match=r"no config\.yaml beside it"):
        find(str(alone))


# ------------------------------------------------------------------ torn checkpoints


def cut(path):
    path.write_bytes(b"")


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.fixture
def saved(tmp_path):
    """A run with two checkpoints that have something in them."""
    folder = run(tmp_path / "mine", steps=())
    for step in (1, 2):
        path = folder / "checkpoints" / f"step={step:09d}.ckpt"
        files = [path, path.with_suffix(".rank0.safetensors")]
        torch.save(CHECKPOINT, files[0])
        files[1].write_bytes(b"some bytes of " + files[1].name.encode())
        seal(path, [written(file) for file in files])
    return folder


@pytest.mark.parametrize(
    ("suffix", "harm", "why"),
    [
        (".ckpt", cut, "has 0 bytes instead of"),
        (".ckpt", flip, "checksum differs"),
        (".rank0.safetensors", flip, "checksum differs"),
        (".rank0.safetensors", lambda path: path.unlink(), "is missing"),
        (".json", lambda path: path.unlink(), "written last, is missing"),
        (".json", cut, "is no valid JSON"),
    ],
)
def test_a_torn_checkpoint_is_left_for_the_one_before_it(saved, suffix, harm, why, caplog):
    newest = saved / "checkpoints" / "step=000000002.ckpt"
    assert find(str(saved)) == newest
    harm(newest.with_suffix(suffix))
    assert find(str(saved)).name == "step=000000001.ckpt"
    assert find("last", saved.parent).name == "step=000000001.ckpt"
    assert why in caplog.text
    assert "going on from step=000000001.ckpt, the one before it" in caplog.text
    with pytest.raises(InputError, match="damaged"):
        find(str(newest))


def test_a_run_without_a_whole_checkpoint(saved):
    for path in (saved / "checkpoints").glob("*.json"):
        path.unlink()
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        find(str(saved))
    with pytest.raises(InputError, match="has no whole checkpoint"):
        find("last", saved.parent)


def test_removing_a_checkpoint_leaves_nothing_of_it(saved):
    remove(saved / "checkpoints" / "step=000000001.ckpt")
    names = {path.name for path in (saved / "checkpoints").iterdir()}
    assert names == {f"step=000000002.{end}" for end in ("ckpt", "json", "rank0.safetensors")}


# ------------------------------------------------------------------- what a folder may name


EVIL = "open({mark!r}, 'w').close()\n"


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": {"class_path": "evil_config.Corpus"}}},
        {"data": {"val": [{"class_path": "evil_config.Corpus", "init_args": {}}]}},
        {"model": {"head": "evil_config.Head"}},
        {"model": {"head": {"class_path": "evil_config.Head"}}},
        {
            "model": {
                "head": {"class_path": "KANEncoder", "init_args": {"kan_class": "evil_config.K"}}
            }
        },
        {"model": {"optimizer": {"class_path": "evil_config.Adam"}}},
        {"trainer": {"logger": "evil_config.Logger"}},
        {"trainer": {"callbacks": [{"class_path": "evil_config.Callback"}]}},
    ],
    ids=str,
)
def test_the_config_in_a_run_folder_imports_nothing(tmp_path, monkeypatch, capsys, change):
    from train import main

    mark = tmp_path / "imported"
    (tmp_path / "evil_config.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "sent" / "config.yaml"
    (config.parent / "checkpoints").mkdir(parents=True)
    config.write_text(yaml.safe_dump(change))
    assert main(["plan", "--config", str(config), "--model.head=kan"]) == 2
    said = capsys.readouterr().err
    assert "if you trust the module evil_config, allow it: `--allow evil_config`" in said
    assert said.count("\n") == 1
    assert not mark.exists()


def test_the_config_of_a_run_names_what_runs_name(tmp_path):
    """All that this project's own configurations name is allowed; one's own where it is said."""
    from kanllama_lightning.cli.arguments import _allowed, _refuse_foreign

    for path in sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml")):
        _refuse_foreign(path, yaml.safe_load(path.read_text()) or {}, [])
    assert _allowed(["fit", "--allow", "a", "b.c", "--run", "x", "--allow=d"]) == ["a", "b.c", "d"]
    foreign = {"model": {"head": {"init_args": {"kan_class": "efficient_kan.KANLinear"}}}}
    with pytest.raises(InputError, match="efficient_kan"):
        _refuse_foreign(tmp_path, foreign, ["efficient"])
    _refuse_foreign(tmp_path, foreign, ["efficient_kan"])


# --------------------------------------------------------------------- damaged neighbours


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "checkpoints/step=000000020.json"])
@pytest.mark.parametrize("what", [b"", b"\xff\xfe", b"[1", b"- 1\n", b'{"heads": 3}', None])
def test_a_damaged_neighbour_is_named_and_left_out(tmp_path, caplog, name, what):
    own, near = (run_folder(tmp_path / "runs" / one) for one in ("a", "b"))
    (near / name).unlink()
    (near / name).mkdir() if what is None else (near / name).write_bytes(what)
    os.utime(own / "checkpoints" / "step=000000020.ckpt", (2e9, 2e9))
    found = find_checkpoint("last", str(tmp_path / "runs"), yaml.safe_dump(OWN), None, True)
    assert found.parent.parent == own
    os.utime(near / "checkpoints" / "step=000000020.ckpt", (3e9, 3e9))
    found = find_checkpoint("last", str(tmp_path / "runs"), yaml.safe_dump(OWN), None, True)
    assert found.parent.parent == own or name.startswith("checkpoints")
    if what is None or name == "summary.json" and what != b"- 1\n":
        assert str(near) in caplog.text


def test_a_pickle_in_place_of_a_checkpoint_is_not_opened(tmp_path):
    from kanllama_lightning.runs.checkpoints import damage, seal
    from kanllama_lightning.runs.seals import written

    folder = run_folder(tmp_path / "run")
    path = folder / "checkpoints" / "step=000000020.ckpt"
    assert damage(path) is None
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    torch.save({"state_dict": Evil()}, path)
    seal(path, [written(path)])
    assert damage(path) == f"{path.name} holds more than tensors and plain values: it is not opened"
    path.write_bytes(pickle.dumps(Evil()))
    seal(path, [written(path)])
    assert "not opened" in damage(path) or "no checkpoint" in damage(path)
    assert not mark.exists()
    torch.save({"state_dict": {}}, path)
    seal(path, [written(path)])
    assert damage(path) == f"{path.name} is no checkpoint of a run (epoch is missing)"
