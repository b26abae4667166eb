"""Documents in files on this machine."""

import io
import json
import logging
import shlex
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from kanllama_lightning.corpus.source import (
    Corpus,
    Document,
    Skipped,
    Unusable,
    document,
    require_vocabulary,
)
from kanllama_lightning.storage.fingerprint import fingerprint
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
SCANNED_RECORDS = 200_000  # looked at in `open()`, about two seconds of JSON
RECORD_BYTES = 1 << 26
"""A longer line or text file is no document: it would have to be held in memory many times over."""
DECOMPRESSED = {
    ".gz": "gunzip -k {}",
    ".bz2": "bunzip2 -k {}",
    ".xz": "unxz -k {}",
    ".zst": "zstd -d {}",
    ".zip": "unzip {}",
    ".tar": "tar -xf {}",
    ".tgz": "tar -xzf {}",
}
"""How files that hold files of a known kind are opened."""
TABLES = {".csv": ",", ".tsv": "\\t"}
Record = tuple[int, tuple[Path, int], object]
"""Number, file with line or row (from 1), and value of the field."""


class LocalCorpus(Corpus):
    """A file, or a folder of files, with one document per line or row.

    `.jsonl` and `.json` hold one JSON object per line (LF, CRLF or CR ends one), `.parquet` one
    document per row. A `.txt`
    file that is named holds one document per line; in a folder each `.txt` file is one document.
    A column that holds lists of integers is taken as token ids. What cannot be read (no UTF-8,
    half a character, NUL, no whole JSON object, a record above 64 MiB, a damaged part of a parquet
    file, a field of another type) is skipped, counted, and the first named in the log; blank
    records and nulls are skipped.

    Args:
        path: The file, or a folder whose files are read in the order of their names.
        column: Field of a JSON object or column of a parquet file that holds the document;
            text files have none.
        tokenizer: Only for a column of token ids: the name of the tokenizer that made them. It
            must be the model's own.
        vocab_hash: Only for a column of token ids, and stronger than the name: the hash of the
            vocabulary they come from, as `kanllama_lightning.data.vocabulary.vocab_hash` gives it.
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        tokenizer: str | None = None,
        vocab_hash: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.column = column
        self.tokenizer = tokenizer
        self.vocab_hash = vocab_hash
        self._skipped = Skipped(self.name)

    @property
    def name(self) -> str:
        """The file or folder's name, without suffix."""
        return self.path.stem or self.path.resolve().stem

    @property
    def counted(self) -> str:
        """What is one document of text files."""
        if not any(file.suffix.lower() == ".txt" for file in self._files()):
            return ""
        return (
            "each line of the .txt file is one" if self.path.is_file() else "each .txt file is one"
        )

    def open(self) -> None:
        """Look at up to 200,000 records; count the others."""
        files = self._files()
        try:
            self.n_documents = sum(self._size(file) for file in files)
            for file in files:
                _refuse_array(file)
        except OSError as error:
            raise InputError(
                f"path={str(self.path)!r}: {error.filename} cannot be read ({error.strerror}). "
                "Give a file that may be read"
            ) from error
        records = malformed = empty = 0
        has_ids = has_any = False
        columns: set[str] = set()
        for number, place, value in islice(self._records(0, columns), SCANNED_RECORDS):
            records += 1
            try:
                found = document(number, value)
            except Unusable as why:
                malformed += 1
                self._skipped.add(_named(place), why)
                continue
            empty += found is None
            has_any = has_any or found is not None
            has_ids = has_ids or (found is not None and found.ids is not None)
        if columns and self.column not in columns:
            raise InputError(
                f"column={self.column!r} is not in {self.path}. Its columns are "
                f"{', '.join(map(repr, sorted(columns)))}: set `column` to one of them."
            )
        self._skipped.judge(
            malformed,
            records,
            "Is it UTF-8 text in the form that its suffix says, and whole? Write it again so.",
        )
        if not has_any and next(self.documents(), None) is None:
            raise InputError(
                f"path={str(self.path)!r} holds no document: each must be a line or row with "
                f"some text (column {self.column!r}). Give a corpus that has some."
            )
        if empty:
            logger.info("%s: %d of %d records are blank, and skipped", self.name, empty, records)
        if has_ids:
            self.vocabularies = require_vocabulary(self.name, self.tokenizer, self.vocab_hash)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Documents from the line, row or file `start` on; lines before it are not parsed."""
        skipped = 0
        for number, place, value in self._records(start, set()):
            try:
                found = document(number, value)
            except Unusable as why:
                skipped += 1
                self._skipped.add(_named(place), why)
                continue
            if found is not None:
                yield found
        self._skipped.total(skipped)

    def description(self) -> dict[str, Any]:
        """Its arguments, with what is in the files instead of where they are."""
        arguments = super().description()
        del arguments["path"]
        counted = {"counted": self.counted} if not self.path.is_file() and self.counted else {}
        return arguments | counted | {"files": fingerprint(self._files())}

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise InputError(
                f"path={str(self.path)!r} does not exist. Give a file ({', '.join(SUFFIXES)}) "
                "or a folder of them; the path is taken from the working directory."
            )
        if not self.path.is_dir():
            _refuse_special(self.path)
            files = [self.path] if self.path.suffix.lower() in SUFFIXES else []
        else:
            every = sorted(f for f in self.path.rglob("*") if f.exists() and not f.is_dir())
            for file in every:
                if file.suffix.lower() in SUFFIXES:
                    _refuse_special(file)
            files = [f for f in every if f.suffix.lower() in SUFFIXES]
            if any(f.suffix == ".arrow" for f in every):
                raise InputError(
                    f"path={str(self.path)!r} is a dataset in Arrow files, which are not read. "
                    f"Write it as one of {', '.join(SUFFIXES)}, e.g. with Dataset.to_parquet."
                )
        if not files:
            raise InputError(
                f"path={str(self.path)!r} is no file of a known kind, nor a folder of such "
                f"files. Known are {', '.join(SUFFIXES)}: {_made_known(self.path)}."
            )
        return files

    def _records(self, start: int, columns: set[str]) -> Iterator[Record]:
        """All records from a number on; adds the names of the columns seen to `columns`."""
        first = 0
        for file in self._files():
            kind = file.suffix.lower()
            if kind == ".parquet":
                read = self._parquet
            elif kind == ".txt" and not self.path.is_file():
                read = self._whole
            else:
                read = self._lines
            first = yield from read(file, first, start, columns)

    def _whole(
        self, file: Path, first: int, start: int, columns: set[str]
    ) -> Generator[Record, None, int]:
        """A text file that is one document."""
        if first >= start:
            with file.open("rb") as data:
                content = data.read(RECORD_BYTES + 1)
            too_long = len(content) > RECORD_BYTES
            yield first, (file, 1), _too_long() if too_long else self._value(content, True, columns)
        return first + 1

    def _lines(
        self, file: Path, first: int, start: int, columns: set[str]
    ) -> Generator[Record, None, int]:
        number, plain = first, file.suffix.lower() == ".txt"
        with _lines_of(file) as data:
            while line := data.readline(RECORD_BYTES):
                whole = len(line) < RECORD_BYTES or line.endswith(b"\n")
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = data.readline(RECORD_BYTES)
                if number >= start:
                    value = self._value(line, plain, columns) if whole else _too_long()
                    yield number, (file, number - first + 1), value
                number += 1
        return number

    def _value(self, content: bytes, plain: bool, columns: set[str]) -> object:
        """The document's field; "" for a blank line, or why there is none."""
        try:
            text = content.decode("utf-8-sig").strip()
            if plain or not text:
                return text
            record = json.loads(text)
        except UnicodeDecodeError as error:
            return Unusable(f"is not UTF-8 (byte 0x{content[error.start]:02x})")
        except json.JSONDecodeError as error:
            return Unusable(f"is no whole JSON object ({error.msg})")
        except RecursionError:
            return Unusable("is JSON nested too deeply to be read")
        except ValueError:
            return Unusable("has a number of too many digits")
        if not isinstance(record, dict):
            return Unusable(f"is a JSON {type(record).__name__} and no object")
        columns.update(record)
        return record.get(self.column)

    def _parquet(
        self, file: Path, first: int, start: int, columns: set[str]
    ) -> Generator[Record, None, int]:
        number = first
        with pyarrow.parquet.ParquetFile(file) as table:
            columns.update(table.schema_arrow.names)
            if self.column not in table.schema_arrow.names:
                return number + int(table.metadata.num_rows)
            for group in range(table.num_row_groups):
                end = number + table.metadata.row_group(group).num_rows
                if end <= start:
                    number = end
                    continue
                for value in _column(table, group, self.column, end - number):
                    if number >= start:
                        yield number, (file, number - first + 1), value
                    number += 1
        return number

    def _size(self, file: Path) -> int:
        """Records in a file, usable or not: rows, lines, or the file itself."""
        kind = file.suffix.lower()
        if kind == ".txt" and not self.path.is_file():
            return 1
        if kind == ".parquet":
            try:
                return int(pyarrow.parquet.read_metadata(file).num_rows)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                raise InputError(
                    f"path: {file} cannot be read as parquet ({error}). It may be cut off: write "
                    "it again."
                ) from error
        lines = 0
        last = b"\n"
        with _lines_of(file) as data:
            while chunk := data.read(1 << 20):
                lines += chunk.count(b"\n")
                last = chunk[-1:]
        return lines + (last != b"\n")


