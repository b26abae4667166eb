"""Text of the installed packages: prose alone, each paragraph once, the same on every machine."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from kanllama_lightning.corpus import DocumentationCorpus, documentation
from kanllama_lightning.corpus.documentation import paragraphs
from kanllama_lightning.types import InputError

NUMPY = """
    frob(x, axis=0)

    Turn every second word of the text around, and leave the others alone.

    Parameters
    ----------
    x : array_like
        The words that are turned; those of one letter are left out altogether.
    axis : int, optional
        Axis.

    Returns
    -------
    y : ndarray
        As many words as there were before, in the same order.

    See Also
    --------
    numpy.frob : other words

    Notes
    -----
    We use the *fast* way of ``frob`` by :func:`~numpy.frob.turn`, which was found by people [1]_.

    >>> frob("a b")
    Traceback most recent call last, and many more words that are no prose at all.

    ====  =====================
    Name  What it is good for, in many words that a table has in it.
    ====  =====================

    .. code-block:: python

        This is code, and it is not read as prose, however many words it has.

    It ends with a list::

        Not this one, as it is an example of something that is printed somewhere.
    """
GOOGLE = """Reads a file from end to start, as few people would.

    Args:
        path (`str`): The file that is read, which has to be there beforehand.
        n: Count.
        **kwargs: Everything else is given to the reader, which says what it takes.

    Returns:
        list[str]: The lines of the file in the order in which they were read.
    """


def test_only_prose_is_kept() -> None:
    assert paragraphs(NUMPY) == [
        "Turn every second word of the text around, and leave the others alone.",
        "The words that are turned; those of one letter are left out altogether.",
        "As many words as there were before, in the same order.",
        "We use the fast way of frob by numpy.frob.turn, which was found by people .",
    ]
    assert paragraphs(GOOGLE) == [
        "Reads a file from end to start, as few people would.",
        "The file that is read, which has to be there beforehand.",
        "Everything else is given to the reader, which says what it takes.",
        "The lines of the file in the order in which they were read.",
    ]


SENTENCES = "\n\n".join(
    f"    The {a} {b} was seen by all the others when it came home that evening."
    for a in ("red", "blue", "old", "loud") for b in ("fox", "cow", "hen")
)  # fmt: skip


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Packages of one file each, found in the order given."""

    def make(packages: Iterable[tuple[str, str]]) -> None:
        found = []
        for name, source in packages:
            about = tmp_path / f"{name}-1.dist-info"
            about.mkdir(exist_ok=True)
            (tmp_path / f"{name}.py").write_text(source)
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
            (about / "RECORD").write_text(
                f"{name}.py,,\n{name}-1.dist-info/METADATA,,\ngone.py,,\n"
            )
            found.append(importlib.metadata.Distribution.at(about))
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
        documentation._everything.cache_clear()

    yield make
    documentation._everything.cache_clear()


def of(part: str) -> list[str]:
    corpus = DocumentationCorpus(part)  # type: ignore[arg-type]
    corpus.open()
    assert [d.number for d in corpus.documents(2)] == list(range(2, corpus.n_documents or 0))
    return [str(document.text) for document in corpus.documents()]


def test_the_order_of_the_machine_does_not_matter(install: Callable[..., None]) -> None:
    packages = [
        (f"p{i}", f'"""{SENTENCES.replace("evening", f"day {i}")}"""\nx = """no docstring"""\n')
        for i in range(30)
    ]
    install(packages)
    first, whole = of("all"), DocumentationCorpus("all").description()
    install(reversed(packages))
    assert of("all") == first
    assert DocumentationCorpus("all").description() == whole
    assert len([text for text in first if "that day" in text]) == 30
    train, validation = of("train"), of("validation")
    assert sorted(train + validation) == sorted(first)
    assert 0 < len([t for t in validation if "that day" in t]) < 15
    install([*packages[1:], ("p0", packages[0][1].replace("fox", "dog"))])
    assert DocumentationCorpus("all").description()["texts"] != whole["texts"]


def test_damaged_packages_are_left_out_by_name(
    install: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    text = f'"""{SENTENCES}"""\n'
    install([("whole", text), ("torn", text.replace("evening", "morning"))])
    (tmp_path / "torn-1.dist-info" / "RECORD").write_text("torn.py,,\n\n")
    assert any("home that evening" in t for t in of("all"))
    assert not any("home that morning" in t for t in of("all"))
    assert "documentation: torn is left out: its metadata is damaged" in caplog.text


def test_what_is_no_file_and_no_prose_is_not_read(
    install: Callable[..., None], tmp_path: Path
) -> None:
    install(
        [("whole", f'"""{SENTENCES}"""\n'), ("pipe", ""), ("long", f'""":{"a" * 2_000_000}"""')]
    )
    (tmp_path / "pipe.py").unlink()
    os.mkfifo(tmp_path / "pipe.py")
    assert any("home that evening" in text for text in of("all"))


def test_a_paragraph_is_in_one_document(install: Callable[..., None]) -> None:
    more = SENTENCES + "\n\n    And that was one paragraph more than in the one before it."
    install([
        ("one", f'def f():\n    r"""{SENTENCES}"""\n'),
        ("two", f'class A:\n    """{more}"""\n    def g(self):\n        """{SENTENCES}"""'),
        ("kanllama-lightning", f'"""{SENTENCES.replace("fox", "own")}"""'),
        ("odd", '"""\\N{no such name}' + SENTENCES.replace("fox", "odd") + '"""'),
        ("bytes", "# coding: latin-1\n"),
    ])  # fmt: skip
    texts = of("all")
    assert len([text for text in texts if "The red fox" in text]) == 1
    assert not any("The red own" in text or "The red odd" in text for text in texts)
    assert not any("one paragraph more" in text for text in texts)  # too short alone


def test_what_is_no_share_is_refused() -> None:
    for arguments in ({"val_share": float("nan")}, {"val_share": 1.0}, {"characters": 0}):
        with pytest.raises(InputError):
            DocumentationCorpus(**arguments)
    with pytest.raises(InputError, match="characters"):
        DocumentationCorpus(characters=10**9).open()


READ = """
from kanllama_lightning.corpus import DocumentationCorpus
corpus = DocumentationCorpus("train")
corpus.open()
print(corpus.n_documents, corpus.description()["texts"])
"""


@pytest.mark.slow
def test_two_processes_read_the_same() -> None:
    """And enough to train on: a million tokens are some four million characters."""
    said = {
        subprocess.run(
            [sys.executable, "-c", READ], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(said) == 1
    assert int(said.pop().split()[0]) > 8000
