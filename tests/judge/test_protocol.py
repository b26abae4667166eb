"""What the judge is shown of latents, and how its answers are read."""

import json
import math
import random

import pytest
import torch

from kanllama_lightning.functional.sparse import SparseCodes
from kanllama_lightning.judge import protocol
from kanllama_lightning.judge.panel import exchanged
from kanllama_lightning.judge.protocol import (
    Case,
    Choice,
    balanced_accuracy,
    choose,
    detect_questions,
    explain_question,
    marked,
    parse_explanation,
    parse_labels,
    shown,
    spread,
)
from kanllama_lightning.measures.contexts import Contexts, Windows
from kanllama_lightning.types import Prefix, SAEOutput, TokenBatch, ValidationBatch

DOCS, LENGTH = 300, 20


def batch(latents: torch.Tensor) -> ValidationBatch:
    """A document per row, BOS first; the activations given, [docs, length - 1, d_sae]."""
    n, length = latents.shape[0], latents.shape[1] + 1
    ids = torch.arange(n * length).view(n, length) % 997
    keep = torch.ones(n, length, dtype=torch.bool)
    keep[:, 0] = False
    doc = torch.arange(n)[:, None].expand(n, length)
    z = latents.flatten(0, 1)
    rows, columns = z.nonzero(as_tuple=True)
    codes = SparseCodes(z[rows, columns], rows, columns, *z.shape)
    acts = torch.zeros(n, length, 4)
    x = acts[keep]
    tokens = TokenBatch(ids, keep, doc, torch.zeros(3, dtype=torch.int64))
    return ValidationBatch("s", tokens, Prefix(acts, None), keep, x, SAEOutput(x, codes))


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    """Latent 0 fires on one token of two documents of three, 1 on few, 2 everywhere, 3 never."""
    g = torch.Generator().manual_seed(0)
    z = torch.zeros(DOCS, LENGTH - 1, 5)
    some = (torch.arange(DOCS) % 3 > 0).nonzero().squeeze(1)
    at = torch.randint(LENGTH - 1, (len(some),), generator=g)
    z[some, at, 0] = torch.rand(len(some), generator=g) + 0.1
    z[:12, 5, 1] = 1.0
    z[:, :, 2] = torch.rand(DOCS, LENGTH - 1, generator=g) + 0.1
    z[some, at, 4] = -z[some, at, 0]
    found = Contexts(5, width=8, top=32, sampled=100, silent=200)
    found.update(batch(z))
    return found


def test_windows_of_the_two_halves(contexts: Contexts) -> None:
    found = choose(contexts, 0, 60, seed=0)
    assert found is not None
    assert [len(w) for w in found] == [30, 25, 25]
    explain, active, silent = ({int(d) for d in w.doc} for w in found)
    assert [len(explain), len(active), len(silent)] == [30, 25, 25]
    assert not explain & active
    assert not explain & silent
    assert not active & silent
    peaks = found.explain.values.max(1).values
    top, rest = peaks[:10], peaks[10:]
    assert top.tolist() == sorted(top.tolist(), reverse=True)
    assert rest.tolist() == sorted(rest.tolist(), reverse=True)
    for some in (rest, found.active.values.max(1).values):  # of all strengths
        assert some.min() < 0.3
        assert some.max() > 0.8
        assert some.min() >= 0.01 * contexts.meter.largest[0]
    assert all(doc % 3 > 0 for doc in explain | active)
    assert all(doc % 3 == 0 for doc in silent) or len(silent) == 25
    assert not found.silent.values.any()


def test_halves_depend_on_the_seed_and_repeat(contexts: Contexts) -> None:
    found, same, other = (choose(contexts, 0, 60, seed) for seed in (0, 0, 1))
    assert found is not None
    assert same is not None
    assert other is not None
    for a, b in zip(found, same, strict=True):
        assert a.doc.equal(b.doc)
    first = {int(d) for d in found.explain.doc}
    assert first & {int(d) for d in other.active.doc}


def test_latents_that_cannot_be_judged(contexts: Contexts) -> None:
    assert choose(contexts, 1, 60, 0) is None  # too few documents
    assert choose(contexts, 2, 60, 0) is None  # never silent
    assert choose(contexts, 3, 10, 0) is None  # dead
    assert choose(contexts, 4, 10, 0) is None  # never positive
    assert choose(contexts, 0, 101, 0) is not None
    assert choose(contexts, 0, 133, 0) is None


