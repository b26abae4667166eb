"""`evaluate.py compare` and `try`, as people call them, on runs of the tiny model."""

import json
import re
import shutil

import pandas as pd
import pytest
import yaml

from kanllama_lightning.cli.evaluate_command import REPORTS, main
from kanllama_lightning.reports import evaluation
from tests.judge_server import JudgeServer
from tests.test_configs import ROOT


def call(*args):
    more = ["--wandb", "false"] if args[0] in ("report", "compare") else []
    assert main([*map(str, args), *more]) == 0


@pytest.fixture(scope="module")
def recorded(trained, tmp_path_factory):
    """Two finished runs, of which the first has a record of losses; not to be changed."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("recorded") / "runs")
    call("report", folder / "seed0", "--reports", "losses", "--documents", 20)
    return folder


@pytest.mark.slow
def test_the_record_is_read_from_one_page(recorded, capsys):
    folder = recorded / "seed0" / "eval"
    html = (folder / "index.html").read_text()
    links = set(re.findall(r'(?:href|src)="([^"]+)"', html)) - {"data:,"}
    assert {"losses.html", "losses.csv", "documents.csv", "svg/losses_0.svg"} <= links
    assert [name for name in links if not (folder / name).is_file()] == []
    summary = json.loads((folder / "summary.json").read_text())
    assert f"{summary['losses/heldout/ce_clean']:.4f}" in html
    one = summary["sets"]["heldout"]
    assert f"{one['tokens']:,} tokens ({one['documents']} documents) of heldout" in html
    assert f"evaluate.py report {recorded / 'seed0'} --documents 20" in html
    assert "latents (--reports latents makes it)" in html
    assert "script-src &#39;none&#39;" in html or "script-src 'none'" in html
    assert "index.html" in (folder / "losses.html").read_text()
    call("report", recorded / "seed0", "--reports", "losses", "--documents", 20)
    assert f"open {folder / 'index.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_makes_what_is_missing_and_nothing_else(runs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "compared"
    one, other = runs / "seed0", runs / "seed1"
    call("report", one, "--reports", "sparsity", "losses", "--documents", 30)
    made = {p: p.stat().st_mtime_ns for p in (one / "eval").glob("l*.csv")}
    call("compare", f"first={one}", other, "--documents", 30, "--out", out)
    assert {p: p.stat().st_mtime_ns for p in made} == made
    table = pd.read_csv(out / "comparison.csv")
    assert list(table["run"]) == ["first", "seed1"]
    summary = json.loads((one / "eval/summary.json").read_text())
    assert table["delta_ce"][0] == pytest.approx(summary["losses/heldout/delta_ce"])
    assert table["fvu"][0] == pytest.approx(summary["reconstruction/heldout/fvu"], rel=1e-6)
    assert table[["lens_kurtosis_median", "dead_frac"]].notna().all(axis=None)
    pairs = pd.read_csv(out / "differences.csv")
    assert (pairs["low"] <= pairs["difference"]).all()
    assert "<table" in (out / "comparison.html").read_text()
    assert "first" in capsys.readouterr().out
    # nothing is missing but what makes no sense for this LM: the text is not read
    monkeypatch.delattr(evaluation, "token_rows")
    call("compare", f"first={one}", other, "--out", tmp_path / "again")
    assert pd.read_csv(tmp_path / "again/comparison.csv").equals(table)


@pytest.mark.slow
def test_compare_refuses_other_text(runs, tmp_path, capsys):
    call("report", runs / "seed0", "--reports", "losses", "--documents", 30)
    call("report", runs / "seed1", "--reports", "losses", "--documents", 20)
    args = ["compare", str(runs / "seed0"), str(runs / "seed1"), "--wandb", "false"]
    args += ["--out", str(tmp_path / "out")]
    # asked for nothing, it takes the records as they are
    assert main(args) == 2
    assert "like for like" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    args += ["--force", "true"]
    assert main(args) == 0
    args[-3] = str(runs / "seed0" / "config.yaml")
    assert main(args) == 2
    assert "choose another with --out FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_on_as_many_documents_as_asked(runs, tmp_path, caplog):
    """Records of another sample stay as they are; what is asked for is made beside them."""
    one, other = runs / "seed0", runs / "seed1"
    call("report", one, "--reports", "losses", "--documents", 20)
    before = {p: p.read_bytes() for p in (one / "eval").rglob("*") if p.is_file()}
    with caplog.at_level("INFO"):
        call("compare", one, other, "--documents", 12, "--out", tmp_path / "out")
    assert {p: p.read_bytes() for p in before} == before
    assert "this one goes to" in caplog.text
    assert str(one / "eval" / "documents-12") in caplog.text
    own = pd.read_csv(one / "eval/documents-12/documents.csv")
    theirs = pd.read_csv(other / "eval/documents.csv")
    assert own["document"].tolist() == theirs["document"].tolist()
    table = pd.read_csv(tmp_path / "out/comparison.csv")
    assert table["documents"].tolist() == [len(own)] * 2


def test_a_closing_table_is_of_one_sample(runs, capsys):
    run = runs / "seed0"
    call("report", run, "--reports", "losses", "sparsity", "--documents", 20)
    first = json.loads((run / "eval/summary.json").read_text())
    assert first["sets"]["heldout"]["documents"] <= 20
    assert {k.split("/")[0] for k in first if "/" in k} == {"losses", "sparsity"}
    capsys.readouterr()
    call("report", run, "--reports", "sparsity")
    out = " ".join(capsys.readouterr().out.split())
    summary = json.loads((run / "eval/summary.json").read_text())
    n = summary["sets"]["heldout"]["tokens"]
    assert n > first["sets"]["heldout"]["tokens"]
    assert {k.split("/")[0] for k in summary if "/" in k} == {"sparsity"}
    assert f"{n:,} tokens" in out
    assert "delta CE" not in out
    assert "Left out: losses, which is of" in out
    assert f"{first['sets']['heldout']['tokens']:,} tokens" in out
    # a report without text leaves the sample as it is
    call("report", run, "--reports", "capability")
    again = json.loads((run / "eval/summary.json").read_text())
    assert again["sets"] == summary["sets"]
    assert {k.split("/")[0] for k in again if "/" in k} == {"sparsity", "capability"}


def test_a_part_of_the_sample_is_said_in_its_row(runs, capsys):
    run = runs / "seed0"
    asked = ["--reports", "losses", "sparsity", "--documents", 20]
    call("report", run, *asked, "--losses.tokens", 128)
    out = capsys.readouterr().out
    for row in ("CE, original", "delta CE (95 % interval)"):
        assert f"{row}, about the first 128 tokens" in out
    assert "L0, about" not in out


@pytest.mark.parametrize(
    ("asked", "folder"),
    [
        (["--reports", "losses", "--documents", 12], "documents-12"),
        (["--reports", "losses", "--dtype", "bfloat16"], "documents-20-bfloat16"),
        (["--reports", "losses", "--losses.resamples", 50], "losses-"),
        (["--reports", "losses", "--text", "TEXT", "--documents", 9], "words.jsonl-"),
        (["--reports", "losses", "--lm.hook_point", "model.layers.0.mlp"], "model.layers.0.mlp-"),
        (["--reports", "losses", "--lm.bos", "w3"], "w3-"),
    ],
    ids=str,
)
def test_other_questions_leave_the_record_alone(
    asked, folder, recorded, tmp_path, text_file, capsys
):
    run = shutil.copytree(recorded / "seed0", tmp_path / "seed0")
    before = {p: p.read_bytes() for p in (run / "eval").rglob("*") if p.is_file()}
    capsys.readouterr()
    sample = [] if "--documents" in asked else ["--documents", 20]
    call("report", run, *[text_file if a == "TEXT" else a for a in asked], *sample)
    assert {p: p.read_bytes() for p in before} == before
    (summary,) = set((run / "eval").rglob("summary.json")) - set(before)
    assert summary.parent.relative_to(run / "eval").parts[0].startswith(folder)
    assert "Everything is in " + str(summary.parent) in capsys.readouterr().out


def test_try_shows_predictions_latents_and_a_page(runs, tmp_path, capsys):
    page = tmp_path / "try.html"
    call("try", runs / "seed0", "--text", "w1 w2 w3 <w4>", "--n_new", 3, "--out", page)
    out = capsys.readouterr().out
    assert "w3" in out
    assert "<html" in page.read_text()
    call("report", runs / "seed0", "--reports", "latents", "--documents", 12)
    call("try", runs / "seed0", "--text", "w1 w2", "--n_new", 0)
    assert (runs / "seed0/eval/try.html").exists()
    capsys.readouterr()
    assert main(["try", str(runs / "seed0"), "--text", ""]) == 2
    assert "text" in capsys.readouterr().err


def test_capability_from_the_command_line(runs, capsys):
    run = runs / "seed0"
    prompt = ["--capability.prompt", "w1 w2", "--capability.answer", "w3"]
    call("report", run, "--reports", "capability")
    before = {p: p.read_bytes() for p in (run / "eval").rglob("*") if p.is_file()}
    for _ in range(2):  # made, and there already
        capsys.readouterr()
        call("report", run, "--reports", "capability", *prompt)
        out = capsys.readouterr().out
        (path,) = (run / "eval").glob("capability-*/capability.csv")
        table = pd.read_csv(path)
        assert set(table["prompt"]) == {"w1 w2"}
        assert '"w1 w2" -> "w3"' in out
        for name, row in zip(
            ("original", "reconstruction"), table.to_dict("records"), strict=False
        ):
            said = next(line for line in out.splitlines() if line.split()[:1] == [name]).split()
            assert said[1:3] == [str(row["rank"]), f"{row['probability']:.4f}"]
    assert {p: p.read_bytes() for p in before} == before
    args = ["report", str(run), "--reports", "capability", "--capability.prompt", "w1"]
    assert main(args) == 2
    assert "answer" in capsys.readouterr().err


def test_every_report_of_a_run_at_once(runs, monkeypatch):
    run = runs / "seed0"
    with JudgeServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        call("report", run, "--documents", 30)
    assert not server.requests
    assert not list((run / "eval").rglob("interpretability*"))
    summary = json.loads((run / "eval/summary.json").read_text())
    # concepts are of the story world; whoever wants to ask an LLM says so
    applied = {kind.name for kind in REPORTS} - {"concepts", "interpretability", "ce_bench"}
    assert {key.split("/")[0] for key in summary if "/" in key} == applied
    for kind in REPORTS:
        if kind.name in applied:
            assert all((run / "eval" / file).exists() for file in kind.files)


def test_concepts_asked_for_by_name_need_the_story_world(runs, capsys):
    assert main(["report", str(runs / "seed0"), "--reports", "concepts"]) == 2
    assert "embedded" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted((ROOT / "configs/eval").glob("*.yaml")), ids=str)
def test_shipped_configs_parse(file, runs, monkeypatch):
    text = file.read_text()
    assert text.startswith("# ")
    seen = {}
    monkeypatch.setattr(
        "kanllama_lightning.cli.evaluate_command.report", lambda *args: seen.update(args=args) or []
    )
    call("report", runs / "seed0", "--config", file)
    _, reports, how, by_name, _ = seen["args"]
    given = yaml.safe_load(text)
    assert [r.name for r in reports] == [k.name for k in REPORTS if k.name in given["reports"]]
    assert by_name
    assert how.documents == given["documents"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "subcommand"),
        (["report"], "runs"),
        (["report", "RUN", "--docments", "5"], "--docments"),
        (["report", "RUN", "--documents", "abc"], "--documents abc: must be a whole number"),
        (["report", "RUN", "--dtype", "float64"], "float64"),
        (["compare", "RUN"], "at least two"),
        (["compare", "RUN", "=x"], "may be empty"),
        (["try", "RUN"], "text"),
        (["try", "RUN", "--text", "w1", "--top", "0"], "top=0"),
        (["try", "RUN", "--text", "w1", "--out", "RUN"], "is a folder; give the name of a file"),
        (["try", "RUN", "--text", "w1", "--steer", "3"], "--steer '3': must be LATENT=STRENGTH"),
        (["try", "RUN", "--text", "w1", "--steer", "3=inf"], "must be set to a finite number"),
        (["try", "RUN", "--text", "w1", "--steer", "3=1", "3=2"], "latent 3 is given twice"),
        (["try", "RUN", "--text", "w1", "--steer", "99=1"], "steer=99: there are latents 0 to 31"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(args, said, runs, capsys):
    assert main([str(runs / "seed0") if a == "RUN" else a for a in args]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for setting in ("--documents", "--capability.prompt", "--losses.resamples", "--latents.top"):
        assert setting in out
