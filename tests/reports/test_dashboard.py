"""The dashboard of real runs: what it displays equals a computation by brute force."""

import json
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch

from kanllama_lightning.cli.evaluate_command import main
from kanllama_lightning.dashboard.unpack import read_dashboard
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.reports import token_sets as texts
from kanllama_lightning.reports.saved_head import read_subject, shared_lm

LEAST = 50


def report(folder, *extra):
    return main(["report", str(folder), "--reports", "dashboard", "--wandb", "false", *extra])


class Brute:
    """Everything the page is about, the long way round."""

    def __init__(self, folder):
        subject = read_subject(folder)
        self.head: SAEHead = subject.head
        self.lm = shared_lm([subject], {}, "float32").load_()
        sets = texts.run_sets(subject.data(self.lm.tokenizer), None)
        self.rows = sets["heldout"]
        with torch.no_grad():
            acts = self.lm.acts(self.rows.ids).float()
            self.mask = self.rows.keep & (acts.norm(dim=2) <= self.head.norm_limit)
            # [row, position, latent], 0 where nothing is measured
            self.z = torch.zeros(*self.mask.shape, self.head.d_sae)
            self.z[self.mask] = self.head.encode(acts[self.mask])
        self.flat = self.z[self.mask].double().numpy()

    def places(self, tokens):
        """Every (row, position) at which the text of a window is found."""
        found = []
        for row, ids in enumerate(self.rows.ids):
            words = [self.lm.tokenizer.decode([i]) for i in ids.tolist()]
            for at in range(len(words) - len(tokens) + 1):
                if words[at : at + len(tokens)] == tokens:
                    found.append((row, at))
        return found


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """The page of a small KAN run, read back, and the same by brute force."""
    import shutil

    folder = tmp_path_factory.mktemp("dashboard") / "run"
    shutil.copytree(trained / "seed0", folder)
    assert report(folder, "--dashboard.ablated", "3", "--dashboard.width", "12") == 0
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    return folder, read_dashboard(folder / "eval" / "dashboard.html"), Brute(folder), summary


def test_index_and_density(made):
    folder, page, brute, summary = made
    n, fired = len(brute.flat), (brute.flat != 0).sum(0)
    columns = {key: column["values"] for key, column in page["columns"].items()}
    np.testing.assert_allclose(columns["frequency"], fired / n, rtol=1e-5)
    largest = np.abs(brute.flat).max(0)
    for j in range(brute.head.d_sae):
        kind = "dead" if not fired[j] else "dense" if fired[j] > n / 10 else "alive"
        assert columns["kind"][j] == kind
        assert (columns["max"][j] is None) == (kind == "dead")
        if fired[j]:
            assert columns["max"][j] == pytest.approx(largest[j], rel=1e-4)
            size = np.abs(brute.flat[:, j][brute.flat[:, j] != 0])
            counts, _ = np.histogram(size, page["edges"])
            # what lies on an edge may fall on either side of it
            assert np.abs(counts - page["latent"](j)["density"]).sum() <= 2
            assert sum(page["latent"](j)["density"]) == fired[j]
    assert summary["dashboard/n_tokens"] == n
    assert summary["dashboard/n_alive"] == (fired > 0).sum()
    assert any(bend is not None for bend in columns["bend"])


@pytest.mark.parametrize("latent", random.Random(0).sample(range(32), 8))
def test_contexts(made, latent):
    folder, page, brute, _ = made
    details = page["latent"](latent)
    z = brute.z[..., latent]
    docs = brute.rows.doc[z != 0].unique()
    if not len(docs):
        assert details["bands"] == []
        return
    shown = [w for band in details["bands"] for w in band["windows"]]
    for window in shown:
        assert 0 < window["length"] <= 12
        possible = []
        for row, at in brute.places(window["tokens"]):
            values = z[row, at : at + window["length"]]
            got = torch.tensor([window["values"].get(i, 0.0) for i in range(window["length"])])
            if torch.allclose(got, values, rtol=6e-3, atol=1e-6):  # three digits are shown
                possible.append((row, at + window["peak"]))
        assert possible, window
        assert window["values"][window["peak"]] != 0
    # the strongest of each document, strongest first
    best = sorted((float(z[brute.rows.doc == d].abs().max()) for d in docs), reverse=True)
    strongest = details["bands"][0]
    assert strongest["title"] == "strongest"
    got = [abs(w["values"][w["peak"]]) for w in strongest["windows"]]
    assert got == pytest.approx(best[:20], rel=6e-3)
    for band in details["bands"][1:]:
        assert len(band["windows"]) <= 4
        sizes = [w["values"][w["peak"]] for w in band["windows"]]
        assert sizes == sorted(sizes, reverse=True)
        assert min(sizes) >= 0.0099 * best[0]


def test_related_latents(made):
    _, page, brute, _ = made
    on = (brute.flat != 0).astype(float)
    joint = on.T @ on
    either = on.sum(0)[:, None] + on.sum(0) - joint
    jaccard = np.where(joint >= LEAST, joint / np.maximum(either, 1), -1)
    np.fill_diagonal(jaccard, -1)
    with np.errstate(invalid="ignore"):
        pearson = np.corrcoef(brute.flat.T)
    listed = 0
    for j in range(brute.head.d_sae):
        related = page["latent"](j)["related"]
        best = sorted((v for v in jaccard[j] if v >= 0), reverse=True)[:5]
        assert [r[1] for r in related] == pytest.approx(best, rel=6e-3)
        for other, jac, both, correlation in related:
            listed += 1
            assert both == joint[j, other]
            assert jac == pytest.approx(jaccard[j, other], rel=6e-3)
            assert correlation == pytest.approx(pearson[j, other], rel=6e-3, abs=1e-6)
    assert listed > 20


