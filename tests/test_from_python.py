"""`from kanllama_lightning import load`, and the notebook."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import kanllama_lightning
from kanllama_lightning import load
from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.prompts.try_text import try_text
from kanllama_lightning.storage.small_files import write_json
from kanllama_lightning.types import InputError
from tests.reports.test_capability import started_head
from tests.shapes import unchecked
from train import main as train

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
TEXT = "w1 w2 w3 w4 w5 w6"


@pytest.fixture
def sae(run_folder):
    return load(run_folder, device="cpu")


@pytest.fixture(scope="module")
def recorded(finished, tmp_path_factory):
    """A finished run with a record; not to be changed."""
    folder = shutil.copytree(finished.folder, tmp_path_factory.mktemp("recorded") / "run")
    asked = ["--reports", "latents", "dashboard", "--documents", "12", "--wandb", "false"]
    assert evaluate(["report", str(folder), *asked]) == 0
    return folder


def test_the_package_stays_light():
    code = "import sys, kanllama_lightning; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        kanllama_lightning.lode  # noqa: B018


def test_a_text_gives_its_tokens_and_sparse_latents(sae):
    found = sae(TEXT)
    assert found.tokens == TEXT.split()
    assert found.positions == [1, 2, 3, 4, 5, 6]
    assert found.latents.is_sparse
    assert not found.latents.requires_grad
    ids = torch.tensor([[0, *sae.lm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        dense = sae.head.encode(sae.lm.acts(ids)[0, 1:])
    torch.testing.assert_close(found.latents.to_dense(), dense)
    assert (dense != 0).any()


def test_the_strongest_are_those_of_try(sae):
    found = sae(TEXT)
    top = found.top(3)
    for position, token in enumerate(try_text(sae.head, sae.lm, TEXT, latents=3).tokens, start=1):
        own = top[top["position"] == position]
        assert list(zip(own["latent"], own["activation"], strict=True)) == token.latents
        assert set(own["token"]) <= {token.token}
    assert list(top.columns) == ["position", "token", "latent", "activation", "label"]
    assert f"{top['latent'][0]} {top['activation'][0]:.2f}" in repr(found)
    for n in (0, True, 1.5):
        with unchecked(), pytest.raises(InputError, match="whole numbers from 1 up"):
            found.top(n)


def test_special_tokens_and_sinks_are_left_out(sae):
    found = sae("w1 <eos> nothing w3")  # `nothing` is <unk>, a special token too
    assert found.tokens == ["w1", "w3"]
    assert found.positions == [1, 4]
    assert set(found.top(2)["position"]) <= {1, 4}
    norms = sae.lm.acts(torch.tensor([[0, 4, 5, 6, 7, 8, 9]]))[0, 1:].norm(dim=1)
    sae.head.norm_limit.copy_(norms.sort().values[-2])
    assert len(sae(TEXT)) == 5
    assert len(sae("<eos>")) == 0
    assert sae("<eos>").top().empty


def test_several_texts(sae):
    one, other = sae(["w1 w2", TEXT])
    assert (len(one), len(other)) == (2, 6)
    assert repr(other) == repr(sae(TEXT))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_activations_of_any_shape(leading, sae):
    x = torch.randn(*leading, 16, requires_grad=True)
    latents = sae.encode(x)
    assert latents.shape == (*leading, 32)
    assert not latents.requires_grad
    rows = x.detach().reshape(-1, 16)
    torch.testing.assert_close(latents.reshape(-1, 32), sae.head.encode(rows).detach())
    assert sae.decode(latents).shape == x.shape
    assert sae.encode(x.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 5), r"x: has the shape \[2, 5\]; activations are \[\.\.\., 16\]"),
        (torch.tensor(1.0), r"x: has the shape \[\]"),
        (np.zeros((2, 16)), r"x: is a ndarray; give a tensor \(`torch.as_tensor\(x\)`\)"),
        (torch.zeros(2, 16, dtype=torch.int64), "x: holds int64; activations are floating-point"),
        (torch.full((2, 16), torch.nan), "x: 2 of 2 rows are NaN or infinite"),
    ],
    ids=str,
)
def test_what_are_no_activations_is_said(x, said, sae):
    with unchecked(), pytest.raises(InputError, match=said):
        sae.encode(x)


def test_what_is_no_text_is_said(sae):
    for text, said in {
        3: "text=3: is a int; give a text",
        "": "has no tokens",
        "w1 " * 200: "128",
    }.items():
        with unchecked(), pytest.raises(InputError, match=said):
            sae(text)


def test_steering_is_that_of_try(sae):
    tried = try_text(sae.head, sae.lm, TEXT, n_new=4, steer={3: 50.0})
    expected = TEXT + "".join(tried.continuations["steered"].pieces)
    assert sae.steer({3: 50.0}).generate(TEXT, tokens=4) == expected
    plain = TEXT + "".join(tried.continuations["original"].pieces)
    assert sae.steer({}).generate(TEXT, tokens=4) == plain
    assert sae.steer({3: 1}).generate(TEXT, tokens=0) == TEXT
    wrong = {
        "latents 0 to 31": {32: 1.0},
        "finite number": {3: float("nan")},
        "steer='3'": {"3": 1},
    }
    for said, latents in wrong.items():
        with unchecked(), pytest.raises(InputError, match=said):
            sae.steer(latents)
    with pytest.raises(InputError, match="tokens=-1: whole numbers from 0 up"):
        sae.steer({}).generate(TEXT, tokens=-1)


def test_labels_contexts_and_lens_from_the_record(recorded):
    sae = load(recorded, device="cpu")
    top = sae(TEXT).top(1)
    latent, label = int(top["latent"][0]), top["label"][0]
    assert label
    assert sae.label(latent) == label
    first, *others = sae.contexts(latent, 3)
    assert first.activations[first.peak] == max(first.activations) > 0
    assert all(o.activations[o.peak] <= first.activations[first.peak] for o in others)
    assert f"[[{first.tokens[first.peak]}]]" in repr(first)
    assert repr(first.tokens[first.peak].strip()).strip("'") in label
    computed, read = sae.lens(latent), sae._recorded_lens(latent, 10)
    assert [t for t, _ in computed.raised] == [t for t, _ in read.raised]
    for ends in ("raised", "lowered"):
        values = [[v for _, v in getattr(one, ends)] for one in (computed, read)]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert computed[2:] == pytest.approx(read[2:], rel=1e-4)
    assert len(sae.lens(latent, top=2).raised) == 2


def test_without_a_record_the_command_is_named(sae, run_folder):
    for ask, report in ((sae.label, "latents"), (sae.contexts, "dashboard")):
        command = f"`python evaluate.py report {run_folder} --reports {report}` makes it"
        with pytest.raises(InputError, match=re.escape(command)):
            ask(3)
    assert sae.labels == {}
    for ask in (sae.label, sae.contexts, sae.lens):
        with pytest.raises(InputError, match="latent=32: there are latents 0 to 31"):
            ask(32)


def test_a_record_of_other_weights_or_damaged_is_not_read(recorded, tmp_path):
    folder = shutil.copytree(recorded, tmp_path / "run")
    (folder / "eval" / "dashboard.html").write_text("<html>")
    with pytest.raises(InputError, match="cannot be read back .* --again true` makes it anew"):
        load(folder).contexts(3)
    page = (recorded / "eval" / "dashboard.html").read_text()
    (folder / "eval" / "dashboard.html").write_text(page.replace('id="texts">', 'id="texts">AAAA'))
    with pytest.raises(InputError, match="cannot be read back"):
        load(folder).contexts(3)
    table = folder / "eval" / "logit_lens.csv"
    table.write_text(table.read_text().replace("[", "{"))
    with pytest.raises(InputError, match=r"logit_lens.csv: is damaged: .* makes it anew"):
        load(folder)._recorded_lens(int(load(folder)(TEXT).top(1)["latent"][0]), 3)
    summary = folder / "eval" / "summary.json"
    write_json(summary, json.loads(summary.read_text()) | {"head_sha256": "0" * 64})
    assert load(folder).labels == {}


def test_runs_heads_and_folders(run_folder, tiny_lm_dir, make_lm):
    runs = run_folder.parent
    alone = shutil.copytree(run_folder / "head", runs.parent / "alone")
    both = runs / "both"
    for name in ("a", "b"):
        shutil.copytree(run_folder, both / name)
    write_json(both / "summary.json", {"heads": ["a", "b"], "finished": True})
    expected = repr(load(run_folder)(TEXT))
    for name, folder in {
        "last": None,
        run_folder.name[:8]: run_folder,
        str(run_folder / "head"): run_folder,
        str(run_folder / "head" / "head.safetensors"): run_folder,
        "both/a": both / "a",
        str(alone): alone,
    }.items():
        if folder is None:
            continue
        found = load(name, runs_dir=runs, device="cpu")
        assert found.folder == folder
        assert repr(found(TEXT)) == expected
    with pytest.raises(InputError, match="name the folder of one of them: .*both/a"):
        load("both", runs_dir=runs)
    shutil.rmtree(both)
    assert load("last", runs_dir=runs).folder == run_folder
    assert load(runs_dir=runs).folder == run_folder
    with pytest.raises(InputError, match="name='lst': no such folder, .* Did you mean last"):
        load("lst", runs_dir=runs)
    assert repr(load(alone, lm=make_lm(), device="cpu")(TEXT)) == expected
    card = json.loads((alone / "head.json").read_text())
    assert card["provenance"]["lm"] == str(tiny_lm_dir)
    card["provenance"]["lm"] = "/gone"
    write_json(alone / "head.json", card)
    with pytest.raises(InputError, match=r"/gone.* Give it with load\(.*alone', lm="):
        load(alone)
    assert repr(load(alone, lm=tiny_lm_dir)(TEXT)) == expected
    write_json(alone / "head.json", card | {"provenance": {}})
    with pytest.raises(InputError, match=r"lm\.name.* lm=.* hook_point="):
        load(alone)
    found = load(alone, lm=tiny_lm_dir, hook_point="model.layers.1.mlp")
    assert repr(found(TEXT)) == expected


def test_another_lm_is_refused(run_folder):
    with pytest.raises(InputError, match="width 128, the head reads 16"):
        load(run_folder, lm=FrozenLM("embedded", "model.layers.1.mlp"))


@pytest.fixture
def embedded_run(tmp_path):
    """The folder of a head of the embedded model that has seen its activations."""
    lm = FrozenLM("embedded", "model.layers.1.mlp").load_()
    head: SAEHead = started_head(lm, d_sae=64, k=8)
    head.save(tmp_path / "runs" / "made" / "head", {"lm": lm.name, "hook_point": lm.hook_point})
    return tmp_path / "runs" / "made"


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Execute the code of the notebook in order, as a kernel does that begins in `folder`."""
    monkeypatch.chdir(folder)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names: dict = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    return names


