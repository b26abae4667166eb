"""Text as it is found: what cannot be read is skipped where it is read, and stops no run."""

import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from kanllama_lightning.corpus import HubCorpus, LocalCorpus, Mixture, hub, local
from kanllama_lightning.data import stream
from kanllama_lightning.data.packing import Rows
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.types import InputError
from tests.conftest import Fit, only_run, word_tokenizer

GOOD = [f"w{i % 60} w{i // 60} w7" for i in range(300)]
AT = 250
"""Where the bad record stands: behind the sample that is tokenised at set-up."""
BAD_LINES = {
    "lone surrogate": rb'{"text": "half \ud83d a character"}',
    "other half": rb'{"text": "\udc00"}',
    "no UTF-8": b'{"text": "caf\xe9"}',
    "NUL": rb'{"text": "w1 \u0000 w2"}',
    "deep JSON": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep JSON, no object": b"[" * 100_000,
    "huge number": b'{"text": ' + b"9" * 5_000 + b"}",
    "huge id": b'{"text": [3, 99999999999999999999]}',
    "negative id": b'{"text": [3, -1]}',
    "cut off": b'{"text": "cut o',
    "other JSON": b'"only text"',
    "number": b'{"text": 3}',
    "object": b'{"text": {"a": 1}}',
    "mixed list": b'{"text": [3, "w1", null]}',
    "true": b'{"text": [true, false]}',
    "too long": b'{"text": "' + b"w1 " * 2000 + b'"}',
}
BLANK_LINES = [b"", b"   ", b'{"text": null}', b'{"text": ""}', b'{"text": []}', b'{"other": 1}']


@pytest.fixture(autouse=True)
def _small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RECORD_BYTES", 1 << 19)


def lines(*bad: bytes, at: int = AT) -> bytes:
    made = [json.dumps({"text": text}).encode() for text in GOOD]
    made[at:at] = bad
    return b"\n".join(made) + b"\n"


def kept(corpus: LocalCorpus) -> list[str | None]:
    return [d.text for d in corpus.documents()]


@pytest.mark.parametrize("bad", [b for b in BAD_LINES if b != "too long"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_record_that_cannot_be_read_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str, suffix: str
) -> None:
    path = tmp_path / f"some.{suffix}"
    path.write_bytes(lines(BAD_LINES[bad]))
    corpus = LocalCorpus(str(path))
    with caplog.at_level("INFO"):
        corpus.open()
        assert kept(corpus) == GOOD
        assert kept(corpus) == GOOD
    assert caplog.text.count(f"{path}:{AT + 1}, ") == 1
    assert "1 of 301 records looked at" in caplog.text
    assert caplog.text.count("1 malformed records skipped") == 1
    assert [d.number for d in corpus.documents()] == [n for n in range(301) if n != AT]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_without_end_is_never_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: bytes
) -> None:
    monkeypatch.setattr(local, "RECORD_BYTES", 1000)
    path = tmp_path / "some.jsonl"
    path.write_bytes(lines(BAD_LINES["too long"], at=300).rstrip(b"\n") + end)
    corpus = LocalCorpus(str(path))
    corpus.open()
    assert corpus.n_documents == 301
    assert kept(corpus) == GOOD
    assert f"{path}:301, is longer than" in caplog.text


def test_blank_records_are_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(lines(*BLANK_LINES * 20))
    corpus = LocalCorpus(str(path))
    with caplog.at_level("INFO"):
        corpus.open()
    assert kept(corpus) == GOOD
    assert "120 of 420 records are blank" in caplog.text
    assert "malformed" not in caplog.text


def test_nulls_of_a_parquet_file_are_blank_too(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    values = [None if i % 10 == 0 else text for i, text in enumerate(GOOD)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    corpus = LocalCorpus(str(path))
    corpus.open()
    assert kept(corpus) == [text for text in values if text]


def test_bytes_of_a_parquet_file_that_are_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = [text.encode() for text in GOOD]
    raw[AT] = b"caf\xe9"
    array = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path)
    corpus = LocalCorpus(str(path))
    corpus.open()
    assert kept(corpus) == GOOD[:AT] + GOOD[AT + 1 :]
    assert f"{path}:{AT + 1}, is not UTF-8" in caplog.text


def test_a_damaged_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four, the third: what is behind it keeps its numbers, from wherever it is read."""
    monkeypatch.setattr(local, "SCANNED_RECORDS", 100)
    path = tmp_path / "some.parquet"
    table = pyarrow.table({"text": GOOD})
    pyarrow.parquet.write_table(table, path, row_group_size=75, use_dictionary=False)
    column = pyarrow.parquet.read_metadata(path).row_group(2).column(0)
    content = bytearray(path.read_bytes())
    at = column.data_page_offset
    content[at : at + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    corpus = LocalCorpus(str(path))
    with caplog.at_level("INFO"):
        corpus.open()
        assert kept(corpus) == GOOD[:150] + GOOD[225:]
    assert f"{path}:151, lies in a damaged part" in caplog.text
    assert "75 malformed records skipped" in caplog.text
    for start in (0, 149, 160, 225, 290):
        want = [n for n in range(start, 300) if not 150 <= n < 225]
        assert [d.number for d in corpus.documents(start)] == want


def test_too_many_name_the_first_and_why(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_bytes(lines(*[BAD_LINES["no UTF-8"]] * 9, at=3))
    with pytest.raises(InputError, match=r"9 of 309 .*some\.jsonl:4, is not UTF-8 .*at most 1%"):
        LocalCorpus(str(path)).open()


def test_text_in_utf_16_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n".join(GOOD), encoding="utf-16-le")
    with pytest.raises(InputError, match=r"some\.txt:1, has a NUL character"):
        LocalCorpus(str(path)).open()


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub whose one dataset is a parquet file here."""
    path = tmp_path / "hub.parquet"

    def load(*_: Any, split: str, streaming: bool, **__: Any) -> Any:
        return datasets.load_dataset(
            "parquet", data_files=str(path), split=split, streaming=streaming
        )

    monkeypatch.setattr(hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc"))
    monkeypatch.setattr(hub, "load_dataset", load)
    return path


def test_one_rule_for_the_hub(fake_hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [None if i % 10 == 0 else text for i, text in enumerate(GOOD)]
    values[AT + 1] = "w1 \0 w2"
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), fake_hub)
    want = [t for i, t in enumerate(values) if t and i != AT + 1]
    for corpus in (HubCorpus("me/some"), LocalCorpus(str(fake_hub))):
        corpus.open()
        assert [d.text for d in corpus.documents()] == want
    assert f"some: no document: record {AT + 2}, has a NUL character" in caplog.text
    sample = HubCorpus("me/some", sample=1000)
    sample.open()
    assert [d.text for d in sample.documents()] == want
    values[:9] = ["\0"] * 9
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), fake_hub)
    with pytest.raises(InputError, match=r"9 of 100 records .*record 1, has a NUL"):
        HubCorpus("me/some").open()


