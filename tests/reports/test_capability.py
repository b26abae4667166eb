"""The capability test against plain transformers, with a torch hook in the place of the splice."""

import json
import math
import re

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kanllama_lightning.heads.batch_topk import BatchTopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.prompts import Prompt, world_prompts
from kanllama_lightning.prompts.asking import RUNS, ask, question
from kanllama_lightning.reports.capability_report import (
    CapabilityReport,
    _counts,
    _left_out,
)
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.types import DenseCodes, InputError, SAEOutput

PROMPT = Prompt("words", "w5 w17 w2 w33 w8", (" w9",))
LONG = Prompt("words", "w5 w17 w2 w33 w8", (" w9 w4 w30",))


def started_head(lm, d_sae=32, k=4):
    """A real head, its statistics from the LM's activations, its weights random."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, lm.vocab_size, (24, 20), generator=generator)
    x = lm.acts(ids).flatten(0, 1).float()
    head = BatchTopK(d_model=lm.d_model, d_sae=d_sae, target_l0=k)
    with torch.no_grad():
        head.start_(x)
        head.calibrate_(x)
    return head.eval()


class Perfect(BatchTopK):
    """Reconstructs exactly."""

    def forward(self, x):
        return SAEOutput(x, DenseCodes(torch.ones(len(x), self.d_sae)))


class Shifted(BatchTopK):
    """Gives every position its neighbour's vector and the last one zeros (METHODS C)."""

    def forward(self, x):
        moved = torch.cat([x[1:], torch.zeros_like(x[:1])])
        return SAEOutput(moved, DenseCodes(torch.ones(len(x), self.d_sae)))


