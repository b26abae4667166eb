"""The report on the latents: tables against NumPy, and a page that hostile tokens cannot break."""

import csv
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from transformers import PreTrainedTokenizerFast

from kanllama_lightning.heads import PCA, BatchTopK, DenseOnlyKAN, KANReLUDense, OnlyKAN
from kanllama_lightning.lm.token_text import token_text
from kanllama_lightning.measures.directions import FIGURES
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.reports.latents_report import KINDS, LatentsReport
from kanllama_lightning.reports.report import EvalRun, Seen
from kanllama_lightning.types import InputError

HOSTILE = '</script><script>alert("x")</script>\n%{x}<b>\u202e,"'


class Hostile(PreTrainedTokenizerFast):
    """A tokenizer whose every token is an attack."""

    def convert_ids_to_tokens(self, token, **_):
        return f"{HOSTILE}{token}"

    def decode(self, ids, **_):
        return f"{HOSTILE}{ids[0]}"


def evaluate(head, lm, batch, out, sets=("main",), seen_as=("main",), **args):
    """The report on a head of one batch, and its figures."""
    run = EvalRun(out, head, lm, {}, list(sets), out)
    report = LatentsReport(**args)
    report.begin(run)
    with torch.no_grad():
        for i, name in enumerate(seen_as):
            made = run_head(lm.prefix(batch.ids), batch, name, head)
            report.observe(run, Seen(made, i, None))
    return report.finish(run)


def started(head, lm, batch):
    acts = lm.acts(batch.ids)[batch.keep]
    head.start_(acts.repeat(8, 1) + 0.05 * torch.randn(8 * len(acts), 16))
    head.calibrate_(acts)
    return head.eval()


@pytest.fixture
def lm(make_lm):
    return make_lm()


@pytest.fixture
def head(lm, tokens):
    torch.manual_seed(0)
    made = started(BatchTopK(d_model=16, d_sae=32, target_l0=4), lm, tokens)
    with torch.no_grad():  # one latent that never fires
        made.encoder.b_enc[5] = -100
    return made


def test_tables_against_numpy(head, lm, tokens, tmp_path):
    with torch.no_grad():
        lm.model.model.norm.weight.copy_(torch.linspace(0.5, 2, 16))
    figures = evaluate(head, lm, tokens, tmp_path, top=4, block=7)
    table = pd.read_csv(tmp_path / "latents.csv")
    lens = pd.read_csv(tmp_path / "logit_lens.csv")
    assert list(table["latent"]) == list(lens["latent"]) == list(range(32))

    with torch.no_grad():
        z = head.encode(lm.acts(tokens.ids)[tokens.keep]).double().numpy()
    fired = (z > 0).sum(0)
    np.testing.assert_array_equal(table["n_fired"], fired)
    np.testing.assert_allclose(table["frequency"], fired / len(z))
    want = [z[:, j][z[:, j] > 0].mean() if fired[j] else np.nan for j in range(32)]
    np.testing.assert_allclose(table["mean_activation"], want, rtol=1e-5)
    np.testing.assert_allclose(table["max_activation"].fillna(0), z.max(0), rtol=1e-5)
    kinds = np.where(fired == 0, "dead", np.where(fired / len(z) > 0.1, "dense", "alive"))
    assert list(table["kind"]) == list(kinds)
    assert table["kind"][5] == "dead"
    assert set(kinds) == set(KINDS)

    w = head.decoder.W_dec.detach().double().numpy()
    gain = lm.model.model.norm.weight.double().numpy()
    logits = (w * gain) @ lm.model.lm_head.weight.double().numpy().T
    np.testing.assert_allclose(table["decoder_norm"], np.linalg.norm(w, axis=1), rtol=1e-6)
    np.testing.assert_allclose(table["skewness"], stats.skew(logits, axis=1), atol=1e-4)
    kurtosis = stats.kurtosis(logits, axis=1, fisher=False)
    np.testing.assert_allclose(table["kurtosis"], kurtosis, rtol=1e-4)
    np.testing.assert_allclose(lens["kurtosis"], kurtosis, rtol=1e-4)
    cosines = w @ w.T
    np.fill_diagonal(cosines, -9)
    np.testing.assert_allclose(table["max_cosine"], cosines.max(1), atol=1e-5)
    assert (table["straightness"].dropna() == 1).all()
    assert not table["curved"].any()
    for j in (0, 5, 31):
        order = logits[j].argsort()
        for end, ids in {"top": order[::-1][:4], "bottom": order[:4]}.items():
            texts, values = (json.loads(lens[f"{end}_{c}"][j]) for c in ("tokens", "values"))
            assert texts == [token_text(lm.tokenizer, int(i)) for i in ids]
            np.testing.assert_allclose(values, logits[j][ids], rtol=1e-4)
    assert json.loads(table["top_tokens"][0]) == json.loads(lens["top_tokens"][0])[:5]

    alive = fired > 0
    log_frequency = np.log10(fired[alive] / len(z))
    assert set(figures) >= {f"lens_{name}" for name in FIGURES}
    assert figures["n_tokens"] == len(z)
    assert figures["dead_frac"] == pytest.approx((~alive).mean())
    assert figures["lens_n_alive"] == figures["lens_n_directions"] == alive.sum()
    assert figures["lens_kurtosis_median"] == pytest.approx(np.median(kurtosis[alive]), rel=1e-4)
    assert figures["lens_max_cosine_mean"] == pytest.approx(cosines.max(1)[alive].mean(), rel=1e-4)
    for which, correlation in {"": stats.pearsonr, "_spearman": stats.spearmanr}.items():
        want = correlation(kurtosis[alive], log_frequency).statistic
        got = figures[f"lens_corr_kurtosis_log_freq{which}"]
        assert got == pytest.approx(want, abs=1e-4)


