"""From what a person writes after `--data.train` to a corpus."""

from pathlib import Path

from kanllama_lightning.corpus.hub import HubCorpus
from kanllama_lightning.corpus.local import DECOMPRESSED, SUFFIXES, TABLES, LocalCorpus
from kanllama_lightning.corpus.source import Corpus
from kanllama_lightning.types import InputError


def resolve(value: str | Corpus) -> Corpus:
    """The corpus meant: a path that exists or looks like one, else a dataset of the hub."""
    if isinstance(value, Corpus):
        return value
    path = Path(value).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError) as e:  # a name that is too long, or no name
        raise InputError(
            f"corpus {value[:80]!r}: cannot be a file, a folder or a dataset ({e.args[-1]}); check "
            "the path"
        ) from e
    if exists:
        return LocalCorpus(value)
    if path.suffix.lower() in (*SUFFIXES, *DECOMPRESSED, *TABLES) or value.startswith(
        (".", "/", "~")
    ):
        raise InputError(
            f"corpus {value!r} does not exist (looked for {path.absolute()}). Allowed are a file "
            f"({', '.join(SUFFIXES)}), a folder of such files, or the name of a Hugging Face "
            "dataset: check the path, which is taken from the working directory."
        )
    return HubCorpus(value)
