import json
import time
from itertools import islice
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from kanllama_lightning.corpus import (
    HubCorpus,
    LocalCorpus,
    Mixture,
    StoryWorldCorpus,
    hub,
    resolve,
    story_world,
)
from kanllama_lightning.types import InputError


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: t, "n": i}) + "\n" for i, t in enumerate(texts)))
    return str(path)


def texts(corpus, start=0, n=None):
    return [d.text for d in islice(corpus.documents(start), n)]


def words(n, prefix="d"):
    return [f"{prefix}{i}" for i in range(n)]


@pytest.fixture(params=["jsonl", "json", "txt", "parquet", "folder"])
def local(request, tmp_path):
    """Ten documents, in each form a corpus on this machine can have."""
    if request.param == "txt":
        path = tmp_path / "some.txt"
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(words(10)).encode())
    elif request.param == "parquet":
        path = tmp_path / "some.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": words(10)}), path, row_group_size=3)
    elif request.param == "folder":
        path = tmp_path / "some"
        (path / "deeper").mkdir(parents=True)
        write_jsonl(path / "a.jsonl", words(10)[:4])
        pyarrow.parquet.write_table(pyarrow.table({"text": words(10)[4:7]}), path / "b.parquet")
        write_jsonl(path / "deeper" / "a.jsonl", words(10)[7:])
        (path / "README.md").write_text("no document")
    else:
        path = tmp_path / f"some.{request.param}"
        write_jsonl(path, words(10))
    return LocalCorpus(str(path))


def test_local_reads_in_order_from_any_document(local):
    local.open()
    assert (local.name, local.n_documents, local.vocabularies) == ("some", 10, ())
    for start in range(12):
        found = list(local.documents(start))
        assert [d.text for d in found] == words(10)[start:]
        assert [d.number for d in found] == list(range(start, 10))


def test_malformed_and_blank_lines_are_skipped_and_keep_their_numbers(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t}) for t in words(300)]
    lines[3] = '{"text": "cut of'
    lines[4] = ""
    lines[5] = json.dumps({"text": "  "})
    path.write_text("\n".join(lines) + '\n{"text": "trunc')
    corpus = LocalCorpus(str(path))
    with caplog.at_level("INFO"):
        corpus.open()
        assert len(list(corpus.documents())) == 297
    assert corpus.n_documents == 301
    assert "2 of 301 records" in caplog.text
    assert "2 malformed records skipped" in caplog.text
    numbers = [d.number for d in corpus.documents()]
    assert numbers == [n for n in range(300) if n not in (3, 4, 5)]
    assert next(corpus.documents(3)).number == 6


def test_too_many_malformed_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"text": "x"})] * 97 + ["{", "[1]", '{"text": 3}']))
    with pytest.raises(InputError, match=r"3 of 100 records .* at most 1%"):
        LocalCorpus(str(path)).open()


def test_one_cut_line_at_the_end_of_a_small_file_is_borne(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": "y')
    corpus = LocalCorpus(str(path))
    corpus.open()
    assert texts(corpus) == ["x"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_column_lists_those_there(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(path, words(3), column="story")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"n": [1], "story": ["a"]}), path)
    with pytest.raises(InputError, match="column='text' .* 'n', 'story'"):
        LocalCorpus(str(path)).open()
    LocalCorpus(str(path), column="story").open()


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_file(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="no document"):
        LocalCorpus(str(path)).open()


def test_unusable_paths(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        LocalCorpus(str(tmp_path / "none")).open()
    with pytest.raises(InputError, match="known kind"):
        LocalCorpus(str(tmp_path)).open()
    (tmp_path / "a.csv").write_text("text\n")
    with pytest.raises(InputError, match="known kind"):
        LocalCorpus(str(tmp_path / "a.csv")).open()
    (tmp_path / "data.arrow").touch()
    (tmp_path / "state.json").touch()
    with pytest.raises(InputError, match="to_parquet"):
        LocalCorpus(str(tmp_path)).open()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1abc")
    with pytest.raises(InputError, match="cut off"):
        LocalCorpus(str(tmp_path / "cut.parquet")).open()


def test_ids_need_their_tokenizers_name(tmp_path):
    path = tmp_path / "ids.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": [[3, 4], [5]]}), path)
    with pytest.raises(InputError, match="tokenizer=None"):
        LocalCorpus(str(path), column="input_ids").open()
    corpus = LocalCorpus(str(path), column="input_ids", tokenizer="me/mine")
    corpus.open()
    assert [d.ids for d in corpus.documents()] == [[3, 4], [5]]
    assert corpus.vocabularies == (("ids", "me/mine", None),)


def test_share_depends_on_contents_alone(tmp_path):
    corpus = LocalCorpus(write_jsonl(tmp_path / "a.jsonl", ["same", "other", "same"]))
    first, other, last = (d.share() for d in corpus.documents())
    assert first == last != other
    shares = [d.share() for d in LocalCorpus(write_jsonl(tmp_path / "b.jsonl", words(2000))).once()]
    assert all(0 <= s < 1 for s in shares)
    assert sum(s < 0.25 for s in shares) == pytest.approx(500, abs=80)


def test_a_name_that_cannot_be_one_is_one_error() -> None:
    with pytest.raises(InputError, match="corpus .* cannot be a file"):
        resolve("x" * 5000)


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert isinstance(resolve("a.jsonl"), LocalCorpus)
    assert isinstance(resolve("roneneldan/TinyStories"), HubCorpus)
    assert resolve(corpus := LocalCorpus("a.jsonl")) is corpus
    for missing in ("b.jsonl", "./somewhere", "/none", "~/none", "x/y.parquet"):
        with pytest.raises(InputError, match="does not exist"):
            resolve(missing)


