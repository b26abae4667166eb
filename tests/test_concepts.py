"""Facts and latents: planted heads, splitting and mixing by hand, spans to tokens on a story."""

import pytest
import torch
from torch import Tensor

from kanllama_lightning.embedded import FACTS
from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.heads import PCA, BatchTopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures import concept_matching as concepts
from kanllama_lightning.measures.concept_matching import codes_of, kind, read_stories, recover
from kanllama_lightning.types import DenseCodes

EVERY = 200
"""Tokens of a made-up half."""


def planted(*stretches: tuple[int, int]) -> Tensor:
    """Columns that are True from and to the tokens given."""
    at = torch.arange(EVERY)[:, None]
    begin, end = torch.tensor(stretches).T
    return (at >= begin) & (at < end)


def codes(*stretches: tuple[int, int]) -> DenseCodes:
    return DenseCodes(planted(*stretches).float())


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return FrozenLM("embedded", "model.layers.1.mlp").load_()


@pytest.mark.parametrize("as_codes", [DenseCodes, lambda z: DenseCodes(z).sparse(), lambda z: z])
def test_latents_that_are_the_facts(as_codes) -> None:
    g = torch.Generator().manual_seed(0)
    halves = [torch.rand(500, 30, generator=g) < 0.2 for _ in range(2)]
    latents = [as_codes(half[:, torch.arange(30).flip(0)] * 2.5) for half in halves]
    found = recover(latents[0], halves[0], latents[1], halves[1])
    assert found.latent.tolist() == list(range(30))[::-1]
    assert found.threshold.unique().tolist() == [2.5]
    for name in ("chosen_f1", "f1", "precision", "recall", "auroc", "best_auroc", "union_recall"):
        assert getattr(found, name).unique().tolist() == [1], name
    assert found.split.unique().tolist() == [1]
    assert found.mixed.tolist() == [1] * 30
    assert found.n_tokens.equal(halves[1].sum(0))
    figures = found.figures()
    assert figures["n_facts"] == 30
    assert figures["n_tokens"] == 1000
    assert {v for k, v in figures.items() if not k.startswith("n_")} == {1}


def test_latents_that_mean_nothing_gain_nothing_on_the_other_half() -> None:
    g = torch.Generator().manual_seed(0)
    facts = [torch.rand(300, 5, generator=g) < 0.1 for _ in range(2)]
    latents = [torch.randn(300, 200, generator=g) for _ in range(2)]
    found = recover(latents[0], facts[0], latents[1], facts[1])
    assert found.chosen_f1.mean() > 0.3
    assert found.f1.mean() < 0.25
    assert (found.auroc - 0.5).abs().max() < 0.2


def test_which_facts_count() -> None:
    """20 tokens in both halves, and half of them at most."""
    first = planted((0, 19), (0, 20), (0, 20), (0, 100), (0, 101), (0, 60))
    second = planted((0, 30), (0, 20), (0, 19), (0, 100), (0, 90), (0, 120))
    z = codes((0, 20))
    assert recover(z, first, z, second).fact.tolist() == [1, 3]


def test_no_fact_counts() -> None:
    z = codes((0, 20))
    found = recover(z, planted((0, 3)), z, planted((0, 3)))
    assert found.figures() == {"n_facts": 0, "mixed_frac": 0.0, "n_tokens": 2 * EVERY}


def test_thresholds_chosen_on_one_half_are_judged_on_the_other() -> None:
    """From 2 on all 20 are right in the first half; in the other, 10 of 15 said, of 40 held."""
    facts = planted((0, 20)), planted((0, 40))
    first, second = torch.zeros(EVERY, 1), torch.zeros(EVERY, 1)
    first[:20], first[20:50] = 2, 1
    second[:10], second[40:45], second[10:40] = 3, 2, 1.9
    found = recover(DenseCodes(first), facts[0], DenseCodes(second), facts[1])
    assert found.threshold.item() == 2
    assert found.chosen_f1.item() == 1
    assert found.precision.item() == pytest.approx(10 / 15)
    assert found.recall.item() == pytest.approx(10 / 40)
    assert found.f1.item() == pytest.approx(2 * 10 / (15 + 40))
    # of 40 * 160 pairs: 10 beat all, 30 beat the 155 silent ones
    assert found.auroc.item() == pytest.approx((10 * 160 + 30 * 155) / (40 * 160))


def test_splitting() -> None:
    """A fact on 0..100: two latents share it, a third is impure, a fourth covers too little."""
    fact = planted((0, 100))
    z = codes((0, 40), (30, 62), (60, 110), (99, 100), (150, 160))
    found = recover(z, fact, z, fact)
    # (30, 62) and (99, 100) are pure, the last covers 1 of 100, just enough; (60, 110) is 40 of 50
    assert found.split.item() == 3
    assert found.union_recall.item() == pytest.approx(0.63)
    narrow = recover(codes((0, 36), (32, 100)), fact, codes((0, 10), (50, 60)), fact)
    assert narrow.split.item() == 2
    assert narrow.union_recall.item() == pytest.approx(0.2), "recall is of the test half"


