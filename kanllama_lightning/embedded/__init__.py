"""The built-in story world: its generator, its tokenizer and its small trained Llama.

Everything here works without a network. `story` makes documents, with the facts that hold in
every stretch of them; `MODEL_DIR` holds a language model trained on such documents by `build.py`.
"""

from pathlib import Path

from kanllama_lightning.embedded.narrator import Fact
from kanllama_lightning.embedded.world import FACTS, Story, story

__all__ = ["FACTS", "MODEL_DIR", "Fact", "Story", "story"]

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Folder of the shipped model and tokenizer, for `from_pretrained`."""