@torch.no_grad()
def by_hook(folder, ids, replace=None, module="model.layers.1.mlp"):
    """Plain transformers' logits; a hook puts `replace(acts)` everywhere but at BOS."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    fired = []

    def hook(_: nn.Module, __: tuple, out: torch.Tensor) -> torch.Tensor:
        fired.append(out.shape)
        new = out.clone()
        new[0, 1:] = replace(out[0, 1:])
        return new

    if replace is not None:
        model.get_submodule(module).register_forward_hook(hook)
    logits = model(torch.tensor([ids])).logits[0]
    assert len(fired) == (replace is not None)
    return logits


def replacements(head):
    return {
        "original": None,
        "sae": lambda x: head(x).x_hat,
        "zero": torch.zeros_like,
        "mean": lambda x: head.x_mean.expand_as(x),
    }


def evaluate(lm, head, out, **kwargs):
    out.mkdir(exist_ok=True)
    run = EvalRun(out, head, lm, {}, [], out)
    report = CapabilityReport(**kwargs)
    report.begin(run)
    figures = report.finish(run)
    assert {p.name for p in out.iterdir()} >= set(CapabilityReport.files)
    assert not list(out.glob("*.tmp"))
    return (
        figures,
        pd.read_csv(run.path("capability.csv"), keep_default_na=False, na_values=[""]),
        (out / "capability.log").read_text(),
    )


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["one token", "three tokens"])
@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_that_of_plain_transformers(make_lm, tiny_lm_dir, prompt, name):
    """An independent splice gives the same numbers, aligned (METHODS C)."""
    lm = make_lm()
    head = started_head(lm)
    asked = question(lm, prompt)
    # beside a longer and a shorter one, in one batch
    beside = [question(lm, Prompt("c", p, (" w3",))) for p in ("w4 " * 30, "w8")]
    got = ask(head, lm, [beside[0], asked, beside[1]], top=7)[1].readings[name]
    ids = [0, *lm.tokenizer.convert_tokens_to_ids(prompt.prompt.split())]
    answer = lm.tokenizer.convert_tokens_to_ids(prompt.answers[0].split())
    assert (asked.prompt_ids, asked.answer_ids, asked.alone) == (ids[1:], answer, False)
    # the answer's first token and the top: from the prompt alone
    logits = by_hook(tiny_lm_dir, ids, replacements(head)[name])[-1]
    original = by_hook(tiny_lm_dir, ids)[-1]
    p, q = original.double().softmax(0), logits.double().softmax(0)
    assert got.rank == 1 + sum(v > logits[answer[0]] for v in logits.tolist())
    assert got.logit == pytest.approx(float(logits[answer[0]]), abs=2e-5)
    assert got.probability == pytest.approx(float(q[answer[0]]), rel=1e-4)
    assert got.kl == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert got.agrees == (logits.argmax() == original.argmax())
    order = sorted(range(len(q)), key=lambda i: -float(q[i]))[:7]
    assert [i for i, _ in got.top] == order
    assert [v for _, v in got.top] == pytest.approx([float(q[i]) for i in order], rel=1e-4)
    # the whole answer: token by token, each from a text that ends just before it
    total = 0.0
    for n, token in enumerate(answer):
        before = by_hook(tiny_lm_dir, ids + answer[:n], replacements(head)[name])[-1]
        total += float(before.double().log_softmax(0)[token])
    assert got.log_prob == pytest.approx(total, abs=1e-4)
    # what it says: from the prompt on, each token after its own
    said = []
    for _ in range(len(answer)):
        said.append(int(by_hook(tiny_lm_dir, ids + said, replacements(head)[name])[-1].argmax()))
    assert (" ".join(lm.tokenizer.convert_ids_to_tokens(said)) == prompt.answers[0][1:]) == got.hit
    words = lm.tokenizer.convert_ids_to_tokens(said)
    assert got.said.split() == words[: len(got.said.split())]


def test_runs_differ_and_original_is_no_splice(make_lm):
    lm = make_lm()
    readings = ask(started_head(lm), lm, [question(lm, PROMPT)], top=3)[0].readings
    assert readings["original"].kl == 0
    assert readings["original"].agrees
    assert len({round(r.logit, 4) for r in readings.values()}) == 4
    assert all(readings[name].kl > 1e-4 for name in RUNS[1:])


def test_a_perfect_head_is_the_original_and_a_shift_by_one_is_not(make_lm):
    lm = make_lm()
    head = Perfect(d_model=16, d_sae=32, target_l0=4).eval()
    perfect = ask(head, lm, [question(lm, LONG)], top=5)[0]
    original, sae = perfect.readings["original"], perfect.readings["sae"]
    assert sae == original
    assert (perfect.n_ids, perfect.replaced, perfect.untouched, perfect.l0) == (8, 7, False, 32)
    # what earlier work did: seen by every number
    head = Shifted(d_model=16, d_sae=32, target_l0=4).eval()
    shifted = ask(head, lm, [question(lm, PROMPT)], top=5)[0].readings["sae"]
    assert shifted.kl > 1e-2
    assert abs(shifted.logit - original.logit) > 1e-2
    assert abs(shifted.log_prob - original.log_prob) > 1e-2


def test_sinks_and_special_tokens_keep_their_activation(make_lm):
    lm = make_lm()
    head = started_head(lm)
    head.norm_limit.fill_(0)
    answers = ask(head, lm, [question(lm, PROMPT)], top=5)[0]
    assert (answers.replaced, answers.untouched) == (0, True)
    assert math.isnan(answers.l0)
    assert len(set(map(str, answers.readings.values()))) == 1


def test_table_log_and_figures_agree(make_lm, tmp_path):
    lm = make_lm()
    lines = [
        Prompt("a", "w1 w2 w3", (" w4",)),
        Prompt("a", "w7 w7 w9", (" w9 w1", " w2")),
        Prompt("b", "w50 w2", (" w11",)),
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(as_line, lines)))
    head = started_head(lm)
    figures, table, log = evaluate(lm, head, tmp_path / "out", prompts=str(path), top=4)
    assert figures["n_prompts"] == 3
    assert figures["n_readout_untouched"] == 0
    assert list(table.columns[:13]) == [
        "category", "prompt", "answer", "answer_tokens", "run", "rank", "logit", "probability",
        "log_prob", "kl", "top1", "agrees", "top",
    ]  # fmt: skip
    assert len(table) == 12
    assert table["answer_tokens"].tolist() == [1] * 4 + [2] * 4 + [1] * 4
    for name in RUNS:
        rows = table[table["run"] == name]
        assert rows["prompt"].tolist() == [p.prompt for p in lines]
        assert rows["answer"].tolist() == [" w4", " w9 w1 |  w2", " w11"]
        want = [a.readings[name] for a in ask(head, lm, [question(lm, p) for p in lines], 4)]
        assert rows["rank"].tolist() == [r.rank for r in want]
        assert rows["log_prob"].tolist() == [r.log_prob for r in want]
        assert rows["hit"].tolist() == [r.hit for r in want]
        for top, top1 in zip(rows["top"], rows["top1"], strict=True):
            assert len(json.loads(top)) == 4
            assert json.loads(top)[0][0] == top1
    assert (figures["n_known"], figures["sae_kept_frac"]) == (0, None)  # it can do neither
    assert '[2] a: "w7 w7 w9" -> " w9 w1" | " w2"' in log
    assert 'the answer has 2 tokens, "w9" "w1"' in log
    assert "TOTALS over 3 prompts" in log
    totals = log[log.index("TOTALS") :]
    assert totals.count("sae ") == 3  # all, a, b
    assert "to say what is kept of: a (0 of 2), b (0 of 1)." in totals


def as_line(prompt):
    answers = prompt.answers[0] if len(prompt.answers) == 1 else prompt.answers
    return json.dumps({"category": prompt.category, "prompt": prompt.prompt, "answer": answers})


class Guessing(BatchTopK):
    """Another vector in every activation's place."""

    def forward(self, x):
        other = 3 * x.roll(5, 1)
        return SAEOutput(other, DenseCodes(torch.ones(len(x), self.d_sae)))