def test_activations_below_a_hundredth_of_the_largest_do_not_count() -> None:
    z = torch.zeros(DOCS, LENGTH - 1, 1)
    z[:100, 9, 0] = 0.5
    z[100:200, 9, 0] = 0.0049
    z[0, 9, 0] = 0.5
    found = Contexts(1, width=8, top=32, sampled=250, silent=200)
    found.update(batch(z))
    chosen = choose(found, 0, 60, 0)
    assert chosen is not None
    assert torch.cat([chosen.explain.doc, chosen.active.doc]).max() < 100
    begin, end = chosen.silent.start, chosen.silent.start + chosen.silent.length
    assert (((begin > 10) | (end <= 10)) | (chosen.silent.doc >= 200)).all()  # not even faintly


def test_a_window_as_text() -> None:
    pieces = ["Tom", " saw", " the", " cat", "."]
    assert marked(pieces, [False] * 5) == '"Tom saw the cat."'
    assert marked(pieces, [False, False, True, True, False]) == '"Tom saw <<the cat>>."'
    assert marked(pieces, [True, False, False, False, True]) == '"<<Tom>> saw the cat<<.>>"'
    assert marked(["a", "  ", "b"], [False, True, False]) == '"a<<  >>b"'
    assert marked([], []) == '""'


def test_marks_cannot_be_mistaken() -> None:
    assert marked(["<<x>>", "<", ">"], [False, True, False]) == r'"\<\<x\>\><<\<>>\>"'
    assert marked(['" \n2. "y"', "\\<"], [False, True]) == r'"\" \n2. \"y\"<<\\\<>>"'
    # an unescaped pair is a mark, whatever the text
    draw = random.Random(0)
    for _ in range(300):
        pieces = ["".join(draw.choices('<>\\" \na\u2028', k=draw.randint(0, 4))) for _ in range(6)]
        marks = [draw.random() < 0.5 for _ in pieces]
        line = marked(pieces, marks)
        assert "\n" not in line
        assert len(line.splitlines()) == 1
        plain = line.replace("\\\\", "").replace("\\<", "").replace("\\>", "").replace('\\"', "")
        assert plain.count("<<") == plain.count(">>")
        assert plain.replace("<<", "").replace(">>", "").count("<") == 0
        assert plain.count('"') == 2


def test_marks_on_parts_of_a_character_go_to_all_of_it() -> None:
    assert marked(["a", "", "", "€", "b"], [False, True, False, False, False]) == '"a<<€>>b"'
    assert marked(["a", "", "€", "b"], [False, False, True, False]) == '"a<<€>>b"'
    assert marked(["a", ""], [True, True]) == '"<<a>>"'


def test_strength_and_marks(contexts: Contexts) -> None:
    windows = Windows(
        torch.zeros(2, dtype=torch.int64), torch.tensor([1, 1]), torch.tensor([4, 3]),
        torch.tensor([1, 0]), torch.tensor([0, 1]),
        torch.tensor([[0.0, 1.0, 0.31, 0.29], [0.04, 0.0, 0.0, 0.0]])
        * float(contexts.meter.largest[0]),
    )  # fmt: skip
    none = windows.pick(slice(0))

    def pieces(ids: object) -> list[str]:
        return [" a", " b", " c", " d"][: len(list(ids))]  # type: ignore[call-overload]

    case = shown(contexts, 0, Choice(windows, windows, none), pieces, 0)
    assert case.explain == ['strength 10/10: " a <<b c>> d"', 'strength 1/10: " <<a>> b c"']
    assert sorted(case.detect) == ['" a b c d"', '" a b c"']
    assert case.truth == [True, True]


def case(n: int = 25) -> Case:
    lines = [f'strength {i % 10 + 1}/10: "<<w{i}>>"' for i in range(30)]
    return Case(
        3, 0.1, lines, [f'"v{i}"' for i in range(2 * n)], [i % 3 == 0 for i in range(2 * n)]
    )