# ------------------------------------------------------------ what is a document


def test_in_a_folder_a_text_file_is_a_document(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "articles"
    (folder / "more").mkdir(parents=True)
    for i in range(40):
        (folder / "more" / f"{i:02d}.TXT").write_text(f"w1 w{i}\n\nw2 w{i}\nw3\n")
    (folder / "blank.txt").write_text("\n")
    corpus = LocalCorpus(str(folder))
    corpus.open()
    assert corpus.n_documents == 41
    assert [d.text for d in corpus.documents()] == [f"w1 w{i}\n\nw2 w{i}\nw3" for i in range(40)]
    assert [d.number for d in corpus.documents(38)] == [38, 39, 40]
    with caplog.at_level("INFO"):
        data(str(folder), val_fraction=0.3)
    assert "train: articles, 41 documents (each .txt file is one)" in caplog.text


def test_a_text_file_alone_has_a_document_per_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some.txt").write_text("\n\n".join(GOOD))
    with caplog.at_level("INFO"):
        made = data(str(tmp_path / "some.txt"))
    assert kept(made.train_corpus) == GOOD  # type: ignore[arg-type]
    assert "599 documents (each line of the .txt file is one)" in caplog.text


# ------------------------------------------------------------ other kinds of file


def shell(command: str, folder: Path) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, timeout=120)