def test_story_world():
    corpus = StoryWorldCorpus(n_documents=5, seed=3)
    corpus.open()
    assert corpus.n_documents == 5
    found = texts(corpus)
    assert len(set(found)) == 5
    assert found == texts(StoryWorldCorpus(n_documents=5, seed=3))
    assert found != texts(StoryWorldCorpus(n_documents=5, seed=4))
    assert texts(corpus, 3) == found[3:]
    with pytest.raises(InputError, match="n_documents=0"):
        StoryWorldCorpus(n_documents=0)


def test_story_world_numbers_are_the_worlds(monkeypatch):
    monkeypatch.setattr(
        story_world, "story", lambda seed, index: SimpleNamespace(text=f"{seed}:{index}")
    )
    assert texts(StoryWorldCorpus(n_documents=3, seed=7), 1) == ["7:1", "7:2"]


@pytest.fixture
def mixture(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", words(30, "a"))
    (tmp_path / "b.jsonl").write_text(
        "\n".join(["{", "", *(json.dumps({"text": t}) for t in words(40, "b")), "", " "])
    )
    corpus = Mixture([a, str(tmp_path / "b.jsonl")], [3, 1], seed=5)
    corpus.open()
    return corpus


def test_mixture_proportions_and_own_order(mixture):
    assert (mixture.name, mixture.n_documents) == ("a+b", 74)
    found = list(islice(mixture.documents(), 8000))
    a = [d.text for d in found if d.text.startswith("a")]
    b = [d.text for d in found if d.text.startswith("b")]
    draws = found[-1].number + 1
    assert len(a) / draws == pytest.approx(0.75, abs=0.02)
    assert a[:61] == words(30, "a") * 2 + ["a0"]
    assert b[:81] == words(40, "b") * 2 + ["b0"]


@pytest.mark.parametrize("start", [1, 37, 200, 4095, 4096, 5000])
def test_mixture_goes_on_from_any_draw(mixture, start):
    whole = [d for d in islice(mixture.documents(), 6000) if d.number >= start]
    again = list(islice(mixture.documents(start), len(whole)))
    assert again == whole


def test_mixture_of_unknown_size_goes_on_too(mixture):
    for corpus in mixture.corpora:
        corpus.n_documents = None
    whole = list(islice(mixture.documents(), 500))
    for start in (100, 333):
        rest = [d for d in whole if d.number >= start]
        assert list(islice(mixture.documents(start), len(rest))) == rest


def test_mixture_once_ends(mixture):
    found = list(mixture.once())
    assert sorted(d.text for d in found) == sorted(words(30, "a") + words(40, "b"))
    assert [d.number for d in found] == list(range(70))


def test_mixture_arguments(mixture):
    with pytest.raises(InputError, match="one weight for each"):
        Mixture([StoryWorldCorpus()], [1, 2])
    with pytest.raises(InputError, match="above 0"):
        Mixture([StoryWorldCorpus()], [0])
    with pytest.raises(InputError, match="inside a mixture"):
        Mixture([mixture], [1])
    with pytest.raises(InputError, match="seed=-1"):
        Mixture([StoryWorldCorpus()], [1], seed=-1)


def test_unreachable_hub_says_so_at_once(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(InputError, match=r"(?s)local file.*configs/embedded\.yaml"):
        HubCorpus("roneneldan/TinyStories").open()
    assert time.monotonic() - began < 10


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(hub, "GIVE_UP_SECONDS", 0.05)
    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: time.sleep(1))
    with pytest.raises(InputError, match="TimeoutError"):
        HubCorpus("a/b").open()


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub whose one dataset is a file: the streams are real, the network is not."""
    path = write_jsonl(tmp_path / "a.jsonl", words(50))
    asked = []

    def load(*_, split, revision, streaming):
        asked.append(revision)
        return datasets.load_dataset("json", data_files=path, split=split, streaming=streaming)

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(hub, "load_dataset", load)
    return asked


def test_hub_stream(fake_hub):
    corpus = HubCorpus("me/some")
    corpus.open()
    assert (corpus.name, corpus.n_documents, corpus.vocabularies) == ("some", None, ())
    assert texts(corpus, 0) == words(50)
    assert texts(corpus, 47) == words(50)[47:]
    assert set(fake_hub) == {"abc"}


@pytest.mark.usefixtures("fake_hub")
def test_hub_errors():
    with pytest.raises(InputError, match="column='story' .* 'n', 'text'"):
        HubCorpus("me/some", column="story").open()
    with pytest.raises(InputError, match="no text and no token ids"):
        HubCorpus("me/some", column="n").open()
    with pytest.raises(InputError, match="cannot be streamed"):
        HubCorpus("me/some", split="nope").open()
    with pytest.raises(InputError, match="sample=0"):
        HubCorpus("me/some", sample=0)


@pytest.mark.usefixtures("fake_hub")
def test_hub_sample_is_fixed():
    def sampled(**kwargs):
        corpus = HubCorpus("me/some", **kwargs)
        corpus.open()
        found = list(corpus.documents())
        assert corpus.n_documents == len(found)
        assert [d.number for d in found] == list(range(len(found)))
        return [d.text for d in found]

    first = sampled(sample=20)
    assert len(set(first)) == 20
    assert first == sorted(first, key=lambda t: int(t[1:]))
    assert first == sampled(sample=20)
    assert first != sampled(sample=20, sample_seed=1)
    assert sampled(sample=99) == words(50)