def test_a_reconstruction_can_not_beat_the_original_by_accident(make_lm, tmp_path):
    """A head that answers at random gains, but what it keeps is of the LM's own answers."""
    lm = make_lm()
    head = Guessing(d_model=16, d_sae=32, target_l0=4).eval()
    texts = [f"w{i} w{i + 1} w{2 * i % 50} w{7 * i % 50}" for i in range(3, 43)]
    asked = [question(lm, Prompt("c", text, (" w1",))) for text in texts]
    says = [{run: r.said for run, r in a.readings.items()} for a in ask(head, lm, asked, 1)]
    # of 20 prompts 6 go as the LM goes on, 14 as the random head does: it is right more often
    differ = [i for i, said in enumerate(says) if said["sae"] != said["original"]][:20]
    assert len(differ) == 20
    lines = [
        Prompt("c", texts[i], (says[i]["original" if n < 6 else "sae"],))
        for n, i in enumerate(differ)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(as_line, lines)))
    figures, table, log = evaluate(lm, head, tmp_path / "out", prompts=str(path))
    hits = table.groupby("run")["hit"].sum()
    assert (hits["original"], hits["sae"]) == (6, 14)
    assert (figures["n_asked"], figures["n_known"]) == (20, 6)
    assert (figures["sae_kept"], figures["sae_lost"], figures["sae_gained"]) == (0, 6, 14)
    assert (figures["sae_kept_frac"], figures["sae_kept_low"]) == (0, 0)
    assert figures["sae_kept_high"] == pytest.approx(0.3903, abs=1e-4)
    counts = pd.read_csv(tmp_path / "out/categories.csv")
    assert (counts["kept"] + counts["lost"] == counts["known"]).all()
    assert (counts["kept_frac"] <= 1).all()
    assert re.search(r"c +sae +20 +6 +0 +6 +14 +0\.0%", log)
    # and the original itself, spliced in, keeps all and gains nothing
    perfect = Perfect(d_model=16, d_sae=32, target_l0=4).eval()
    figures, _, _ = evaluate(lm, perfect, tmp_path / "perfect", prompts=str(path))
    assert (figures["sae_kept"], figures["sae_lost"], figures["sae_gained"]) == (6, 0, 0)
    assert figures["sae_kept_frac"] == figures["sae_kept_high"] == 1
    assert figures["sae_kept_low"] == pytest.approx(0.6097, abs=1e-4)


def test_categories_that_the_lm_cannot_do_are_said_and_not_averaged():
    """4 known are too few, 5 of 26 too small a share; 5 of 25 count."""

    def rows(category, n, known, kept):
        for i in range(n):
            for run in RUNS:
                hit = i < (known if run == "original" else kept)
                yield {"category": category, "run": run, "hit": hit, "kl": 0.0}

    made = [*rows("few", 4, 4, 4), *rows("rare", 26, 5, 5), *rows("fine", 25, 5, 2)]
    counts = _counts(pd.DataFrame(made))
    sae = counts[counts["run"] == "sae"].set_index("category")
    assert sae["can"].tolist() == [False, False, True, True]
    assert sae["kept_frac"].isna().tolist() == [True, True, False, False]
    total = sae.iloc[-1]
    assert (total["asked"], total["known"], total["kept"], total["kept_frac"]) == (25, 5, 2, 0.4)
    assert _left_out(counts).endswith("kept of: few (4 of 4), rare (5 of 26).")


def test_any_whole_answer_is_a_hit_whatever_blanks_are_before_it(make_lm):
    lm = make_lm()
    head = started_head(lm)
    said = "".join(
        ask(head, lm, [question(lm, Prompt("c", "w5 w17", (" w60 w61 w62",)))], 1)[0]
        .readings["original"]
        .said
    )
    both = ask(head, lm, [question(lm, Prompt("c", f"w5 w17 {said}", (" w1",)))], 1)[0]
    whole = f"{said} {both.readings['original'].said}"

    def hit(*answers):
        asked = question(lm, Prompt("c", "w5 w17", answers))
        return ask(head, lm, [asked], 1)[0].readings["original"].hit

    assert hit(whole)
    assert hit(f"  {whole}")
    assert hit(" w60", f" {whole}")
    assert not hit(f" {said} w63")  # only its beginning
    assert not hit(f" {said}x")


