import json
import logging
import threading
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kanllama_lightning.corpus import LocalCorpus, Mixture, StoryWorldCorpus
from kanllama_lightning.data import stream
from kanllama_lightning.data.ahead import Ahead
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.data.vocabulary import vocab_hash
from kanllama_lightning.types import InputError, TokenBatch

WORDS = [f"w{i}" for i in range(200)]


def make_tokenizer(words=WORDS, name="me/mine", **special):
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", **special)
    tokenizer.name_or_path = name
    return tokenizer


TOKENIZER = make_tokenizer()


def write(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts))
    return str(path)


def stories(n, length=7):
    """Documents of different words and lengths; the first two words tell the number."""
    return [
        " ".join([f"w{i // 100}", f"w{i % 100}", *(f"w{100 + j}" for j in range(i % length))])
        for i in range(n)
    ]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "train.jsonl", stories(60))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_DOCUMENTS", 16)


def data(train, tokenizer=TOKENIZER, **kwargs):
    kwargs = {"ctx_len": 8, "val_tokens": 24, "val_fraction": 0.1, "lm_batch_seqs": 4} | kwargs
    made = TokenData(tokenizer, train, **kwargs)
    made.setup("fit")
    return made


def batches(made, n):
    return list(islice(made.train_dataloader(), n))


def equal(a, b):
    if isinstance(a, TokenBatch):  # on the CPU the places of what is kept are not listed
        assert a.kept is b.kept is None
        a, b = a[:4], b[:4]
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def documents_in(rows):
    """The tokens of each document number, by number."""
    found = {}
    for ids, keep, doc in zip(*(t.flatten().tolist() for t in rows[:3]), strict=True):
        if keep:
            found.setdefault(doc, Counter())[ids] += 1
    return found


def test_batches(path):
    made = data(path)
    for batch in batches(made, 30):
        assert isinstance(batch, TokenBatch)
        assert batch.ids.shape == batch.keep.shape == batch.doc.shape == (4, 8)
        assert batch.ids.dtype == batch.doc.dtype == batch.position.dtype == torch.int64
        assert batch.keep.dtype == torch.bool
        assert (batch.ids[:, 0] == TOKENIZER.bos_token_id).all()
        assert torch.equal(batch.keep, batch.ids > 2)
        assert batch.ids.is_contiguous()


def test_order_depends_on_seed_and_epoch(path):
    first = batches(data(path), 60)
    assert all(equal(a, b) for a, b in zip(first, batches(data(path), 60), strict=True))
    other = batches(data(path, seed=1), 60)
    assert not all(torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))
    epochs = [b.position[0].item() for b in first]
    assert epochs[-1] >= 2
    again = next(b for b in first if b.position[0] == 1)
    assert not torch.equal(first[0].ids, again.ids)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_resuming_at_any_batch_equals_the_undisturbed_stream(path, batch):
    whole = batches(data(path, lm_batch_seqs=batch), 60)
    assert {0, 1} <= {b.position[0].item() for b in whole}
    for n in range(1, 55, 2):
        made = data(path, lm_batch_seqs=batch)
        made.resume_from(whole[n - 1].position)
        assert all(equal(a, b) for a, b in zip(whole[n : n + 5], batches(made, 5), strict=True))


def test_text_is_read_ahead_by_a_thread_and_stays_the_same(path, monkeypatch):
    """The first block here; each later one when half of the rows of the one before are gone."""
    made_by, rows = [], stream.TokenStream._rows

    def noted(self, epoch, block, documents):
        made_by.append(threading.current_thread().name.partition("_")[0])
        return rows(self, epoch, block, documents)

    monkeypatch.setattr(stream.TokenStream, "_rows", noted)
    ahead = batches(data(path), 40)
    assert made_by[0] == "MainThread"
    assert set(made_by[1:]) == {"text"}
    assert len(made_by) > 4
    made_by.clear()
    monkeypatch.setattr(stream.Ahead, "begin", lambda _: None)
    assert all(equal(a, b) for a, b in zip(ahead, batches(data(path), 40), strict=True))
    assert set(made_by) == {"MainThread"}


