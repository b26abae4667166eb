"""The formats, by name; and which of them a folder is in."""

from pathlib import Path
from types import ModuleType

from kanllama_lightning.exchange import dictionary_learning, saelens, sparsify
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads.head import SAEHead

FORMATS: dict[str, ModuleType] = {one.NAME: one for one in (saelens, sparsify, dictionary_learning)}
"""Each has `write`, `read`, `recognises` and the names of its `FILES`."""


def format_of(folder: Path) -> ModuleType | None:
    """The format that a folder is in; None for any other folder."""
    return next((one for one in FORMATS.values() if one.recognises(folder)), None)


def read_foreign(folder: Path) -> tuple[SAEHead, Origin]:
    """The SAE of a folder in any of the formats, as a head; raises InputError as `read` does."""
    found = format_of(folder)
    assert found is not None
    made: tuple[SAEHead, Origin] = found.read(folder)
    return made