class _CarriageReturns(io.FileIO):
    """A file whose lines end in carriage returns, with line feeds in their place."""

    def readinto(self, into: Any) -> int | None:
        """Read as a file does, and change these bytes."""
        n = super().readinto(into)
        into[:n] = bytes(into[:n]).replace(b"\r", b"\n")
        return n


def _lines_of(file: Path) -> BinaryIO:
    """A file of lines, whatever ends them: in one without a line feed carriage returns do."""
    with file.open("rb") as data:
        returns = False
        while chunk := data.read(1 << 20):
            if b"\n" in chunk:
                return file.open("rb")
            returns = returns or b"\r" in chunk
    return io.BufferedReader(_CarriageReturns(file)) if returns else file.open("rb")


def _column(
    table: pyarrow.parquet.ParquetFile, group: int, column: str, rows: int
) -> Iterator[object]:
    """The values of a row group, `rows` of them; of a damaged one what is whole, then why not."""
    done = 0
    try:
        for batch in table.iter_batches(1024, row_groups=[group], columns=[column]):
            values = _values(batch.column(0))
            done += len(values)
            yield from values
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        yield from (
            Unusable(f"lies in a damaged part of the file ({why})") for _ in range(done, rows)
        )


def _values(column: Any) -> list[object]:
    """Python values of a column; of one that is no text, why."""
    try:
        return list(column.to_pylist())
    except ValueError:  # one of them is no UTF-8
        return [_one(item) for item in column]


