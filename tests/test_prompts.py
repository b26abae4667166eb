"""The shipped prompts, files of prompts, and tokens fit for people."""

import json
import random
import re
from collections import Counter
from importlib.resources import files

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kanllama_lightning.embedded.lessons import tell_lessons
from kanllama_lightning.embedded.narrator import Narrator
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.token_text import pieces, quoted, token_text, visible
from kanllama_lightning.prompts import LLAMA, Prompt, load, world_prompts
from kanllama_lightning.prompts.text_ids import bos, seen_by, text_ids
from kanllama_lightning.types import InputError
from tests.reports.test_capability import started_head


def test_the_shipped_set_is_large_even_and_free_of_repeats():
    prompts = load(LLAMA)
    assert len(prompts) >= 120
    assert prompts[0] == Prompt(
        "cause and effect", "If the glass falls off the table, it will", (" break", " shatter")
    )
    sizes = Counter(p.category for p in prompts)
    assert set(sizes) == {
        "facts", "agreement", "induction", "arithmetic", "cause and effect", "quotation",
        "translation",
    }  # fmt: skip
    assert min(sizes.values()) >= 0.9 * max(sizes.values())
    assert len({p.prompt for p in prompts}) == len(prompts)
    for p in prompts:
        assert len(set(p.answers)) == len(p.answers) >= 1
        for answer in p.answers:  # a blank before it, but after a quotation mark
            assert answer == ("" if p.prompt.endswith('"') else " ") + answer.strip()
        assert p.prompt == p.prompt.strip()
    assert (files("kanllama_lightning.prompts") / "llama.jsonl").is_file()


@pytest.mark.slow
def test_prompts_of_the_world_have_one_answer_in_its_own_grammar():
    """Of thousands of drawn lessons, every one that starts like a prompt goes on like it."""
    narrators = [Narrator(random.Random(i)) for i in range(1500)]
    for narrator in narrators:
        tell_lessons(narrator)
    told = {
        statement
        for n in narrators
        for statement in re.findall(r"What .*?\? It says \w+\.|[A-Z][^.?]*\.", n.finish([]))
    }
    prompts = world_prompts()
    assert len(prompts) >= 100
    assert prompts[0] == Prompt(
        "falling things", "If the vase falls off the shelf, it will", (" break",)
    )
    assert len({p.prompt for p in prompts}) == len(prompts)
    found = 0
    for p in prompts:
        alike = [s for s in told if re.match(re.escape(p.prompt) + r"\b", s)]
        assert all(re.match(re.escape(p.prompt + p.answers[0]) + r"\b", s) for s in alike), (
            p,
            alike,
        )
        found += bool(alike)
    assert found > 0.95 * len(prompts)


def test_the_embedded_lm_knows_what_the_prompts_ask():
    lm = FrozenLM("embedded", "model.layers.1.mlp").load_()
    first = 0
    chosen = world_prompts()[::8]
    for p in chosen:
        start = text_ids(lm, p.prompt, "prompt")
        whole = text_ids(lm, p.prompt + p.answers[0], "prompt")
        assert whole[: len(start)] == start
        logits = lm.model(torch.tensor([[bos(lm), *start]])).logits[0, -1]
        first += int(logits.argmax()) == whole[len(start)]
    assert first >= 0.9 * len(chosen)