def test_a_json_list_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps([{"text": text} for text in GOOD], indent=1))
    with pytest.raises(InputError, match="holds one JSON list") as error:
        LocalCorpus(str(path)).open()
    shell(str(error.value)[str(error.value).index("python -c") :], tmp_path)
    assert kept(LocalCorpus(str(tmp_path / "some-lines.jsonl"))) == GOOD


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_is_refused_with_a_command_that_works(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"some.{suffix}"
    mark = {"csv": ",", "tsv": "\t"}[suffix]
    path.write_text("".join(f"{i}{mark}{text}\n" for i, text in enumerate(["text", *GOOD])))
    path.write_text(path.read_text().replace(f"0{mark}text", f"number{mark}text"))
    with pytest.raises(InputError, match="known kind.*convert it") as error:
        LocalCorpus(str(path)).open()
    found = re.search(r"python -c .*\"", str(error.value))
    assert found is not None
    shell(found[0], tmp_path)
    assert kept(LocalCorpus(str(tmp_path / "some.jsonl"))) == GOOD


def test_a_packed_file_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_bytes(lines())
    shell("gzip some.jsonl", tmp_path)
    path = tmp_path / "some.jsonl.gz"
    with pytest.raises(InputError, match="known kind.*unpack it") as error:
        LocalCorpus(str(path)).open()
    shell(f"gunzip -k {shlex.quote(str(path))}", tmp_path)
    assert f"`gunzip -k {path}`" in str(error.value)
    assert kept(LocalCorpus(str(tmp_path / "some.jsonl"))) == GOOD


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_lines_end_as_they_do_on_any_machine(
    tmp_path: Path, suffix: str, end: str, last: bool
) -> None:
    made = GOOD if suffix == "txt" else [json.dumps({"text": text}) for text in GOOD]
    path = tmp_path / f"some.{suffix}"
    path.write_bytes((end.join(made) + end * last).encode())
    corpus = LocalCorpus(str(path))
    corpus.open()
    assert kept(corpus) == GOOD
    assert corpus.n_documents == len(GOOD)
    assert [d.text for d in corpus.documents(290)] == GOOD[290:]


def test_a_carriage_return_inside_a_line_ends_none(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"w1\rw2\nw3\n")
    assert kept(LocalCorpus(str(path))) == ["w1\rw2", "w3"]


def test_a_long_line_that_ends_in_a_carriage_return_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_bytes(b"w1\r" + b"w2 " * (1 << 18) + b"\rw3\r")
    assert kept(LocalCorpus(str(path))) == ["w1", "w3"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "parquet"])
def test_a_pipe_or_a_socket_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    """Opening one would wait for ever."""
    pipe, folder = tmp_path / f"pipe.{suffix}", tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(pipe)
    (folder / "a.jsonl").write_bytes(lines())
    (folder / f"b.{suffix}").symlink_to(pipe)
    for path, named in ((pipe, pipe), (folder, folder / f"b.{suffix}")):
        with pytest.raises(InputError, match=rf"{named}': is no ordinary file .*write it to a f"):
            LocalCorpus(str(path)).open()
    (folder / f"b.{suffix}").unlink()
    os.mkfifo(folder / "not.text")
    LocalCorpus(str(folder)).open()
    with socket.socket(socket.AF_UNIX) as bound:
        place = tmp_path / f"s.{suffix}"
        bound.bind(str(place))
        with pytest.raises(InputError, match="is no ordinary file"):
            LocalCorpus(str(place)).open()
    with pytest.raises(InputError, match="'/dev/null': is no ordinary file"):
        LocalCorpus("/dev/null").open()


