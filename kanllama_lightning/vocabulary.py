"""From documents to token ids of the model's own vocabulary, and the checks that they are."""

import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.corpus import Corpus, Document, Vocabulary
from kanllama_lightning.packing import Rows, pack
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

TOKENISED_AT_ONCE = 256  # documents; bounds the memory that the tokenizer takes
SAMPLE_DOCUMENTS = 200


class Encoder:
    """Documents to packed rows, by one tokenizer.

    Args:
        tokenizer: The language model's tokenizer; it must have a BOS token.
        ctx_len: Tokens per row.
        append_eos: Whether each document ends with EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ctx_len: int, append_eos: bool) -> None:
        name = tokenizer.name_or_path
        if tokenizer.bos_token_id is None:
            eos = "an EOS" if tokenizer.eos_token_id is not None else "no EOS either"
            raise InputError(
                f"tokenizer {name!r} has no BOS token (bos_token; {eos}), with which every row "
                "must start. Set `bos_token` in its tokenizer_config.json to the token that the "
                "model was trained with at the start of its input."
            )
        if append_eos and tokenizer.eos_token_id is None:
            raise InputError(
                f"append_eos=true, but tokenizer {name!r} has no EOS token (eos_token). Set "
                "`append_eos` to false, or `eos_token` in its tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.ctx_len = ctx_len
        self.bos: int = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id if append_eos else None
        self.special: list[int] = sorted(tokenizer.all_special_ids)
        self.vocab = len(tokenizer)

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Token ids of each document, without BOS and EOS."""
        encoded = []
        for at in range(0, len(documents), TOKENISED_AT_ONCE):
            some = documents[at : at + TOKENISED_AT_ONCE]
            texts = [d.text for d in some if d.text is not None]
            made = iter(self._tokenise(texts) if texts else [])
            encoded += [self._given(d) if d.ids is not None else next(made) for d in some]
        return encoded

    def pack(self, documents: Sequence[Document], first_number: int = 0) -> Rows:
        """The documents as rows; their numbers count from `first_number`."""
        numbers = [first_number + d.number for d in documents]
        encoded = self.encode(documents)
        return pack(encoded, numbers, self.ctx_len, self.bos, self.eos, self.special)

    def first_rows(self, documents: Iterator[Document], n_rows: int) -> Rows:
        """Up to `n_rows` rows of the first documents, in order; reads no further than needed."""
        taken: list[Document] = []
        tokens = 0
        while tokens < n_rows * self.ctx_len:
            some = list(islice(documents, 16))
            if not some:
                break
            taken += some
            tokens += sum(map(len, self.encode(some))) + len(some)
        return self.pack(taken).pick(slice(n_rows))

    def _tokenise(self, texts: list[str]) -> Iterator[np.ndarray]:
        made = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents longer than the model's context are cut later
        )
        return (np.asarray(ids, dtype=np.int64) for ids in made["input_ids"])

    def _given(self, document: Document) -> np.ndarray:
        """The ids of a pre-tokenised document, without the BOS and EOS it may have."""
        ids = np.asarray(document.ids, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= self.vocab:
            raise InputError(
                f"document {document.number} has token ids from {ids.min()} to {ids.max()}, but "
                f"tokenizer {self.tokenizer.name_or_path!r} has {self.vocab} ids, from 0 up. The "
                "corpus was made with another tokenizer: use one with text, or with this "
                "model's ids."
            )
        ids = ids[int(ids[0] == self.bos) :]
        return ids[:-1] if len(ids) and ids[-1] == self.tokenizer.eos_token_id else ids


def vocab_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all token strings with their ids: equal for equal vocabularies, whatever the name."""
    digest = sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_vocabulary(corpus: Corpus, encoder: Encoder) -> None:
    """Refuse a pre-tokenised corpus made with another tokenizer; log what its ids say."""
    for named in corpus.vocabularies:
        _check_name(named, encoder.tokenizer)
    if not corpus.vocabularies:
        return
    sample = [d for d in islice(corpus.once(), SAMPLE_DOCUMENTS) if d.ids is not None]
    encoded = encoder.encode(sample)
    for ids in encoded[:3]:
        logger.info("%s, some ids decoded: %r", corpus.name, encoder.tokenizer.decode(ids[:30]))


def _check_name(named: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    in_use = tokenizer.name_or_path
    remedy = (
        "The same ids would be other words, and nothing else would fail: use a corpus of text, "
        "or one tokenised for this model."
    )
    if named.vocab_hash is not None:
        if named.vocab_hash != vocab_hash(tokenizer):
            raise InputError(
                f"corpus {named.corpus!r}: vocab_hash={named.vocab_hash!r} is not that of the "
                f"model's tokenizer {in_use!r} ({vocab_hash(tokenizer)}). {remedy}"
            )
    elif named.tokenizer is not None and _basename(named.tokenizer) != _basename(in_use):
        raise InputError(
            f"corpus {named.corpus!r}: its ids were made with tokenizer={named.tokenizer!r}, but "
            f"the model's tokenizer is {in_use!r}. {remedy}"
        )


def _basename(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