GOOD = {"category": "c", "prompt": "p", "answer": " a"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "it=[1] must be an object"),
        (b"{}", "has the keys none"),
        (json.dumps(GOOD | {"extra": 1}).encode(), "answer, category, extra, prompt"),
        (json.dumps(GOOD | {"answer": 3}).encode(), "answer 0=3 must be a text"),
        (json.dumps(GOOD | {"answer": [" a", ""]}).encode(), "answer 1='' must be a text"),
        (json.dumps(GOOD | {"answer": []}).encode(), "answer=[] must be a text, or a list"),
        (json.dumps(GOOD | {"prompt": "  "}).encode(), "prompt='  ' must be a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError, match=r"mine\.jsonl', line 3: ") as e:
        load(path)
    assert reason in str(e.value)


def test_files_of_any_line_ends_are_read_and_empty_ones_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    text = json.dumps(GOOD | {"prompt": "über\u2028uns"}, ensure_ascii=False)
    path.write_bytes(f"\r\n{text}\r\n{json.dumps(GOOD)}".encode())
    assert load(path) == [Prompt("c", "über\u2028uns", (" a",)), Prompt("c", "p", (" a",))]
    path.write_text(json.dumps(GOOD | {"answer": [" a", " b"]}))
    assert load(path) == [Prompt("c", "p", (" a", " b"))]
    path.write_bytes(b"\n \n")
    with pytest.raises(InputError, match="holds no prompt"):
        load(path)
    with pytest.raises(InputError, match=r"prompts=.*none\.jsonl: is missing"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder where a file should be"):
        load(tmp_path)


def test_a_line_stays_a_line():
    hostile = "a\x1b[31m\r\n\t\x00\x7f\x9b\u202e\u2028\u00a0\ud800\\🐱é"
    shown = visible(hostile)
    assert shown.isprintable()
    assert shown == r"a\x1b[31m\r\n\t\x00\x7f\x9b\u202e\u2028\xa0\ud800\\🐱é"
    assert quoted('say "hi"') == r'"say \"hi\""'


def test_token_text_of_parts_of_characters_and_of_no_token():
    tokenizer = FrozenLM("embedded", "model.layers.1.mlp").tokenizer
    cat = tokenizer("🐱", add_special_tokens=False)["input_ids"]
    assert [token_text(tokenizer, i) for i in cat] == ["<0xF0>", "<0x9F>", "<0x90>", "<0xB1>"]
    assert [token_text(tokenizer, i) for i in tokenizer(" break")["input_ids"][-1:]] == [" break"]
    assert token_text(tokenizer, 10**6) == "<id 1000000>"
    every = [token_text(tokenizer, i) for i in range(len(tokenizer))]
    assert all(every)
    assert len(set(every)) > 0.99 * len(every)


def test_token_text_of_a_sentencepiece_vocabulary():
    """Llama 2's kind: blanks as a letter of their own, bytes by their names."""
    names = ["<unk>", "<0x0A>", "<0xF0>", "▁", "▁▁", "▁the", "re"]
    inner = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    shown = [token_text(tokenizer, i) for i in range(1, len(names))]
    assert shown == ["\n", "<0xF0>", " ", "  ", " the", "re"]


def test_special_tokens_and_sinks_do_not_count(make_lm):
    lm = make_lm()
    head = started_head(lm)
    ids = [bos(lm), *text_ids(lm, "w1 w2 <eos> w3", "text")]
    assert ids[3] == lm.tokenizer.eos_token_id
    seen = seen_by(head, lm, [ids])
    assert seen.mask.tolist() == [[False, True, True, False, True]]
    norms = lm.acts(torch.tensor([ids]))[0].norm(dim=1)
    head.norm_limit.copy_((norms[1] + norms[2]) / 2)
    mask = seen_by(head, lm, [ids]).mask[0]
    assert mask[1:3].sum() == 1
    assert torch.equal(mask, seen.mask[0] & (norms <= head.norm_limit))


def test_texts_that_cannot_be_given_to_the_model(make_lm):
    lm = make_lm()
    with pytest.raises(InputError, match="text='': has no tokens"):
        text_ids(lm, "", "text")
    with pytest.raises(InputError, match=r"text='.*ud800': is no valid Unicode"):
        text_ids(lm, "\ud800", "text")
    lm.config.vocab_size = 10
    with pytest.raises(InputError, match="token id 63, but model .* knows 10 ids"):
        text_ids(lm, "w60", "text")
    lm.tokenizer.bos_token = None
    with pytest.raises(InputError, match="has no BOS token"):
        bos(lm)


def test_pieces_are_the_text_that_each_token_adds():
    lm = FrozenLM("embedded", "model.layers.1.mlp")
    text = "Lily's \u00ef\U0001f600 cat \u65e5. <0x41>"
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    made = pieces(lm.tokenizer, ids)
    assert "".join(made) == text
    at = made.index("\U0001f600")
    assert made[at - 3 : at] == ["", "", ""]
    # half a character, at either end, goes by its bytes
    assert pieces(lm.tokenizer, ids[at - 1 : at + 1]) == ["\\x98", "\\x80"]
    assert "".join(pieces(lm.tokenizer, ids[at - 3 : at])) == "\\xf0\\x9f\\x98"


def test_pieces_of_a_byte_level_vocabulary():
    made = Tokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    text = "a \U0001f600 na\u00efve \\x9f\n"
    ids = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, ids)) == text
    assert pieces(tokenizer, ids)[2:6] == ["", "", "", "\U0001f600"]