def test_a_pipe_hangs_no_command(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for option in ("data__train", "data__val"):
        assert fit(**{option: str(tmp_path / "pipe.jsonl")}, trainer__logger="false") == 2
        assert "pipe.jsonl': is no ordinary file" in capsys.readouterr().err


# ------------------------------------------------------------ through the data module


def data(train: Any, tokenizer: Any = None, **kwargs: Any) -> TokenData:
    kwargs = {"ctx_len": 8, "val_tokens": 24, "val_fraction": 0.1, "lm_batch_seqs": 4} | kwargs
    made = TokenData(tokenizer or word_tokenizer(), train, **kwargs)
    made.setup("fit")
    return made


def trained_on(made: TokenData) -> set[int]:
    """Numbers of the documents of the first epoch with a token that counts."""
    found: set[int] = set()
    for batch in made.train_dataloader():
        if batch.position[0] > 0:
            return found
        found |= set(batch.doc[batch.keep].tolist())
    return found


@pytest.mark.slow
def test_a_surrogate_deep_in_the_text_stops_no_run(fit: Fit, tmp_path: Path) -> None:
    """Of training text and of a validation set."""
    words = [json.dumps({"text": f"{text} {text} {text}"}) for text in GOOD * 3]
    for name, more in (("train", ""), ("val", " w59")):
        made = [line[:-2] + more + '"}' for line in words]
        made[700] = r'{"text": "w1 \ud83d w2"}'
        (tmp_path / f"{name}.jsonl").write_text("\n".join(made))
    texts = {"data__train": str(tmp_path / "train.jsonl"), "trainer__logger": "false"}
    assert fit(**texts, data__val=f"[{tmp_path / 'val.jsonl'}]", data__val_tokens="7000") == 0
    assert (only_run(tmp_path) / "head" / "head.json").is_file()


def test_an_id_beyond_the_vocabulary_late_in_the_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ids.jsonl"
    made = [json.dumps({"ids": [3 + i % 50, 4]}) for i in range(300)]
    made[AT] = json.dumps({"ids": [3, 64]})
    path.write_text("\n".join(made))
    (tmp_path / "val.jsonl").write_bytes(lines())
    corpus = LocalCorpus(str(path), column="ids", tokenizer="")
    found = trained_on(data(corpus, val_fraction=0, val=[str(tmp_path / "val.jsonl")]))
    assert AT not in found
    assert AT + 1 in found
    assert f"document {AT} has token ids up to 64" in caplog.text


Place = Callable[[Path], Any]
SAME: dict[str, tuple[Place, Place]] = {
    "the file": (lambda p: str(p / "a.jsonl"), lambda p: str(p / "a.jsonl")),
    "inside a mixture": (
        lambda p: Mixture([str(p / "a.jsonl"), str(p / "b.jsonl")], [1, 1]),
        lambda p: str(p / "b.jsonl"),
    ),
    "a mixture of it": (
        lambda p: str(p / "a.jsonl"),
        lambda p: Mixture([str(p / "a.jsonl"), str(p / "b.jsonl")], [1, 1]),
    ),
}


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    for name, texts in (("a", GOOD[:100]), ("b", GOOD[100:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in texts)
        )
    return tmp_path


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("fraction", [0, 0.1])
def test_validating_on_the_training_text_is_refused(
    two_files: Path, case: str, fraction: float
) -> None:
    train, val = SAME[case]
    with pytest.raises(InputError, match=r"is what is trained on .*--data\.val null"):
        data(train(two_files), val=[val(two_files)], val_fraction=fraction)


def test_the_same_hub_dataset_is_refused(fake_hub: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": GOOD}), fake_hub)
    with pytest.raises(InputError, match="some is what is trained on"):
        data(HubCorpus("me/some"), val=[HubCorpus("me/some")])
    made = data(HubCorpus("me/some"), val=[HubCorpus("me/some", sample=50)], val_fraction=0)
    drawn = {d.text for d in made.val_corpora[0].documents()}
    assert len(drawn) == 50
    assert trained_on(made) <= {i for i, text in enumerate(GOOD) if text not in drawn}


def test_documents_of_a_validation_set_are_not_trained_on(
    two_files: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that holds the file; and the same texts under another name, in another form."""
    monkeypatch.setattr(stream, "BLOCK_DOCUMENTS", 300)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [*GOOD[150:], "w1 w2"]}), two_files / "c.parquet"
    )
    for val in ("b.jsonl", "c.parquet"):
        folder = two_files / "train"
        folder.mkdir(exist_ok=True)
        for name in "ab":
            (folder / f"{name}.jsonl").write_bytes((two_files / f"{name}.jsonl").read_bytes())
        caplog.clear()
        with caplog.at_level("INFO"):
            made = data(str(folder), val=[str(two_files / val)], val_fraction=0)
            found = trained_on(made)
        n = {"b.jsonl": 200, "c.parquet": 150}[val]
        assert f"{n} of the first 300 documents of train are in a set of `val` too" in caplog.text
        assert f"{n} documents were not trained on" in caplog.text
        assert found
        assert max(found) < 300 - n
        held = made.held_back(5000)[Path(val).stem]
        assert {d.share() for d in held} <= made.validated
    with pytest.raises(InputError, match="all documents of b are held out .*or are in `val`"):
        data(str(two_files / "b.jsonl"), val=[str(folder)], val_fraction=0)


@pytest.mark.parametrize("form", ["  {}", "{}\n", "\t{} \r\n"])
def test_blanks_around_a_text_and_its_line_ends_make_no_other_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    texts = [f"w{i % 60} w{i // 60}\r\nw7\nw8" for i in range(100)]
    unix = [text.replace("\r\n", "\n") for text in texts]
    for name, found in (("a", texts), ("b", [form.format(text) for text in unix[50:]])):
        made = (json.dumps({"text": text}) + "\n" for text in found)
        (tmp_path / f"{name}.jsonl").write_text("".join(made))
    train, val = LocalCorpus(str(tmp_path / "a.jsonl")), LocalCorpus(str(tmp_path / "b.jsonl"))
    made = data(train, val=val, val_fraction=0)
    assert "50 of the first 100 documents of a are in a set of `val` too" in caplog.text
    assert trained_on(made) <= set(range(50))
    # splits and caches know a text by all that it holds
    assert made.validated_shares == {d.share() for d in val.documents()}
    assert not made.validated_shares & {d.share() for d in train.documents()}


@pytest.mark.parametrize(
    ("text", "n", "said"),
    [
        ("w1 w2 w3", 2000, "2,000 documents that are equal"),
        ("w1 w2 w3", 1, "one document"),
        ("w4 w5", 300, "300 documents that are equal"),
    ],
)
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_copies_of_one_document_cannot_be_split(
    tmp_path: Path, text: str, n: int, said: str, fraction: float
) -> None:
    (tmp_path / "copies.txt").write_text(f"{text}\n" * n)
    with pytest.raises(InputError, match=f"copies holds {said}.*: give different ones") as error:
        data(str(tmp_path / "copies.txt"), val_fraction=fraction)
    assert "ive more" not in str(error.value)


def test_too_little_text_to_split_still_asks_for_more(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("w1 w2\nw3 w4\nw5 w6\n")
    with pytest.raises(InputError, match="no token .*Give more documents or a larger"):
        data(str(tmp_path / "few.txt"), val_fraction=1e-9)


# ------------------------------------------------------------ special tokens


@pytest.fixture
def chat() -> Any:
    """The word tokenizer with chat markers: special, but without a role; and one that is not."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.add_tokens(["<name>"], special_tokens=False)
    return tokenizer


def test_all_special_tokens_are_left_out_and_listed(
    chat: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"<|start|> w1 <|end|> w{i % 60} <name> </s>" for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    with caplog.at_level("INFO"):
        made = data(str(tmp_path / "chat.jsonl"), chat)
    marks = chat.convert_tokens_to_ids(["<|start|>", "<|end|>"])
    assert made.encoder.special == [0, 1, 2, *marks]
    rows: Rows = made.encoder.pack(list(islice(made.train_corpus.documents(), 60)))
    left = set(rows.ids[rows.keep].tolist())
    assert not left & {0, 1, 2, *marks}
    assert chat.convert_tokens_to_ids("<name>") in left
    assert caplog.text.count("special tokens, left out of training and figures: '<bos>' (0)") == 1
    assert f"'<|start|>' ({marks[0]}), '<|end|>' ({marks[1]})" in caplog.text
    assert "'<|start|>' 60" in caplog.text


def test_text_of_unknown_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "greek.txt"
    path.write_text("\n".join("α β γ δ ε ζ η θ ι w1" for _ in range(60)) + "\n" + "α " * 90)
    with pytest.raises(InputError, match=r"special tokens \('<unk>' 630\).*hardly anything"):
        data(str(path))


def test_bos_can_be_named(tiny_lm_dir: Path, text_file: Path) -> None:
    from kanllama_lightning.lm.frozen import FrozenLM

    for named in ("<eos>", 1, "w5", 8):
        lm = FrozenLM(str(tiny_lm_dir), "model.layers.0.mlp", bos=named)
        want = {"<eos>": 1, "w5": 8}.get(named, named)  # type: ignore[call-overload]
        made = data(str(text_file), lm.tokenizer)
        batch = next(iter(made.train_dataloader()))
        assert (batch.ids[:, 0] == want).all()
        assert not batch.keep[batch.ids == want].any()
    for wrong in ("<nobody>", 64, -1):
        with pytest.raises(InputError, match=rf"lm\.bos={wrong!r}: no token of .* 0 to 63"):
            FrozenLM(str(tiny_lm_dir), "model.layers.0.mlp", bos=wrong)  # type: ignore[arg-type]


def test_a_named_bos_stays_with_the_head(fit: Fit, tmp_path: Path) -> None:
    from kanllama_lightning.reports.saved_head import read_subject

    assert fit("--lm.bos=<eos>", trainer__logger="false", model__tokens="256") == 0
    folder = only_run(tmp_path)
    assert yaml.safe_load((folder / "config.yaml").read_text())["lm"]["bos"] == "<eos>"
    assert read_subject(folder).lm_args()["bos"] == "<eos>"
    assert read_subject(folder / "head").lm_args()["bos"] == "<eos>"


# ------------------------------------------------------------ the default's validation text


def config_of(tmp_path: Path) -> Any:
    return yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())


@pytest.mark.slow
def test_own_text_leaves_the_defaults_other_text_out(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fit(data__val=None, trainer__logger="false", model__tokens="256") == 0
    assert "data.val: left out, as data.train is other text (NeelNanda/pile-10k" in caplog.text
    assert config_of(tmp_path)["data"]["val"] is None


def test_what_is_asked_for_and_cannot_be_had_names_the_way_out(
    fit: Fit, capsys: pytest.CaptureFixture
) -> None:
    assert fit(data__val="[NeelNanda/pile-10k]", trainer__logger="false") == 2
    said = capsys.readouterr().err
    assert "data.val: name='NeelNanda/pile-10k'" in said
    assert "--data.val null" in said


def test_numbers_stay_the_same_without_overlap(text_file: Path) -> None:
    """Other validation text changes nothing in what is trained on."""
    tokenizer = word_tokenizer()
    alone = data(str(text_file), tokenizer).train_dataloader()
    (text_file.parent / "other.txt").write_text("w1 w2\nw3 w4\n")
    beside = data(str(text_file), tokenizer, val=[str(text_file.parent / "other.txt")])
    for a, b in zip(islice(alone, 20), islice(beside.train_dataloader(), 20), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a.kept is b.kept is None


def test_one_validation_set_needs_no_list(two_files: Path) -> None:
    made = data(str(two_files / "a.jsonl"), val=str(two_files / "b.jsonl"), val_fraction=0)
    assert made.val_names == ["b"]
    made = data(LocalCorpus(str(two_files / "a.jsonl")), val=LocalCorpus(f"{two_files}/b.jsonl"))
    assert made.val_names == ["heldout", "b"]


def test_an_empty_file_is_refused_by_name(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "nothing.jsonl").touch()
    for option in ("data__train", "data__val"):
        given = {option: str(tmp_path / "nothing.jsonl"), "trainer__logger": "false"}
        assert fit(**given) == 2
        said = capsys.readouterr().err
        assert "nothing.jsonl' holds no document" in said
        assert "Traceback" not in said
