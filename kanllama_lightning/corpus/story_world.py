"""The built-in corpus: stories made up on the spot, so that nothing has to be downloaded."""

from collections.abc import Iterator

from kanllama_lightning.corpus.source import Corpus, Document
from kanllama_lightning.embedded import story
from kanllama_lightning.types import InputError


class StoryWorldCorpus(Corpus):
    """Stories of the embedded world, each a pure function of seed and number.

    Args:
        n_documents: Number of stories, of about a hundred tokens each, before they repeat.
        seed: Seed of the stories; another one gives other stories.
    """

    def __init__(self, n_documents: int = 100_000, seed: int = 0) -> None:
        if n_documents < 1:
            raise InputError(
                f"n_documents={n_documents}: allowed are whole numbers from 1 up; give more."
            )
        self.n_documents: int = n_documents
        self.seed = seed

    @property
    def name(self) -> str:
        """Always `story_world`."""
        return "story_world"

    def open(self) -> None:
        """Nothing can be missing."""

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Stories from number `start` on."""
        for number in range(start, self.n_documents):
            yield Document(number, text=story(self.seed, number).text)
