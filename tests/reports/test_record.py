"""`evaluate.py report` on a run of the tiny model: every figure against an independent one."""

import json
import math
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from kanllama_lightning.cli.evaluate_command import main
from kanllama_lightning.comparison.loading import load
from kanllama_lightning.comparison.tables import table as compared
from kanllama_lightning.functional.losses import next_token_targets
from kanllama_lightning.heads import BatchTopK, SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.reports import losses_report as losses
from kanllama_lightning.reports import one_pass as record
from kanllama_lightning.reports import report as reports
from kanllama_lightning.reports.reconstruction_report import BINS, bands
from kanllama_lightning.reports.saved_head import read_subject
from kanllama_lightning.reports.token_sets import run_sets
from kanllama_lightning.runs.lookup import folder_named
from tests.conftest import word_tokenizer
from tests.wandb_file import history, opened

PASS = ("sparsity", "losses", "reconstruction")


def report(*args, wandb="false"):
    how = ["--documents", "30", "--device", "cpu", "--wandb", wandb]
    assert main(["report", *[str(a) for a in args], *how]) == 0


@pytest.fixture(scope="module")
def recorded(trained, tmp_path_factory):
    """A run with a record of what one pass over the text gives; not to be changed."""
    run = shutil.copytree(trained / "seed0", tmp_path_factory.mktemp("recorded") / "seed0")
    report(run, "--reports", *PASS)
    return run


@pytest.fixture
def known(recorded, tmp_path):
    """A copy of it, to be changed at will."""
    return shutil.copytree(recorded, tmp_path / "recorded")


def figures(run):
    return json.loads((run / "eval" / "summary.json").read_text())


@cache
def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_figure_against_an_independent_computation(recorded, tiny_lm_dir):
    run = recorded
    found = figures(run)
    subject = read_subject(run)
    rows = run_sets(subject.data(word_tokenizer()), 30)["heldout"]
    head = subject.head
    model = plain(tiny_lm_dir)
    mlp = model.model.layers[1].mlp
    caught = []
    handle = mlp.register_forward_hook(lambda _, __, out: caught.append(out))
    with torch.no_grad():
        clean = model(rows.ids).logits
    handle.remove()
    (acts,) = caught
    mask = rows.keep & (acts.norm(dim=-1) <= head.norm_limit)
    x = acts[mask]
    with torch.no_grad():
        x_hat, latents = head.decode(head.encode(x)), head.encode(x)

    def replaced(value):
        def hook(_, __, out):
            new = out.clone()
            new[mask] = value
            return new

        handle = mlp.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(rows.ids).logits
        handle.remove()
        return logits

    runs = {
        "clean": clean,
        "recon": replaced(x_hat),
        "zero": replaced(torch.zeros_like(x)),
        "mean": replaced(head.x_mean.expand_as(x)),
    }
    targets, counts = next_token_targets(rows.ids, rows.keep, rows.doc)
    log_p = clean[counts].double().log_softmax(-1)
    for name, logits in runs.items():
        ce = float(F.cross_entropy(logits[counts].double(), targets[counts]))
        assert found[f"losses/heldout/ce_{name}"] == pytest.approx(ce, rel=1e-5)
        if name != "clean":
            log_q = logits[counts].double().log_softmax(-1)
            kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
            assert found[f"losses/heldout/kl_{name}"] == pytest.approx(kl, rel=1e-3, abs=1e-7)

    a, b = x.double().numpy(), x_hat.double().numpy()
    ev = 1 - ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
    assert found["reconstruction/heldout/ev"] == pytest.approx(ev, abs=1e-6)
    l0 = (latents.numpy() != 0).sum(1)
    assert found["sparsity/heldout/l0"] == pytest.approx(l0.mean())
    assert found["sparsity/heldout/l0_median"] == np.quantile(l0, 0.5, method="inverted_cdf")

    table = pd.read_csv(run / "eval" / "documents.csv")
    docs = rows.doc[mask].numpy()
    e2 = ((a - b) ** 2).sum(1)
    x2 = ((a - a.mean(0)) ** 2).sum(1)
    for _, row in table.iterrows():
        own = docs == row["document"]
        assert row["n_tokens"] == own.sum()
        assert row["l0"] == l0[own].sum()
        assert row["e2"] == pytest.approx(e2[own].sum(), rel=1e-4)
        assert row["x2"] == pytest.approx(x2[own].sum(), rel=1e-4)
    assert table["ce_recon"].sum() / table["n_targets"].sum() == pytest.approx(
        found["losses/heldout/ce_recon"]
    )

    groups = pd.read_csv(run / "eval" / "reconstruction.csv")
    position = np.broadcast_to(np.arange(rows.ids.shape[1]), rows.ids.shape)[mask.numpy()]
    for _, row in groups[groups["by"] == "position"].iterrows():
        own = position == row["group"]
        assert row["fvu"] == pytest.approx(e2[own].sum() / x2[own].sum(), rel=1e-4)
    assert groups.groupby("by")["share_of_error"].sum().to_numpy() == pytest.approx([1, 1])