def test_lens_and_coordinates(made):
    _, page, brute, _ = made
    head, lm = brute.head, brute.lm
    gain, unembedding = lm.model.model.norm.weight.detach(), lm.unembed().detach()
    logits = (head.decoder.W_dec.detach() * gain) @ unembedding
    cosine = torch.nn.functional.cosine_similarity(
        head.encoder.W_enc.T, head.decoder.W_dec, dim=1
    ).detach()
    for j in (0, 7, 31):
        details = page["latent"](j)
        if details["lens"] is None:
            continue
        order = logits[j].argsort(descending=True)
        for shown, ids in (
            (details["boosted"], order[:10]),
            (details["suppressed"], order.flip(0)),
        ):
            for (text, value), i in zip(shown, ids.tolist(), strict=False):
                assert value == pytest.approx(float(logits[j, i]), rel=6e-3, abs=1e-6)
                assert text == lm.tokenizer.decode([i])
        low, high, counts = details["lens"]
        assert sum(counts) == lm.vocab_size
        assert (low, high) == pytest.approx(
            (float(logits[j].min()), float(logits[j].max())), rel=6e-3
        )
        w = head.decoder.W_dec[j].detach()
        best = w.abs().argsort(descending=True)[:10]
        for (i, value, share), want in zip(details["coordinates"], best.tolist(), strict=True):
            assert i == want
            assert value == pytest.approx(float(w[i]), rel=6e-3)
            assert share == pytest.approx(float(w[i].abs() / w.abs().sum()), rel=6e-3)
        assert details["encoder_cosine"] == pytest.approx(float(cosine[j]), rel=6e-3)


def test_ablations_are_of_the_latents_asked_for(made):
    _, page, brute, summary = made
    found = [d for d in map(page["latent"], range(32)) if d["ablation"]]
    assert len(found) == summary["dashboard/n_ablated"] == 3
    kl = np.mean([d["ablation"][1] for d in found])
    assert summary["dashboard/ablation_kl_mean"] == pytest.approx(kl, rel=1e-2)
    assert kl > 0


def test_it_is_made_anew_when_what_it_reads_changes(run):
    args = ("--dashboard.ablated", "0", "--documents", "4")
    assert report(run, *args) == 0
    page = run / "eval" / "dashboard.html"
    first = page.stat().st_mtime_ns
    assert report(run, *args) == 0
    assert page.stat().st_mtime_ns == first
    concepts = [["head", "animal:cat", "animal", 50, 3, 1.0, 0.9, 0.8, 1.0, 1, 1, 1, 0]]
    names = ["subject", "fact", "kind", "n_tokens", "latent", "threshold", "f1", "precision",
             "recall", "auroc", "best_auroc", "split", "union_recall"]  # fmt: skip
    pd.DataFrame(concepts, columns=names).to_csv(run / "eval" / "concepts.csv", index=False)
    scores = [
        {"subject": "head", "latent": 3, "category": "low_level", "score": 4,
         "explanation": "cats </script>", "detection": 0.84},
        {"subject": "head", "latent": 5, "category": "", "score": None,
         "explanation": "who knows", "detection": None},
        {"subject": "head", "latent": 6, "category": "", "score": None, "explanation": None,
         "detection": None},
        {"subject": "random directions", "latent": 7, "category": "low_level", "score": 1,
         "explanation": "nothing", "detection": 0.5},
    ]  # fmt: skip
    pd.DataFrame(scores).to_csv(run / "eval" / "interpretability.csv", index=False)
    assert report(run, *args) == 0
    assert page.stat().st_mtime_ns > first
    found = read_dashboard(page)
    assert found["latent"](3)["concepts"] == [["animal:cat", 0.9, 0.8, 1.0]]
    assert found["latent"](3)["scores"] == ["cats </script>", "low_level", 4, 0.84, ""]
    assert found["latent"](5)["scores"] == ["who knows", "", None, None, ""]
    assert found["latent"](6)["scores"] is None
    assert found["latent"](7)["scores"] is None
    values = {key: column["values"] for key, column in found["columns"].items()}
    assert values["concept"][3] == "animal:cat"
    assert values["score"][3:6] == [4, None, None]
    assert "</script>" not in values["explanation"][3] or "cats </script>" not in page.read_text()


@pytest.mark.parametrize(
    ("argument", "value"), [("top", 0), ("per_band", -1), ("width", 3), ("tokens", 0)]
)
def test_bad_arguments(run, capsys, argument, value):
    assert report(run, f"--dashboard.{argument}", str(value)) == 2
    assert f"dashboard.{argument}={value}" in capsys.readouterr().err


def test_what_goes_on_the_page_is_finite(made):
    _, page, _, _ = made
    for column in page["columns"].values():
        for value in column["values"]:
            assert value is None or isinstance(value, str) or math.isfinite(value)