def test_what_fails_ahead_fails_where_it_is_asked_for():
    def items():
        yield 1
        raise InputError("the text ends here")

    blocks = Ahead(items())
    assert next(blocks) == 1
    blocks.begin()
    blocks.begin()
    with pytest.raises(InputError, match="ends here"):
        next(blocks)


def test_a_worker_gives_the_same_batches(path):
    whole = batches(data(path), 40)
    assert all(equal(a, b) for a, b in zip(whole, batches(data(path, workers=1), 40), strict=True))
    made = data(path, workers=1)
    made.resume_from(whole[16].position)
    assert all(equal(a, b) for a, b in zip(whole[17:], batches(made, 23), strict=True))


def test_resuming_in_a_mixture(path, tmp_path):
    def mixed():
        other = write(tmp_path / "b.jsonl", stories(200)[100:])
        return data(Mixture([path, other], [1, 2]))

    whole = batches(mixed(), 60)
    assert whole[-1].position[1] > 5
    made = mixed()
    made.resume_from(whole[40].position)
    assert all(equal(a, b) for a, b in zip(whole[41:], batches(made, 19), strict=True))


def on_rank(made, rank, world):
    made.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    return made


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_one_sequence_of_rows(path, world):
    steps = 20
    alone = batches(data(path, lm_batch_seqs=4 * world), steps)
    ranks = [batches(on_rank(data(path), r, world), steps) for r in range(world)]
    for step in range(steps):
        for rank in range(world):
            assert equal(ranks[rank][step].position, alone[step].position)
            assert torch.equal(ranks[rank][step].ids, alone[step].ids[rank::world])
            assert torch.equal(ranks[rank][step].doc, alone[step].doc[rank::world])


def test_resuming_with_other_ranks_repeats_and_skips_no_row(path):
    rows = torch.cat([b.ids for b in batches(data(path, lm_batch_seqs=1), 64)])
    position = batches(on_rank(data(path), 0, 2), 4)[-1].position
    made = data(path)
    made.resume_from(position)
    assert torch.equal(torch.cat([b.ids for b in batches(made, 8)]), rows[32:])