def test_figures_do_not_depend_on_the_batch_size(known):
    first = figures(known)
    report(known, "--reports", *PASS, "--batch_seqs", 3, "--again", "true")
    second = figures(known)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if "first_batch" in key or "error" in key or "everywhere" in key:
            continue  # of the first batch alone
        if isinstance(value, float):
            assert second[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
        else:
            assert second[key] == value


def test_tables_agree_with_the_summary(recorded):
    run = recorded
    found = figures(run)
    table = pd.read_csv(run / "eval" / "losses.csv")
    pooled, batches = table[table["batch"] == "all"], table[table["batch"] != "all"]
    for column in ("ce_clean", "ce_recon", "ce_zero", "ce_mean", "kl_recon"):
        mean = np.average(batches[column], weights=batches["n_targets"])
        assert pooled[column].item() == pytest.approx(mean)
        assert found[f"losses/heldout/{column}"] == pytest.approx(mean)
    l0 = pd.read_csv(run / "eval" / "l0.csv")
    assert np.average(l0["l0"], weights=l0["n_tokens"]) == pytest.approx(
        found["sparsity/heldout/l0"]
    )
    low, high = (found[f"losses/heldout/delta_ce_{end}"] for end in ("low", "high"))
    assert low < found["losses/heldout/delta_ce"] < high
    assert found["losses/heldout/error_term_max_diff"] < 1e-3
    for page in ("l0.html", "losses.html", "reconstruction.html"):
        assert "<html" in (run / "eval" / page).read_text()


def test_of_a_large_set_a_part_is_ablated_and_the_rest_is_as_before(known, monkeypatch):
    whole = figures(known)
    tokens = pd.read_csv(known / "eval" / "losses.csv")["n_targets"].iloc[-1]
    monkeypatch.setattr(reports, "ABLATED_TOKENS", int(tokens) // 3)
    report(known, "--reports", *PASS, "--again", "true")
    part = figures(known)
    table = pd.read_csv(known / "eval" / "losses.csv")
    batches = table[table["batch"] != "all"]
    own = batches["ce_zero"].notna()
    assert 1 <= own.sum() <= len(batches) / 3 + 1 < len(batches)
    assert (batches["ce_mean"].notna() == own).all()
    assert batches["kl_recon"].notna().all()
    n = batches["n_targets"]
    for run in ("zero", "mean"):
        added = np.average((batches[f"ce_{run}"] - batches["ce_clean"])[own], weights=n[own])
        want = np.average(batches["ce_clean"], weights=n) + added
        assert part[f"losses/heldout/ce_{run}"] == pytest.approx(want)
        low, high = (part[f"losses/heldout/delta_{run}_{end}"] for end in ("low", "high"))
        assert low < added < high
    assert part["losses/heldout/ablated_tokens"] == n[own].sum() < whole["losses/heldout/ce_tokens"]
    of_ablations = ("zero", "mean", "share", "score", "ablated")
    for key, value in whole.items():
        if key.startswith("losses/") and not any(word in key for word in of_ablations):
            assert part[key] == pytest.approx(value), key
    documents = pd.read_csv(known / "eval" / "documents.csv")
    assert documents["n_ablated"].sum() == n[own].sum()
    other = shutil.copytree(known, known.with_name("other"))
    row = compared(load([known, other]))[0]
    assert row["ce_score"] == pytest.approx(part["losses/heldout/ce_score"])
    assert row["delta_ce_share"] == pytest.approx(part["losses/heldout/delta_ce_share"])


def test_an_ablation_of_one_document_has_no_interval():
    of = {"n_targets": [9, 9, 9], "n_ablated": [9, 0, 0], "ce_clean_ablated": [18.0, 0.0, 0.0]}
    sums = {"ce_clean": 18.0, "ce_recon": [20.0, 19.0, 21.0], "kl_recon": [1.0, 2.0, 3.0]}
    ablated = {"ce_mean": [30.0, 0.0, 0.0], "ce_zero": [40.0, 0.0, 0.0]}
    found = losses.LossesReport()._intervals(pd.DataFrame(of | sums | ablated))
    assert found["delta_ce_low"] < found["delta_ce_high"]
    assert all(math.isnan(found[f"delta_{run}_low"]) for run in ("mean", "zero"))


def test_what_is_ablated_is_a_part_of_what_is_looked_at(known, monkeypatch):
    """Not of the whole set, of which a limit may leave little."""
    monkeypatch.setattr(reports, "ABLATED_TOKENS", 64)
    few = ("--losses.tokens", 64, "--batch_seqs", 1)
    report(known, "--reports", "losses", *few, "--again", "true")
    (apart,) = (known / "eval").glob("losses-*")
    table = pd.read_csv(apart / "losses.csv")
    assert len(table) > 2
    assert table["ce_zero"].notna().all()
    documents = pd.read_csv(apart / "documents.csv")
    assert (documents["n_ablated"] == documents["n_targets"]).all()


def test_heads_on_one_model_share_all_but_their_own_continuation(runs, monkeypatch):
    calls = {"prefix": 0, "resume": 0}
    for name in calls:
        method = getattr(FrozenLM, name)

        def counted(*args, name=name, method=method):
            calls[name] += 1
            return method(*args)

        monkeypatch.setattr(FrozenLM, name, counted)
    monkeypatch.setattr(record, "preflight", lambda *_: None)
    monkeypatch.setattr(losses, "check", lambda *_: {})
    shutil.copytree(runs / "seed1", runs / "seed2")
    heads = [runs / f"seed{i}" for i in range(3)]
    report(*heads, "--reports", *PASS, "--batch_seqs", 4)
    n = len(pd.read_csv(runs / "seed0/eval/l0.csv"))
    assert n > 1
    # beside the pass: the check of the forward pass, once for all heads
    assert calls == {"prefix": n + 2, "resume": n * (3 + 3) + 1}
    together = figures(runs / "seed0")
    monkeypatch.undo()
    report(runs / "seed0", "--reports", "losses", "--batch_seqs", 4, "--again", "true")
    alone = figures(runs / "seed0")
    assert alone["losses/heldout/ce_recon"] == together["losses/heldout/ce_recon"]


def test_nothing_is_computed_twice(known, monkeypatch):
    run = known
    before = {p: p.stat().st_mtime_ns for p in (run / "eval").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(FrozenLM, "load_", lambda *_: pytest.fail("the LM was loaded"))
        report(run, "--reports", *PASS)
    (run / "eval" / "l0.csv").unlink()
    report(run, "--reports", *PASS)
    changed = {
        p.name
        for p in (run / "eval").iterdir()
        if p.is_file() and p.stat().st_mtime_ns != before[p]
    }
    assert changed == {"l0.csv", "l0.html", "index.html", "summary.json"}
    report(run, "--reports", "losses", "--losses.resamples", 50)
    # settings of one's own have a folder of their own
    assert (run / "eval" / "losses.csv").stat().st_mtime_ns == before[run / "eval/losses.csv"]
    assert len(list((run / "eval").glob("losses-*/losses.csv"))) == 1


def test_what_is_finished_survives_what_fails_later(run, monkeypatch):
    def fails(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(losses.LossesReport, "finish", fails)
    args = ["report", str(run), "--documents", "30", "--wandb", "false", "--reports", *PASS]
    assert main(args) == 130
    assert (run / "eval" / "l0.csv").exists()
    assert "sparsity/heldout/l0" in figures(run)
    monkeypatch.undo()
    report(run, "--reports", *PASS)
    assert "losses/heldout/delta_ce" in figures(run)


def test_the_record_goes_to_the_runs_own_logger(run):
    before = set(run.rglob("*.wandb"))
    report(run, "--reports", "sparsity", wandb="true")
    (new,) = set(run.rglob("*.wandb")) - before
    keys = {key for row in history(new)[0] for key in row}
    figures = [k for k in keys if k.startswith("j_record/l0_")]
    assert "j_record/l0" in {k.split(".")[0] for k in keys}
    assert figures, sorted(keys)
    trained, reported = opened(min(before)), opened(new)
    for of_run in ("run_id", "run_group", "display_name", "project"):
        assert getattr(reported, of_run) == getattr(trained, of_run) != ""
    report(run, "--reports", "losses")
    assert len(set(run.rglob("*.wandb"))) == len(before) + 1


def test_a_saved_head_alone(run, text_file, tiny_lm_dir):
    head = run / "head"
    card = json.loads((head / "head.json").read_text())
    args = ["--lm.name", tiny_lm_dir, "--text", text_file, "--ctx_len", "16"]
    args += ["--lm.hook_point", card["provenance"]["hook_point"]]
    asked = ["report", str(head), *map(str, args), "--reports", "sparsity", "--wandb", "false"]
    assert main(asked) == 2  # untrained
    report(head, *args, "--reports", "sparsity", "--lm.untrained", "true")
    assert figures(head)["sparsity/words/sparsity_tokens"] > 0


def wrong(args, capsys):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err


def test_mistakes_are_answered_in_one_message(runs, run, tmp_path, capsys):
    err = wrong(["report", tmp_path / "nothing"], capsys)
    assert "no such folder" in err
    (tmp_path / "empty").mkdir()
    assert "neither a run folder" in wrong(["report", tmp_path / "empty"], capsys)
    shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "head")
    assert "not finished" in wrong(["report", tmp_path / "unfinished"], capsys)
    err = wrong(["report", run, "--documents", "100000"], capsys)
    assert "--documents=100000" in err
    assert "has only" in err
    assert "known: " in wrong(["report", run, "--reports", "dashbord"], capsys)
    assert "goes with --text" in wrong(["report", run, "--ctx_len", "16"], capsys)
    assert "--text" in wrong(["report", run / "head"], capsys)
    assert "no such device" in wrong(["report", run, "--device", "quantum"], capsys)
    assert "not exist" in wrong(["report", run, "--text", tmp_path / "no.jsonl"], capsys)
    assert "--batch_seqs=0" in wrong(["report", run, "--batch_seqs", "0"], capsys)
    BatchTopK(d_model=24, d_sae=32, target_l0=4).save(run / "head", {"lm": "x"})
    assert "width 24" in wrong(["report", run], capsys)
    assert "W_dec has the shape [32, 16]" in wrong(["report", _damaged(runs / "seed1")], capsys)


def test_a_model_whose_vocabulary_does_not_fit(run, tiny_lm_dir, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(tiny_lm_dir, mixed)
    config = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps(config | {"vocab_size": 10}))
    err = wrong(["report", run, "--lm.name", mixed, "--reports", "sparsity"], capsys)
    assert "its tokenizer has 64 tokens, its embedding 10" in err


def test_last_is_the_run_finished_last(runs, tmp_path, capsys):
    os.utime(runs / "seed0/head/head.json", (2e9, 2e9))
    assert folder_named("last", str(runs)) == runs / "seed0"
    os.utime(runs / "seed1/head/head.json", (3e9, 3e9))
    assert folder_named("last", str(runs)) == runs / "seed1"
    err = wrong(["report", "last", "--runs_dir", tmp_path / "none"], capsys)
    assert "no finished run" in err


def test_a_head_trained_anew_has_no_old_figures(runs):
    run = runs / "seed0"
    report(run, "--reports", "sparsity", "losses")
    shutil.rmtree(run / "head")
    shutil.copytree(runs / "seed1" / "head", run / "head")
    report(run, "--reports", "sparsity")
    found = figures(run)
    assert "sparsity/heldout/l0" in found
    assert not any(key.startswith("losses/") for key in found)


def test_the_summary_keeps_what_the_losses_were_of(run):
    report(run, "--reports", "losses")
    before = figures(run)["sets"]
    for asked in (["sparsity", "--documents", "20"], ["capability"]):
        assert main(["report", str(run), "--wandb", "false", "--reports", *asked]) == 0
    assert figures(run)["sets"] == before


def _damaged(run: Path) -> Path:
    card = run / "head" / "head.json"
    values = json.loads(card.read_text())
    values["init_args"]["d_sae"] = 7
    card.write_text(json.dumps(values))
    return run


def test_earlier_reports_are_kept_after_a_mistake(run, capsys):
    report(run, "--reports", "sparsity")
    before = (run / "eval" / "l0.csv").read_bytes()
    wrong(["report", run, "--reports", "losses", "--documents", "100000"], capsys)
    assert (run / "eval" / "l0.csv").read_bytes() == before
    assert isinstance(SAEHead.load(run / "head"), SAEHead)


def test_bands_halve_the_frequency():
    counts = torch.tensor([64, 33, 32, 16, 1, 0])
    assert bands(counts).tolist() == [0, 0, 1, 2, 6, BINS - 1]