def _one(item: Any) -> object:
    try:
        return item.as_py()
    except ValueError as error:
        return Unusable(
            f"is not UTF-8 ({error})" if isinstance(error, UnicodeError) else str(error)
        )


def _too_long() -> Unusable:
    return Unusable(f"is longer than {RECORD_BYTES >> 20} MiB")


def _named(place: tuple[Path, int]) -> str:
    return f"{place[0]}:{place[1]}"


def _refuse_special(file: Path) -> None:
    """Refuse what is neither file nor folder: a pipe is read once, and may never end."""
    if not file.is_file():
        raise InputError(
            f"path={str(file)!r}: is no ordinary file (a pipe, a socket or a device). Text is read "
            "more than once: write it to a file and give that."
        )


def _refuse_array(file: Path) -> None:
    """Say how one JSON list becomes one object per line."""
    if file.suffix.lower() not in (".json", ".jsonl"):
        return
    with file.open("rb") as data:
        start = data.read(1 << 12)
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return
    out = str(file.with_name(f"{file.stem}-lines.jsonl"))
    raise InputError(
        f"path={str(file)!r} holds one JSON list, not one JSON object per line. Write it so, e.g. "
        f"python -c \"import json; open({out!r}, 'w').writelines(json.dumps(r) + chr(10) for r in "
        f'json.load(open({str(file)!r})))"'
    )


def _made_known(path: Path) -> str:
    """How a file of another kind becomes one that is read."""
    kind, name = path.suffix.lower(), shlex.quote(str(path))
    if path.is_dir():
        return "put some there, or name a file"
    if kind in DECOMPRESSED:
        return f"unpack it first, `{DECOMPRESSED[kind].format(name)}`"
    if kind in TABLES:
        rows = f"csv.DictReader(open({str(path)!r}, newline=''), delimiter='{TABLES[kind]}')"
        return (
            f'convert it, python -c "import csv, json; csv.field_size_limit(2**30); '
            f"open({str(path.with_suffix('.jsonl'))!r}, 'w').writelines("
            f'json.dumps(r) + chr(10) for r in {rows})"'
        )
    return "a file of plain text, one document per line, may be renamed to .txt"
