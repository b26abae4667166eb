"""Documents in files on this machine."""

import json
import logging
from collections.abc import Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from kanllama_lightning.corpus.base import Corpus, Document, document, require_vocabulary
from kanllama_lightning.fingerprint import fingerprint
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
SCANNED_RECORDS = 200_000  # looked at in `open()`, about two seconds of JSON
MALFORMED_SHARE = 0.01


class LocalCorpus(Corpus):
    """A file, or a folder of files, with one document per line or row.

    `.jsonl` and `.json` hold one JSON object per line, `.txt` one document per line, `.parquet`
    one per row. A column that holds lists of integers is taken as token ids.

    Args:
        path: The file, or a folder whose files are read in the order of their names.
        column: Field of a JSON object or column of a parquet file that holds the document;
            text files have none.
        tokenizer: Only for a column of token ids: the name of the tokenizer that made them. It
            must be the model's own.
        vocab_hash: Only for a column of token ids, and stronger than the name: the hash of the
            vocabulary they come from, as `kanllama_lightning.vocabulary.vocab_hash` gives it.
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

    @property
    def name(self) -> str:
        """The file or folder's name, without suffix."""
        return self.path.stem or self.path.resolve().stem

    def open(self) -> None:
        """Look at up to 200,000 records; count the others."""
        self.n_documents = sum(_size(file) for file in self._files())
        records = malformed = 0
        has_ids = False
        columns: set[str] = set()
        for _, value in islice(self._records(0, columns), SCANNED_RECORDS):
            found = document(0, value)
            records += 1
            malformed += found is None and not isinstance(value, str)
            has_ids = has_ids or (found is not None and found.ids is not None)
        if columns and self.column not in columns:
            raise InputError(
                f"column={self.column!r} is not in {self.path}. Its columns are "
                f"{', '.join(map(repr, sorted(columns)))}: set `column` to one of them."
            )
        if malformed:
            self._judge(malformed, records)
        if next(self.documents(), None) is None:
            raise InputError(
                f"path={str(self.path)!r} holds no document: each must be a line or row with "
                f"some text (column {self.column!r}). Give a corpus that has some."
            )
        if has_ids:
            self.vocabularies = require_vocabulary(self.name, self.tokenizer, self.vocab_hash)

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Documents from the line or row `start` on; lines before it are not parsed."""
        skipped = 0
        for number, value in self._records(start, set()):
            found = document(number, value)
            if found is not None:
                yield found
            elif not isinstance(value, str):
                skipped += 1
        if skipped:
            logger.info("%s: %d malformed records skipped", self.name, skipped)

    def description(self) -> dict[str, Any]:
        """Its arguments, with what is in the files instead of where they are."""
        arguments = super().description()
        del arguments["path"]
        return arguments | {"files": fingerprint(self._files())}

    def _files(self) -> list[Path]:
        if not self.path.exists():
            raise InputError(
                f"path={str(self.path)!r} does not exist. Give a file ({', '.join(SUFFIXES)}) "
                "or a folder of them; the path is taken from the working directory."
            )
        if self.path.is_file():
            files = [self.path] if self.path.suffix in SUFFIXES else []
        else:
            files = sorted(f for f in self.path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
            if any(self.path.rglob("*.arrow")):
                raise InputError(
                    f"path={str(self.path)!r} is a dataset in Arrow files, which are not read. "
                    f"Write it as one of {', '.join(SUFFIXES)}, e.g. with Dataset.to_parquet."
                )
        if not files:
            raise InputError(
                f"path={str(self.path)!r} is no file of a known kind, nor a folder of such "
                f"files. Known are {', '.join(SUFFIXES)}: rename or convert it."
            )
        return files

    def _records(self, start: int, columns: set[str]) -> Iterator[tuple[int, object]]:
        """Number and value of each record; adds the names of the columns seen to `columns`."""
        first = 0
        for file in self._files():
            read = self._parquet if file.suffix == ".parquet" else self._lines
            first = yield from read(file, first, start, columns)

    def _lines(
        self, file: Path, first: int, start: int, columns: set[str]
    ) -> Generator[tuple[int, object], None, int]:
        number = first
        with file.open("rb") as lines:
            for number, line in enumerate(lines, first + 1):
                if number > start:
                    yield number - 1, self._value(line, file.suffix == ".txt", columns)
        return number

    def _value(self, line: bytes, plain: bool, columns: set[str]) -> object:
        """The document's field; "" for a blank line, None for a malformed one."""
        try:
            text = line.decode("utf-8-sig").strip()
            if plain or not text:
                return text
            record = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError):
            return None
        if not isinstance(record, dict):
            return None
        columns.update(record)
        return record.get(self.column)

    def _parquet(
        self, file: Path, first: int, start: int, columns: set[str]
    ) -> Generator[tuple[int, object], None, int]:
        number = first
        with pyarrow.parquet.ParquetFile(file) as table:
            columns.update(table.schema_arrow.names)
            if self.column not in table.schema_arrow.names:
                return number + table.metadata.num_rows
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows <= start:
                    number += rows
                    continue
                for batch in table.iter_batches(1024, row_groups=[group], columns=[self.column]):
                    for value in batch.column(0).to_pylist():
                        if number >= start:
                            yield number, value
                        number += 1
        return number

    def _judge(self, malformed: int, records: int) -> None:
        """Log a few malformed records; refuse many."""
        finding = (
            f"{malformed} of {records} records looked at in {self.path} are no "
            f"document (not a whole JSON object, or no text in column {self.column!r})"
        )
        if malformed > max(1, MALFORMED_SHARE * records):
            raise InputError(
                f"path={str(self.path)!r}: {finding}; at most {MALFORMED_SHARE:.0%} may be. The "
                "file may be cut off, or one JSON list instead of one object per line: write it "
                "again."
            )
        logger.warning("%s; they are skipped.", finding)


def _size(file: Path) -> int:
    """Records in a file, usable or not: rows, or lines."""
    if file.suffix == ".parquet":
        try:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(
                f"path: {file} cannot be read as parquet ({error}). It may be cut off: write it "
                "again."
            ) from error
    lines = 0
    last = b"\n"
    with file.open("rb") as data:
        while chunk := data.read(1 << 20):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")
