"""One text under a head, against plain transformers; what reaches a terminal and a page."""

import io
import math
from html.parser import HTMLParser

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.prompts.try_page import trial_page
from kanllama_lightning.prompts.try_text import show, try_text
from kanllama_lightning.types import InputError
from tests.reports.test_capability import Perfect, by_hook, started_head

TEXT = "w5 w17 w2 w33 w8"


def ids_of(lm, text=TEXT):
    return [0, *lm.tokenizer.convert_tokens_to_ids(text.split())]


def printed(trial, **kwargs):
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system=None).print(
        show(trial, **kwargs)
    )
    return out.getvalue()


def embedded():
    lm = FrozenLM("embedded", "model.layers.1.mlp").load_()
    return lm, started_head(lm, d_sae=64)


@pytest.mark.parametrize("run", ["original", "sae"])
def test_predictions_and_continuations_are_those_of_plain_transformers(make_lm, tiny_lm_dir, run):
    lm = make_lm()
    head = started_head(lm)
    trial = try_text(head, lm, TEXT, n_new=6, top=4)
    replace = None if run == "original" else lambda x: head(x).x_hat
    ids = ids_of(lm)
    p = by_hook(tiny_lm_dir, ids, replace)[-1].softmax(0)
    best = p.topk(4)
    assert [t for t, _ in trial.predictions[run]] == lm.tokenizer.convert_ids_to_tokens(
        best.indices.tolist()
    )
    assert [v for _, v in trial.predictions[run]] == pytest.approx(best.values.tolist(), rel=1e-4)
    want = []
    while len(want) < 6:
        token = int(by_hook(tiny_lm_dir, ids + want, replace)[-1].argmax())
        if token == lm.tokenizer.eos_token_id:
            break
        want.append(token)
    assert trial.continuations[run].ids == want
    assert "".join(trial.continuations[run].pieces) == "".join(
        f" {t}" for t in lm.tokenizer.convert_ids_to_tokens(want)
    )


