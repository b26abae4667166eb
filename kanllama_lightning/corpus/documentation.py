"""Prose that is on every machine with this project: the documentation of its installed packages."""

import ast
import importlib.metadata
import inspect
import logging
import re
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Literal

from kanllama_lightning.corpus.source import Corpus, Document
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

OWN = "kanllama-lightning"
REFERENCE = "python"
"""What the language reference counts as, beside the packages."""
LONGEST_FILE = 1 << 22
LONGEST_LINE = 10_000
"""Characters of a line of prose that somebody may have written."""
SHORTEST = 200
"""Bytes of a docstring that may hold a paragraph and more."""
QUOTES = b'"""'
LONGEST_PLACE = 400
"""Bytes in front of a text that tell whether it describes something."""
SIGNATURE = re.compile(r"\*{0,2}`{0,2}[\w.*, /\"'`\[\]]+`{0,2}( ?: ?.*|\(.*\)( ?->.*)?| ?->.*)$")
ITEM = re.compile(
    r"(?:[-*+•]\s|\d+[.)]\s|:\w+[^:\n]*:|[\w*.`]+ ?\([^()]*\) ?:|[\w*`.\[\]|]+ ?: )\s*"
)
"""What an entry of a list, or of arguments, begins with."""
UNDERLINE = re.compile(r"([-=~^*#+\"'])\1{2,}$")
MARKUP = (
    ("`", re.compile(r":[a-zA-Z:]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),
    ("`", re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),
    ("`", re.compile(r"`{1,2}([^`]+)`{1,2}_*"), r"\1"),
    ("*", re.compile(r"(?<![\w*])\*{1,2}(?=\S)([^*]+?)(?<=\S)\*{1,2}(?![\w*])"), r"\1"),
    ("]_", re.compile(r"\[(\d+|\w+)\]_"), ""),
    ("  ", re.compile(r" {2,}"), " "),
)
"""A sign of it, what it looks like, and what is kept."""
FEWEST_WORDS = 6
ENDS = tuple(".!?:;)")
SIGNS = re.compile(r"[_(){}\[\]=<>|\\/#@~^*+$&%`]")
WORD = re.compile(r"[A-Za-z][a-z']+")


class DocumentationCorpus(Corpus):
    """Docstrings of the installed packages and the language reference, as prose.

    Signatures, lists of arguments without a description, code, tables and markup are left out,
    and every paragraph that another document has. The order is that of a hash of the texts, so
    that it is the same wherever the same packages are installed; `description()` has a hash of
    all of it. Nothing of the packages is imported.

    Args:
        part: `train` leaves out the packages of `validation`; which these are is decided by
            their names.
        val_share: Share of packages that are for validation, by number.
        characters: A shorter text is no document.
    """

    def __init__(
        self,
        part: Literal["train", "validation", "all"] = "train",
        val_share: float = 0.1,
        characters: int = 200,
    ) -> None:
        if part not in ("train", "validation", "all"):
            raise InputError(f"part={part!r}: allowed are train, validation and all")
        if not 0 < val_share < 1:
            raise InputError(f"val_share={val_share}: allowed are shares above 0 and below 1")
        if not characters >= 1:
            raise InputError(f"characters={characters}: allowed are whole numbers from 1 up")
        self.part = part
        self.val_share = val_share
        self.characters = characters

    @property
    def name(self) -> str:
        """`documentation`, and `documentation_validation` of the other packages."""
        return "documentation" if self.part != "validation" else "documentation_validation"

    @property
    def counted(self) -> str:
        """What is one document."""
        return "a docstring or section of the language reference is one"

    def open(self) -> None:
        """Read all packages: some seconds.

        Raises:
            InputError: No text is found.
        """
        self.n_documents = len(self._texts)
        logger.info(
            "%s: %d documents, %s", self.name, self.n_documents, self.description()["texts"][:19]
        )
        if not self._texts:
            raise InputError(
                f"DocumentationCorpus with part={self.part!r}: the installed packages hold no "
                f"text of {self.characters} characters; lower `characters`, or name a file with "
                "--data.train"
            )

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Texts from number `start` on."""
        for number in range(start, len(self._texts)):
            yield Document(number, text=self._texts[number])

    def description(self) -> dict[str, Any]:
        """Its arguments, the number of documents, and a hash of the texts in order."""
        whole = sha256()
        for text in self._texts:
            whole.update(text.encode() + b"\0")
        return {
            "class": type(self).__name__,
            "part": self.part,
            "val_share": self.val_share,
            "characters": self.characters,
            "n_documents": len(self._texts),
            "texts": f"sha256:{whole.hexdigest()}",
        }

    def in_part(self, package: str) -> bool:
        """Whether a package's text belongs to this part."""
        if self.part == "all":
            return True
        share = int.from_bytes(blake2b(package.encode(), digest_size=8).digest(), "big") / 2**64
        return (share < self.val_share) == (self.part == "validation")

    @cached_property
    def _texts(self) -> list[str]:
        """The documents of this part, in order."""
        found = _everything(self.characters)
        return [text for package, text in found if self.in_part(package)]


@lru_cache(maxsize=1)
def _everything(characters: int) -> tuple[tuple[str, str], ...]:
    """All documents in order, each with its package; a paragraph is in the first of them only."""
    started = time.monotonic()
    packages = _packages()
    logger.info("documentation: reading %d installed packages (some ten seconds)", len(packages))
    seen: set[bytes] = set()
    read: set[str] = set()
    found: list[tuple[bytes, str, str]] = []
    for package, files in packages.items():
        for docstring in _docstrings(package, files):
            if docstring in read:  # one in four: nothing in it would be new
                continue
            read.add(docstring)
            fresh = []
            for paragraph in paragraphs(docstring):
                key = blake2b(paragraph.lower().encode(), digest_size=16).digest()
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            text = "\n\n".join(fresh)
            if len(text) >= characters:
                found.append((blake2b(text.encode(), digest_size=16).digest(), package, text))
    logger.info("documentation: read in %.0f s", time.monotonic() - started)
    return tuple((package, text) for _, package, text in sorted(found))


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring that are prose, each on one line and without markup.

    Args:
        docstring: As it stands in the source.
    """
    lines = inspect.cleandoc(docstring).splitlines()
    if max(map(len, lines), default=0) > LONGEST_LINE:  # data; some patterns would take hours
        return []
    blocks: list[list[str]] = [[]]
    code, printed = -1, False
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        indent = len(line) - len(line.lstrip())
        bare = line.strip()
        if code >= 0 and bare and indent <= code:
            code = -1
        printed = bool(bare) and (printed or bare.startswith(">>>"))
        if code >= 0 or printed:
            continue
        if bare.startswith(("...", "$ ", "%", "@", "|", "+-", ".. ")) or bare == "::":
            blocks.append([])
            if bare.startswith(".. ") and not bare.startswith((".. note", ".. warning")):
                code = indent
            continue
        if not bare or UNDERLINE.match(bare) or UNDERLINE.match(below.strip()):
            blocks.append([])
            continue
        item = ITEM.match(bare)
        deeper = len(below) - len(below.lstrip()) > indent and below.strip()
        if item or (deeper and SIGNATURE.match(bare)):
            blocks.append([])
            rest = bare[item.end() :] if item else ""
            if rest and not (deeper and SIGNATURE.match(bare) and not rest.endswith((".", ","))):
                blocks[-1].append(rest)
            continue
        blocks[-1].append(bare.removesuffix("::") + ":" if bare.endswith("::") else bare)
        if bare.endswith("::"):
            code = indent
            blocks.append([])
    made = (" ".join(block) for block in blocks)
    long_enough = (text for text in made if text.count(" ") >= FEWEST_WORDS - 1)
    return [text for text in map(_plain, long_enough) if _is_prose(text)]


def _plain(text: str) -> str:
    for sign, pattern, kept in MARKUP:
        if sign in text:
            text = pattern.sub(kept, text)
    return text.strip()


def _is_prose(text: str) -> bool:
    """Sentences: enough words, few signs of code, and an end."""
    words = WORD.findall(text) if text[-1:] in ENDS else []
    return (
        len(words) >= FEWEST_WORDS
        and (text[0].isupper() or text[0] in "\"'(")
        and sum(map(len, words)) >= 0.6 * len(text)
        and len(SIGNS.findall(text)) <= 0.03 * len(text)
    )


def _packages() -> Mapping[str, list[tuple[str, Path]]]:
    """Python files of every installed package, by their names within it; packages in order."""
    found: dict[str, list[tuple[str, Path]]] = {REFERENCE: []}
    there = sorted(importlib.metadata.distributions(), key=lambda p: str(getattr(p, "_path", "")))
    for package in there:
        name = "a package"
        try:
            name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
            if not name or name == OWN or name in found:
                continue
            files = [
                (file.as_posix(), Path(str(file.locate())))
                for file in package.files or ()
                if file.suffix == ".py" and not {"test", "tests", "_vendor"} & set(file.parts)
            ]
        except (TypeError, ValueError, OSError) as e:  # of a damaged list of files, or metadata
            logger.warning("documentation: %s is left out: its metadata is damaged (%s)", name, e)
            continue
        found[name] = files
    return {name: sorted(found[name]) for name in sorted(found)}


def _docstrings(package: str, files: list[tuple[str, Path]]) -> Iterator[str]:
    """Long docstrings of a package in the order of its files; the sections of the reference."""
    if package == REFERENCE:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    for _, path in files:
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode) or about.st_size > LONGEST_FILE:
                continue
            source = path.read_bytes()
        except (OSError, ValueError):  # listed, and taken away since; a name that is none
            continue
        yield from _described(source)


def _described(source: bytes) -> Iterator[str]:
    """What stands in three quotation marks behind a colon, or first in a file."""
    parts = source.split(QUOTES)
    for before, body in zip(parts[::2], parts[1::2], strict=False):
        if len(body) < SHORTEST:
            continue
        place = before[-LONGEST_PLACE:].rstrip()
        raw = place[-1:].lower() == b"r"
        place = place.rstrip(b"rR").rstrip()
        first = before is parts[0] and all(
            line.lstrip().startswith(b"#") for line in place.splitlines()
        )
        if place.endswith(b":") or first:
            text = _read(body, raw)
            if text is not None:
                yield text


def _read(body: bytes, raw: bool) -> str | None:
    """The text of a literal; None for one that is no UTF-8, or cannot be read."""
    try:
        if raw or b"\\" not in body:
            return body.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = ast.literal_eval((QUOTES + body + QUOTES).decode())
        text.encode()
    except (SyntaxError, ValueError):
        return None
    return text if isinstance(text, str) else None