def test_hostile_text_stays_on_its_line(make_lm, tmp_path):
    lm = make_lm()
    prompt, answer = 'w1 \x1b[31m"<b>\r\n\u202ew2', "\x1b]0;x\x07\rnull"
    path = tmp_path / "mine.jsonl"
    entry = {"category": "<script>\x1b[1m\n", "prompt": prompt, "answer": answer}
    path.write_text(json.dumps(entry))
    _, table, log = evaluate(lm, started_head(lm), tmp_path / "out", prompts=str(path))
    assert all(line.isprintable() for line in log.split("\n"))
    assert r'"w1 \x1b[31m\"<b>\r\n\u202ew2" -> "\x1b]0;x\x07\rnull"' in log
    assert table["prompt"].tolist() == [r'w1 \x1b[31m"<b>\r\n\u202ew2'] * 4
    assert table["answer"].tolist() == [r"\x1b]0;x\x07\rnull"] * 4
    page = (tmp_path / "out" / "capability.html").read_text()
    ours = page[page.index("<body>") :]
    assert "\x1b" not in ours
    assert "<script>\\" not in ours
    assert r"script&gt;\\x1b[1m\\n" in ours


def test_an_answer_that_melts_into_the_prompt_is_tokenised_alone(tmp_path):
    lm = FrozenLM("embedded", "model.layers.1.mlp").load_()
    asked = question(lm, Prompt("c", "If the vase fal", ("ls",)))
    assert asked.alone
    assert asked.answer_ids == lm.tokenizer("ls", add_special_tokens=False)["input_ids"]
    own = {"prompt": "If the vase fal", "answer": "ls"}
    _, _, log = evaluate(lm, started_head(lm), tmp_path, **own)
    assert "tokenised by itself" in log
    assert "prompts   1, of your own" in log


def test_the_embedded_lm_is_asked_about_its_world(tmp_path, monkeypatch):
    few = world_prompts()[::20]
    monkeypatch.setattr("kanllama_lightning.reports.capability_report.world_prompts", lambda: few)
    lm = FrozenLM("embedded", "model.layers.1.mlp").load_()
    figures, table, log = evaluate(lm, started_head(lm, d_sae=64), tmp_path)
    assert figures["n_prompts"] == len(few)
    known = table.loc[table["run"] == "original", "hit"]
    assert known.mean() > 0.8
    assert "about the story world" in log
    first = table[(table["run"] == "original") & (table["prompt"] == few[0].prompt)]
    assert first["top1"].item() == " break"


def test_another_lm_is_asked_the_shipped_prompts(make_lm, tmp_path):
    lm = make_lm()
    report = CapabilityReport()
    report.begin(EvalRun(tmp_path, started_head(lm), lm, {}, [], tmp_path))
    assert len(report._questions) >= 120
    assert report._questions[0].prompt.answers[0] == " break"


def test_constructor_errors():
    with pytest.raises(InputError, match="capability.prompt='a' without answer"):
        CapabilityReport(prompt="a")
    with pytest.raises(InputError, match="capability.answer='a' without prompt"):
        CapabilityReport(answer="a")
    with pytest.raises(InputError, match="give a file or one prompt"):
        CapabilityReport(prompt="a", answer=" b", prompts="c.jsonl")
    with pytest.raises(InputError, match="capability.top=0"):
        CapabilityReport(top=0)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"prompt": "", "answer": " w1"}, "capability: prompt='': has no tokens"),
        ({"prompt": "w1", "answer": ""}, "capability: answer='': has no tokens"),
        ({"prompt": "w1 " * 128, "answer": "w2"}, "takes at most 128"),
        ({"prompts": "nowhere.jsonl"}, "prompts=nowhere.jsonl: is missing"),
    ],
)
def test_begin_errors(make_lm, tmp_path, kwargs, match):
    lm = make_lm()
    report = CapabilityReport(**kwargs)
    with pytest.raises(InputError, match=match):
        report.begin(EvalRun(tmp_path, started_head(lm), lm, {}, [], tmp_path))


def test_the_longest_prompt_that_fits(make_lm):
    lm = make_lm()
    asked = question(lm, Prompt("c", "w1 " * 125, ("w2 w3",)))  # with BOS, without w3: 127
    assert ask(started_head(lm), lm, [asked], 3)[0].n_ids == 127
    question(lm, Prompt("c", "w1 " * 127, ("w2",)))
    with pytest.raises(InputError, match="129 tokens with BOS"):
        question(lm, Prompt("c", "w1 " * 127, ("w2 w3",)))


def test_a_head_that_diverged_is_refused(make_lm, tmp_path):
    lm = make_lm()
    head = started_head(lm)
    with torch.no_grad():
        head.b_dec.fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        evaluate(lm, head, tmp_path, prompt="w1", answer=" w2")


def test_settings_know_the_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("one")
    report = CapabilityReport(prompts=str(path))
    before = report.settings()
    path.write_text("two")
    assert report.settings() != before
    assert CapabilityReport().settings() == {
        "prompt": None,
        "answer": None,
        "prompts": None,
        "top": 10,
    }