def test_split_is_disjoint_and_exhaustive(path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_DOCUMENTS", 60)  # one tail dropped, not four
    made = data(path, ctx_len=2, val_tokens=8000, lm_batch_seqs=1, append_eos=False)
    held = made._val["heldout"]
    one_epoch = []
    for batch in made.train_dataloader():
        if batch.position[0] > 0:
            break
        one_epoch.append(batch)
    trained = {d: c for b in one_epoch for d, c in documents_in(b).items()}
    held_numbers = set(documents_in(held))
    assert held_numbers
    assert not held_numbers & set(trained)
    assert len(held_numbers | set(trained)) >= 59


def test_identical_documents_are_on_one_side(tmp_path):
    made = data(write(tmp_path / "a.jsonl", stories(60) * 3), val_fraction=0.3)
    held = {d.number % 60 for d in made._held_out()}
    assert len(list(made._held_out())) == 3 * len(held)


def test_a_small_corpus_holds_out_more(path, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        small = data(path, val_fraction=0.005)
    tokens = sum(len(text.split()) + 2 for text in stories(60))
    assert small.val_fraction == pytest.approx(1.2 * 24 / tokens)
    assert "val_fraction raised" in caplog.text
    assert "60 documents" in caplog.text
    assert data(path, val_fraction=0.2).val_fraction == 0.2
    assert data(path, val_fraction=0.05, val_tokens=10_000).val_fraction == 0.1
    unsaid = TokenData(TOKENIZER, path, val_fraction=0.005, ctx_len=8)
    unsaid.val_tokens = 16  # a command sizes the sets, not what is held out
    unsaid.setup("fit")
    assert unsaid.val_fraction == data(path, val_fraction=0.005, val_tokens=131_072).val_fraction
    assert len(unsaid._val["heldout"].ids) == 2
    large = write(tmp_path / "large.jsonl", stories(3000))
    assert data(large, val_fraction=0.02).val_fraction == 0.02


def test_validation_sets(path, tmp_path, caplog):
    other = str(tmp_path / "other.txt")
    (tmp_path / "other.txt").write_text("\n".join(stories(90)[70:]))
    with caplog.at_level(logging.INFO):
        made = data(path, val=[other, other], val_batch_seqs=2, val_tokens=47)
    assert made.val_names == ["heldout", "other", "other_2"]
    loaders = made.val_dataloader()
    _, second, third = ([*loader] for loader in loaders)
    assert [len(b.ids) for b in second] == [2, 2, 1]  # 47 tokens are 5 rows of 8
    assert all(equal(a, b) for a, b in zip(second, third, strict=True))
    assert isinstance(second[0], TokenBatch)
    # in order, and as packed by hand: BOS w0 w70 EOS BOS w0 w71 w100
    assert TOKENIZER.decode(second[0].ids[0]) == "<s> w0 w70 </s> <s> w0 w71 w100"
    assert "validation set other: 5 rows, 40 tokens" in caplog.text


def test_validation_rows_stay_the_same(path):
    a, b = data(path, seed=0), data(path, seed=9, lm_batch_seqs=2)
    for x, y in zip(a.val_dataloader()[0], b.val_dataloader()[0], strict=True):
        assert equal(x, y)


def test_validation_rows_are_shared_out_among_ranks(path):
    def rows(world):
        made = [on_rank(data(path, val_fraction=0.3), r, world) for r in range(world)]
        return [[r for b in m.val_dataloader()[0] for r in b.ids.tolist()] for m in made]

    (whole,), (even, odd) = rows(1), rows(2)
    assert len(whole) % 2 == 1, "so that one has a row more"
    assert even == whole[0::2]
    assert odd == whole[1::2]


def test_one_short_document_is_enough(tmp_path):
    made = data(
        write(tmp_path / "b.jsonl", ["w1 w2"]),
        val_fraction=0,
        val=[write(tmp_path / "c.jsonl", ["w3"])],
    )
    (batch,) = batches(made, 1)
    assert (batch.keep.sum(1) == 2).all()
    assert len(set(batch.doc[:, 1].tolist())) == 4  # four epochs, four documents


def test_nothing_left_to_train_on_or_to_hold_out(tmp_path):
    held_first = sorted(stories(60), key=lambda t: share(tmp_path, t))
    with pytest.raises(InputError, match="all documents of a are held out"):
        data(write(tmp_path / "a.jsonl", held_first[:1]), val_fraction=0.2)
    with pytest.raises(InputError, match="'heldout' has no token"):
        data(write(tmp_path / "a.jsonl", held_first[-1:]), val_fraction=0.2)


def share(tmp_path, text):
    return next(LocalCorpus(write(tmp_path / "one.jsonl", [text])).documents()).share()


def test_pretokenised_ids_equal_their_text(path, tmp_path):
    ids = TOKENIZER(stories(60), add_special_tokens=False)["input_ids"]
    marked = [[1, *row, 2] if i % 2 else row for i, row in enumerate(ids)]  # with and without
    file = write(tmp_path / "ids.jsonl", marked, column="input_ids")
    corpus = LocalCorpus(file, column="input_ids", tokenizer="elsewhere/mine")
    other = write(tmp_path / "other.jsonl", stories(90)[70:])
    kwargs = {"val_fraction": 0, "val": [other]}
    for a, b in zip(
        batches(data(path, **kwargs), 9), batches(data(corpus, **kwargs), 9), strict=True
    ):
        assert equal(a, b)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer=None"),
        ({"tokenizer": "me/other"}, "made with tokenizer='me/other'"),
        ({"tokenizer": "me/mine", "vocab_hash": "0"}, "vocab_hash='0'"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(tmp_path, path, metadata, message):
    file = write(tmp_path / "ids.jsonl", [[3, 4]] * 9, column="ids")
    corpus = LocalCorpus(file, column="ids", **metadata)
    with pytest.raises(InputError, match=message):
        data(corpus, val_fraction=0, val=[path])
    with pytest.raises(InputError, match=message):
        data(Mixture([corpus, path], [1, 1]))


def test_ids_beyond_the_vocabulary_are_refused(tmp_path, path):
    file = write(tmp_path / "ids.jsonl", [[3, 4], [5, 203]], column="ids")
    with pytest.raises(InputError, match=r"from 5 to 203, but .* 203 ids"):
        data(LocalCorpus(file, column="ids", tokenizer="mine"), val_fraction=0, val=[path])


def test_vocab_hash_tells_vocabularies_apart_and_names_not(tmp_path, path):
    assert vocab_hash(TOKENIZER) == vocab_hash(make_tokenizer(name="another/name"))
    assert vocab_hash(TOKENIZER) != vocab_hash(make_tokenizer(words=WORDS[::-1]))
    file = write(tmp_path / "ids.jsonl", [[3, 4]] * 9, column="ids")
    corpus = LocalCorpus(file, column="ids", vocab_hash=vocab_hash(TOKENIZER))
    data(corpus, val_fraction=0, val=[path])


def test_tokenizers_without_bos_or_eos(path):
    with pytest.raises(InputError, match="no BOS"):
        data(path, make_tokenizer(bos_token=None))
    with pytest.raises(InputError, match="append_eos=true"):
        data(path, make_tokenizer(eos_token=None))
    made = data(path, make_tokenizer(eos_token=None), append_eos=False)
    assert not (batches(made, 1)[0].ids == 2).any()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("val_fraction", 0.7),
        ("ctx_len", 1),
        ("val_tokens", 7),
        ("lm_batch_seqs", 0),
        ("val_batch_seqs", 0),
        ("seed", -1),
        ("workers", 2),
    ],
)
def test_arguments_out_of_range(path, argument, value):
    with pytest.raises(InputError, match=f"{argument}={value}"):
        data(path, **{argument: value})


def test_something_must_be_validated(path):
    with pytest.raises(InputError, match="no `val`"):
        data(path, val_fraction=0)


@pytest.fixture
def parser():
    class Model:
        def __init__(self, name: str = "some"):
            self.tokenizer = TOKENIZER

    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_class_arguments(Model, "lm")
    made.add_class_arguments(TokenData, "data")
    made.link_arguments("lm.tokenizer", "data.tokenizer", apply_on="instantiate")
    return made


def test_command_line_takes_a_path_or_a_class(parser, path, tmp_path):
    (tmp_path / "path.yaml").write_text(f"data: {{train: {path}, ctx_len: 64}}\n")
    world = {"class_path": "kanllama_lightning.corpus.StoryWorldCorpus"}
    (tmp_path / "class.yaml").write_text(
        json.dumps({"data": {"train": {**world, "init_args": {"n_documents": 5}}}})
    )

    def train(*args):
        return parser.instantiate(parser.parse_args([*args])).data.train_corpus

    files = [f"--config={tmp_path / name}.yaml" for name in ("path", "class")]
    assert isinstance(train(f"--data.train={path}"), LocalCorpus)
    made = train(*files)
    assert isinstance(made, StoryWorldCorpus)
    assert made.n_documents == 5
    assert isinstance(train(*files[::-1]), LocalCorpus)
    assert train(*files, "--data.train.init_args.n_documents=7").n_documents == 7
    assert isinstance(train(*files, f"--data.train={path}"), LocalCorpus)