def test_mixing() -> None:
    animal, cat, monday, all_of_it = (0, 60), (0, 25), (100, 130), (0, 90)
    facts = planted(animal, cat, monday, all_of_it)
    union = planted((0, 25), (100, 130)).any(1, keepdim=True)
    latents = torch.cat(
        [
            planted((0, 60)),  # animal; 60 of 90 is half of all_of_it, which leaves nothing new
            planted((0, 25)),  # cat: 25 of 60 is less than half
            union,  # cat and Monday
            planted((0, 20)),  # most of cat
            planted((0, 12)),  # less than half of everything
            planted((140, 150)),  # nothing
            planted((0, 0)),  # dead
        ],
        1,
    ).float()
    found = recover(DenseCodes(latents), facts, DenseCodes(latents), facts)
    assert found.mixed.tolist() == [1, 1, 2, 1, 0, 0]
    figures = found.figures()
    assert figures["mean_mixed"] == pytest.approx(5 / 4)
    assert figures["mixed_frac"] == pytest.approx(4 / 6)


def test_half_new_is_enough_to_mix() -> None:
    """A second fact of 40 tokens: 20 of them new count, 19 do not."""
    latent = codes((0, 100))
    assert recover(
        latent, planted((0, 50), (30, 70)), latent, planted((0, 50), (30, 70))
    ).mixed.tolist() == [2]
    assert recover(
        latent, planted((0, 50), (29, 69)), latent, planted((0, 50), (29, 69))
    ).mixed.tolist() == [1]


def test_kinds() -> None:
    assert kind("now:place:park") == "now"
    assert kind("animal") == kind("animal:cat") == "animal"
    assert kind("in_quote") == kind("genre:tale") == "structure"
    assert kind("noun") == "word class"
    assert {kind(name) for name in FACTS} >= {"speaker", "verb", "colour", "tense", "refers_to"}


def test_spans_of_a_story_become_tokens(lm: FrozenLM) -> None:
    read = read_stories(lm, 3, seed=7)
    assert read.facts.shape == (len(read.x), len(FACTS))
    of_story = read.only(read.story == 0)
    text = read.told[0].text
    assert text.startswith("Rosa had a white cat named Lucky. Every morning, Rosa")
    words = [text[start:end] for start, end in of_story.spans.tolist()]
    assert "".join(words) == text
    assert words[:11] == [
        "R",
        "osa",
        " had",
        " a",
        " white",
        " cat",
        " named",
        " L",
        "uck",
        "y",
        ".",
    ]

    def tokens_with(fact: str) -> list[int]:
        return of_story.facts[:20, FACTS.index(fact)].nonzero().squeeze(1).tolist()

    assert tokens_with("name:rosa") == [0, 1, 14]
    assert tokens_with("animal:cat") == [5, 17]
    assert tokens_with("colour:white") == [4]
    assert tokens_with("pet_name") == [7, 8, 9]
    assert tokens_with("period") == [10]
    assert tokens_with("genre:tale") == list(range(20))
    by_hand = {
        (t, FACTS.index(fact.name))
        for t, (start, end) in enumerate(of_story.spans.tolist())
        for fact in read.told[0].facts
        if start < fact.end and fact.start < end
    }
    assert {(t, f) for t, f in of_story.facts.nonzero().tolist()} == by_hand


def test_activations_are_those_of_each_story_alone(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_stories(lm, 5, seed=7)
    monkeypatch.setattr(concepts, "LM_ROWS", 1)
    alone = read_stories(lm, 5, seed=7)
    assert torch.allclose(read.x, alone.x, atol=1e-4)
    assert read.facts.equal(alone.facts)
    ids = lm.tokenizer(read.told[1].text, add_special_tokens=False)["input_ids"]
    x = lm.acts(torch.tensor([[lm.tokenizer.bos_token_id, *ids]]))[0, 1:]
    assert torch.allclose(read.x[read.story == 1], x, atol=1e-4)


def test_halves_and_norm_limit(lm: FrozenLM) -> None:
    read = read_stories(lm, 5, seed=7)
    first, second = read.halves()
    assert first.story.unique().tolist() == [0, 1]
    assert second.story.unique().tolist() == [2, 3, 4]
    norms = read.x.norm(dim=1)
    kept = read_stories(lm, 5, seed=7, norm_limit=norms.median())
    assert kept.x.equal(read.x[norms <= norms.median()])
    assert kept.spans.equal(read.spans[norms <= norms.median()])


def test_codes_do_not_depend_on_how_many_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    head = BatchTopK(d_model=8, d_sae=16, target_l0=2)
    head.start_(x)
    head.calibrate_(x)
    head.eval()
    monkeypatch.setattr(concepts, "HEAD_ROWS", 7)
    found = codes_of(head, x)
    assert isinstance(found, SparseCodes)
    assert torch.allclose(found.dense(), head.encode(x), atol=1e-6)
    pca = PCA(8, 3)
    pca.start_(x)
    assert torch.allclose(codes_of(pca, x).dense(), pca.encode(x), atol=1e-6)