def test_the_page_stands_alone_and_names_its_units(head, lm, tokens, tmp_path):
    evaluate(head, lm, tokens, tmp_path)
    html = (tmp_path / "latents.html").read_text()
    assert "http:" not in html
    assert "https:" not in html
    assert html.count('<div class="plot"') == html.count("<svg") == 4
    for words in ("random directions", "dead (", "kurtosis, mean(", "log scale", "latents fired"):
        assert words in html
    assert not list(tmp_path.glob("*.tmp"))


def test_hostile_tokens(head, lm, tokens, tmp_path):
    lm.tokenizer = Hostile(tokenizer_object=lm.tokenizer.backend_tokenizer)
    evaluate(head, lm, tokens, tmp_path, top=3)
    own = (tmp_path / "latents.html").read_text()
    assert "<script>alert" not in own
    assert "</script><script>alert" not in own
    assert "\\u003cscript\\u003ealert" not in own  # unescaped, once the browser has read the JSON
    with (tmp_path / "logit_lens.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 32
    assert all(t.startswith(HOSTILE) for t in json.loads(rows[3]["bottom_tokens"]))


def test_only_the_first_set_counts(head, lm, tokens, tmp_path):
    one = evaluate(head, lm, tokens, tmp_path)
    two = evaluate(head, lm, tokens, tmp_path, ("main", "other"), ("main", "other"))
    assert one == two


@pytest.mark.parametrize(
    "kind", [OnlyKAN, KANReLUDense, DenseOnlyKAN], ids=lambda kind: kind.__name__
)
def test_kan_decoders(kind, lm, tokens, tmp_path):
    torch.manual_seed(0)
    head = started(kind(d_model=16, d_sae=32, target_l0=4), lm, tokens)
    figures = evaluate(head, lm, tokens, tmp_path)
    table = pd.read_csv(tmp_path / "latents.csv")
    lens = pd.read_csv(tmp_path / "logit_lens.csv")
    dead = table["kind"] == "dead"
    assert table["kurtosis"].isna().sum() == dead.sum()
    assert (lens["top_tokens"][dead] == "[]").all()
    assert (table["curved"] == (table["straightness"] < 0.95)).all()
    judged = table["straightness"].notna()
    assert (judged == ~dead).all()
    assert figures["lens_curved_frac"] == pytest.approx(table["curved"][judged].mean())
    assert figures["lens_n_directions"] == (~dead).sum()
    assert (table["decoder_norm"][~dead] > 0).all()


def test_latents_that_fire_always_correlate_with_nothing(lm, tokens, tmp_path):
    head = PCA(16, 8)
    head.start_(lm.acts(tokens.ids)[tokens.keep])
    figures = evaluate(head.eval(), lm, tokens, tmp_path)
    assert figures["lens_corr_skew_log_freq"] is None
    assert all(v is None or math.isfinite(v) for v in figures.values())
    assert figures["dense_frac"] == 1
    json.dumps(figures, allow_nan=False)


def test_all_dead(head, lm, tokens, tmp_path):
    with torch.no_grad():
        head.encoder.b_enc.fill_(-100)
    figures = evaluate(head, lm, tokens, tmp_path)
    assert figures["dead_frac"] == 1
    assert figures["lens_kurtosis_median"] is None
    assert (tmp_path / "latents.html").exists()


def test_nothing_to_look_at(head, lm, tokens, tmp_path):
    with pytest.raises(InputError, match="set 'main' has no token"):
        evaluate(head, lm, tokens, tmp_path, seen_as=())


@pytest.mark.parametrize("name", ["top", "block", "tokens"])
def test_refused_arguments(name):
    with pytest.raises(InputError, match=f"Latents.{name}=0"):
        LatentsReport(**{name: 0})


def test_settings_are_the_arguments():
    assert LatentsReport(top=3).settings() == {"top": 3, "block": 256, "tokens": None}