def test_questions() -> None:
    asked = explain_question(case())
    system, user = (m["content"] for m in asked.messages)
    assert [m["role"] for m in asked.messages] == ["system", "user"]
    assert len(user.splitlines()) == 31
    assert user.splitlines()[30] == '30. strength 10/10: "<<w29>>"'
    for word in (*protocol.CATEGORIES, "never an instruction", "5:", "1:", "20 words"):
        assert word in system
    assert asked.schema["additionalProperties"] is False
    assert set(asked.schema["required"]) == {"category", "score", "explanation"}

    five = detect_questions(case(), 'a "cat"\n2. and more <<')
    assert len(five) == 5
    for number, question in enumerate(five):
        first, count, *lines = question.messages[1]["content"].splitlines()
        assert first == r'Description: "a \"cat\"\n2. and more <<"'
        assert count == "10 windows:"
        assert lines == [f'{i + 1}. "v{10 * number + i}"' for i in range(10)]
        labels = question.schema["properties"]["labels"]
        assert (labels["minItems"], labels["maxItems"]) == (10, 10)
        assert "never an instruction" in question.messages[0]["content"]
        assert "<<w" not in str(question.messages)  # a conversation of its own
    assert [q.schema["properties"]["labels"]["minItems"] for q in detect_questions(case(6), "x")] \
        == [10, 2]  # fmt: skip


GOOD = {"category": "low_level", "score": 3, "explanation": "a word"}


def test_explanations_that_can_be_used() -> None:
    for text in (json.dumps(GOOD), f"```json\n{json.dumps(GOOD)}\n```", f" {json.dumps(GOOD)} "):
        assert parse_explanation(text) == ("low_level", 3, "a word")
    odd = parse_explanation(json.dumps(GOOD | {"explanation": " a\n b\u202e "}))
    assert odd.text == r"a b\u202e"
    with pytest.raises(ValueError, match="malformed JSON"):  # half a character is none
        parse_explanation(json.dumps(GOOD | {"explanation": "a\ud800"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "malformed JSON"),
        ("{", "malformed JSON"),
        ("[" * 100_000, "malformed JSON"),
        ('{"score": ' + "1" * 5000 + "}", "malformed JSON"),
        ("3", "wrong schema"),
        ("{}", "wrong schema"),
        (json.dumps(GOOD | {"score": 0}), "wrong schema"),
        (json.dumps(GOOD | {"score": 6}), "wrong schema"),
        (json.dumps(GOOD | {"score": -1}), "wrong schema"),
        (json.dumps(GOOD | {"score": 3.0}), "wrong schema"),
        (json.dumps(GOOD | {"score": True}), "wrong schema"),
        (json.dumps(GOOD | {"score": "3"}), "wrong schema"),
        (json.dumps(GOOD | {"score": math.nan}), "malformed JSON"),
        (json.dumps(GOOD | {"category": "mid_level"}), "wrong schema"),
        (json.dumps(GOOD | {"category": ["low_level"]}), "wrong schema"),
        (json.dumps(GOOD | {"explanation": " \n"}), "wrong schema"),
        (json.dumps(GOOD | {"explanation": None}), "wrong schema"),
        (json.dumps(GOOD | {"more": 1}), "wrong schema"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_explanations_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_explanation(text)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, 0], "wrong number of labels"),
        ([1, 0, 1, 0], "wrong number of labels"),
        ([], "wrong number of labels"),
        ([1, 0, 2], "wrong schema"),
        ([1, 0, True], "wrong schema"),
        ([1, 0, "1"], "wrong schema"),
        ([1, 0, 1.0], "wrong schema"),
        ([1, 0, None], "wrong schema"),
        ("101", "wrong schema"),
        ({"1": 1}, "wrong schema"),
    ],
    ids=str,
)
def test_labels(labels: object, said: str) -> None:
    parse = parse_labels(3)
    assert parse('{"labels": [1, 0, 1]}') == [True, False, True]
    with pytest.raises(ValueError, match=said):
        parse(json.dumps({"labels": labels}))


def test_balanced_accuracy_by_hand() -> None:
    truth = [True, True, False, False, False]
    assert balanced_accuracy(truth, truth) == 1
    assert balanced_accuracy([not t for t in truth], truth) == 0
    assert balanced_accuracy([True] * 5, truth) == 0.5
    assert balanced_accuracy([True, False, False, False, True], truth) == pytest.approx(7 / 12)


def test_spread_takes_one_of_each_slice() -> None:
    draw = random.Random(0)
    for n, wanted in ((100, 10), (25, 10), (10, 10), (3, 10), (0, 4), (7, 0), (26, 25)):
        found = spread(n, wanted, draw)
        assert len(found) == min(n, wanted)
        assert found == sorted(set(found))
        for i, place in enumerate(found if n > wanted else []):
            assert i * n // wanted <= place < (i + 1) * n // wanted


def test_explanations_are_exchanged_without_exception() -> None:
    for n in (2, 3, 20):
        pairs = exchanged(range(n), 10)
        assert len(pairs) == min(n, 10)
        assert all(a != b for a, b in pairs)
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    assert exchanged(range(9), 9) == exchanged(range(9), 9)
