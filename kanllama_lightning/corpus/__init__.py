"""Where text comes from: one class for each kind of source, chosen by `class_path` in YAML."""

from kanllama_lightning.corpus.documentation import DocumentationCorpus
from kanllama_lightning.corpus.hub import HubCorpus
from kanllama_lightning.corpus.local import LocalCorpus
from kanllama_lightning.corpus.mixture import Mixture, parts
from kanllama_lightning.corpus.naming import resolve
from kanllama_lightning.corpus.source import Corpus, Document, Vocabulary
from kanllama_lightning.corpus.story_world import StoryWorldCorpus

__all__ = [
    "Corpus",
    "Document",
    "DocumentationCorpus",
    "HubCorpus",
    "LocalCorpus",
    "Mixture",
    "StoryWorldCorpus",
    "Vocabulary",
    "parts",
    "resolve",
]