@pytest.mark.usefixtures("embedded_run")
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    names = run_notebook(tmp_path / "docs", monkeypatch)
    out = capsys.readouterr().out
    assert "no record yet: make record" in out
    assert len(re.findall("^Tom went", out, re.MULTILINE)) == 2
    assert names["text"].tokens[:2] == ["Tom", " went"]
    assert names["latents"].shape == (2, 4, 64)
    assert len(names["figure"].data) > 1


@pytest.mark.slow
def test_the_notebook_runs_on_a_run_with_a_record(tmp_path, monkeypatch, capsys):
    given = {"model.tokens": 40000, "model.start_tokens": 4096, "model.head.d_sae": 128}
    given |= {"data.val_tokens": 8192, "trainer.logger": "false", "runs_dir": tmp_path / "runs"}
    configs = [f"--config={ROOT / 'configs' / name}.yaml" for name in ("batch_topk", "embedded")]
    assert train(["fit", *configs, *[f"--{k}={v}" for k, v in given.items()]]) == 0
    monkeypatch.chdir(tmp_path)
    asked = ["--reports", "latents", "dashboard", "--documents", "50", "--wandb", "false"]
    assert evaluate(["report", "last", *asked]) == 0
    page = (ROOT / "docs" / "python.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(block.splitlines()) <= 10
    exec(block, {"x": torch.zeros(2, 3, 128)})
    (tmp_path / "docs").mkdir()
    capsys.readouterr()
    run_notebook(tmp_path / "docs", monkeypatch)
    assert "[[" in capsys.readouterr().out