def test_the_original_is_what_generate_writes(tiny_lm_dir, make_lm):
    lm = make_lm()
    model = AutoModelForCausalLM.from_pretrained(tiny_lm_dir).eval()
    ids = torch.tensor([ids_of(lm)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=lm.tokenizer.eos_token_id,
    )
    made = [i for i in made[0, ids.shape[1] :].tolist() if i != lm.tokenizer.eos_token_id]
    assert try_text(started_head(lm), lm, TEXT, n_new=8).continuations["original"].ids == made


def test_tokens_have_their_latents_l0_and_cosine(make_lm):
    lm = make_lm()
    head = started_head(lm)
    trial = try_text(head, lm, TEXT, n_new=0, latents=3)
    x = lm.acts(torch.tensor([ids_of(lm)]))[0, 1:]
    with torch.no_grad():
        latents = head.encode(x)
        x_hat = head.decode(latents)
    assert [t.token for t in trial.tokens] == TEXT.split()
    assert "".join(t.text for t in trial.tokens) == TEXT
    for i, token in enumerate(trial.tokens):
        assert token.replaced
        assert token.l0 == int((latents[i] != 0).sum())
        want = sorted(((j, v) for j, v in enumerate(latents[i].tolist()) if v), key=lambda p: -p[1])
        assert [j for j, _ in token.latents] == [j for j, _ in want[:3]]
        assert [v for _, v in token.latents] == pytest.approx([v for _, v in want[:3]], rel=1e-5)
        cosine = float(x[i] @ x_hat[i] / (x[i].norm() * x_hat[i].norm()))
        assert token.cosine == pytest.approx(cosine, abs=1e-5)
    assert any(t.latents for t in trial.tokens)
    assert trial.continuations["sae"] == ([], [], "length")


def test_a_perfect_head_changes_nothing(make_lm):
    lm = make_lm()
    trial = try_text(Perfect(d_model=16, d_sae=32, target_l0=4).eval(), lm, TEXT)
    assert trial.predictions["sae"] == trial.predictions["original"]
    assert trial.continuations["sae"] == trial.continuations["original"]
    assert trial.kl == 0
    assert all(t.cosine == pytest.approx(1) for t in trial.tokens)


def test_steering_sets_a_latent_and_keeps_the_error(make_lm):
    lm = make_lm()
    head = started_head(lm)
    plain = try_text(head, lm, TEXT, n_new=4)
    assert set(plain.continuations) == {"original", "sae"}
    ids = torch.tensor([ids_of(lm)])
    with torch.no_grad():
        x = lm.acts(ids)[0, 1:]
        z = head.encode(x)
        latent = int(z.sum(0).argmax())
        changed = z.clone()
        changed[:, latent] = 3.0
        acts = lm.acts(ids).clone()
        # the linear dictionary says what one latent more or less writes
        acts[0, 1:] = x + (changed - z) @ head.decoder.W_dec / head.scale
        want = lm.logits(lm.resume(lm.prefix(ids), acts)[0, -1]).double().softmax(-1)
    trial = try_text(head, lm, TEXT, n_new=4, top=64, steer={latent: 3.0})
    assert trial.predictions["original"] == try_text(head, lm, TEXT, 4, 64).predictions["original"]
    assert trial.continuations["sae"] == plain.continuations["sae"]
    got = [p for _, p in trial.predictions["steered"]]
    torch.testing.assert_close(
        torch.tensor(got), want.topk(64).values.float(), rtol=1e-3, atol=1e-6
    )
    assert trial.predictions["steered"] != trial.predictions["original"]
    assert f"steered: latent {latent} to 3 on every token" in printed(trial)
    assert f"Steered: latent {latent} to 3" in trial_page(trial, TEXT)
    # set to what it is anyway, nothing changes
    silent = int((z == 0).all(0).nonzero()[0])
    same = try_text(head, lm, TEXT, n_new=4, steer={silent: 0.0})
    assert same.continuations["steered"] == same.continuations["original"]
    with pytest.raises(InputError, match="steer=32: there are latents 0 to 31"):
        try_text(head, lm, TEXT, steer={32: 1.0})


def test_what_is_not_replaced_says_so(make_lm):
    lm = make_lm()
    trial = try_text(started_head(lm), lm, "w1 <eos> w2", n_new=2)
    assert [t.replaced for t in trial.tokens] == [True, False, True]
    assert trial.tokens[1].latents == []
    assert math.isnan(trial.tokens[1].cosine)
    assert "not replaced" in printed(trial)
    assert trial_page(trial, "t").count("not replaced</td>") == 1


def test_it_stops_at_the_end_of_text_and_of_the_context(make_lm):
    lm = make_lm()
    head = started_head(lm)
    first = try_text(head, lm, TEXT, n_new=3).continuations["original"].ids
    lm.config.eos_token_id = [1, first[1]]  # Llama 3.2 has a list of them
    stopped = try_text(head, lm, TEXT, n_new=3).continuations["original"]
    assert stopped.ids == first[:1]
    assert stopped.stopped == "end of text"
    lm.config.eos_token_id = 1
    lm.config.max_position_embeddings = 7  # BOS, 5 words, and one more
    trial = try_text(head, lm, TEXT, n_new=5)
    assert trial.continuations["original"].ids == first[:2]
    assert trial.continuations["original"].stopped == "context"
    assert "[context]" in printed(trial)


def test_characters_of_several_tokens_and_hostile_text():
    lm, head = embedded()
    text = "Anna 🐱\x1b[31m <b>é</b>\r\n\u202e[red]x[/red] & :cat: the"
    trial = try_text(head, lm, text, n_new=3)
    assert "".join(t.text for t in trial.tokens) == text
    cat = next(i for i, t in enumerate(trial.tokens) if "🐱" in t.text)
    assert [t.text for t in trial.tokens[cat : cat + 4]] == ["🐱", "", "", ""]
    assert trial.tokens[cat].token == "<0xF0>"
    labels = dict.fromkeys(range(64), "\x1b]0;owned\x07<i>'")
    shown = printed(trial, labels=labels)
    assert not set(shown) & {"\x07", "\u202e", "\r"}
    assert "\x1b[31m" not in shown
    assert "\x1b]" not in shown
    assert "[red]x[/red] & :cat:" in " ".join(shown.split())
    page = trial_page(trial, "<script>alert(1)</script>", labels)
    assert not set(page) & {"\x07", "\u202e", "\r", "\x1b"}
    assert "<script" not in page
    assert "<b>é" not in page
    assert "<i>" not in page
    assert page.count("🐱") == 1


class Reader(HTMLParser):
    """Every tag closed, every resource in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_complete_in_itself(make_lm):
    lm = make_lm()
    trial = try_text(started_head(lm), lm, TEXT, n_new=6)
    page = trial_page(trial, "A title & more", {trial.tokens[0].latents[0][0]: "a label"})
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    text = "".join(reader.text)
    assert "A title & more" in text
    assert "(a label)" in text
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page
    one, two = (c.ids for c in trial.continuations.values())
    assert one != two
    assert "<mark>" in page
    assert "(a label)" in printed(trial, labels={trial.tokens[0].latents[0][0]: "a label"})
    same = try_text(Perfect(d_model=16, d_sae=32, target_l0=4).eval(), lm, TEXT, n_new=6)
    assert "<mark>" not in trial_page(same, "same")


def test_input_errors(make_lm):
    lm = make_lm()
    head = started_head(lm)
    with pytest.raises(InputError, match="text='': has no tokens"):
        try_text(head, lm, "")
    with pytest.raises(InputError, match=r"text='w1 .*\.\.\.': 129 tokens with BOS.*at most 128"):
        try_text(head, lm, "w1 " * 128)
    assert try_text(head, lm, "w1 " * 127, n_new=3).continuations["sae"].stopped == "context"
    for name, value in (("n_new", -1), ("top", 0), ("latents", 0)):
        with pytest.raises(InputError, match=f"{name}={value}: whole numbers from"):
            try_text(head, lm, TEXT, **{name: value})
    with torch.no_grad():
        head.b_dec.fill_(float("inf"))
    with pytest.raises(InputError, match="diverged"):
        try_text(head, lm, TEXT)
