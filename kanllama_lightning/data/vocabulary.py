"""From documents to token ids of the model's own vocabulary, and the checks that they are."""

import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from kanllama_lightning.corpus import Corpus, Document, Vocabulary
from kanllama_lightning.data.packing import Rows, pack
from kanllama_lightning.types import InputError

logger = logging.getLogger(__name__)

TOKENISED_AT_ONCE = 256  # documents; bounds the memory that the tokenizer takes
SAMPLE_DOCUMENTS = 200
LISTED = 12
"""Special tokens named in the log."""
LEFT_OUT_AT_MOST = 0.9
"""Share of a text that may consist of special tokens."""


class TextEncoder:
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
                "must start. Name the token that the model was trained with at the start of its "
                "input: --lm.bos TOKEN, or `bos_token` in its tokenizer_config.json."
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
        self.special: list[int] = special_ids(tokenizer)
        self.vocab = len(tokenizer)
        self._damaged = 0

    def say_special(self) -> None:
        """List the tokens that neither train a head nor count in a figure."""
        names = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in self.special]
        listed = [f"{name!r} ({i})" for name, i in zip(names, self.special, strict=True)]
        more = (
            f" and {len(listed) - LISTED} more, up to {listed[-1]}" if len(listed) > LISTED else ""
        )
        logger.info(
            "special tokens, left out of training and figures: %s%s; every row begins with %r (%d)",
            ", ".join(listed[:LISTED]),
            more,
            self.tokenizer.convert_ids_to_tokens(self.bos),
            self.bos,
        )

    def check_text(self, corpus: Corpus) -> None:
        """Say how much of a corpus is written in special tokens, `<unk>` among them.

        Raises:
            InputError: Nearly all of it, so that hardly anything would be trained on.
        """
        sample = list(islice(corpus.once(), SAMPLE_DOCUMENTS))
        ids = np.concatenate([np.zeros(0, dtype=np.int64), *self.encode(sample)])
        left_out = ids[np.isin(ids, self.special)]
        if not len(left_out):
            return
        found, counts = np.unique(left_out, return_counts=True)
        worst = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)[:3]
        named = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(i)!r} {n:,}" for n, i in worst)
        finding = (
            f"{corpus.name}: {len(left_out):,} of {len(ids):,} tokens of its first {len(sample)} "
            f"documents are special tokens ({named})"
        )
        if not len(left_out) <= LEFT_OUT_AT_MOST * len(ids):
            raise InputError(
                f"{finding}, which are left out; hardly anything remains. Give text in letters "
                "that this model's tokenizer knows"
            )
        logger.warning("%s; they are left out of training and figures", finding)

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
        """The ids of a pre-tokenised document, without the BOS and EOS it may have.

        None of one with ids that the vocabulary does not have: a corpus with such documents is
        refused in `check_vocabulary`, if they are among the first; a later one must not stop a run.
        """
        ids = np.asarray(document.ids, dtype=np.int64)
        if not self._knows(ids):
            self._damaged += 1
            if self._damaged == 1:
                logger.warning(
                    "document %d has token ids up to %d, tokenizer %r has %d: such documents are "
                    "skipped",
                    document.number,
                    ids.max(),
                    self.tokenizer.name_or_path,
                    self.vocab,
                )
            return ids[:0]
        ids = ids[int(ids[0] == self.bos) :]
        return ids[:-1] if len(ids) and ids[-1] == self.tokenizer.eos_token_id else ids

    def _knows(self, ids: np.ndarray) -> bool:
        return bool(ids.min() >= 0 and ids.max() < self.vocab)

    def require_known(self, document: Document) -> None:
        """Refuse a pre-tokenised document with ids of another vocabulary."""
        ids = np.asarray(document.ids, dtype=np.int64)
        if not self._knows(ids):
            raise InputError(
                f"document {document.number} has token ids from {ids.min()} to {ids.max()}, but "
                f"tokenizer {self.tokenizer.name_or_path!r} has {self.vocab} ids, from 0 up. The "
                "corpus was made with another tokenizer: use one with text, or with this "
                "model's ids."
            )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that the tokenizer marks as special, with a role or without one.

    Chat markers and reserved tokens have none, so that `all_special_ids` does not list them.
    """
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))


def vocab_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all token strings with their ids: equal for equal vocabularies, whatever the name."""
    digest = sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_vocabulary(corpus: Corpus, encoder: TextEncoder) -> None:
    """Refuse a pre-tokenised corpus made with another tokenizer; log what its ids say."""
    for named in corpus.vocabularies:
        _check_name(named, encoder.tokenizer)
    if not corpus.vocabularies:
        return
    sample = [d for d in islice(corpus.once(), SAMPLE_DOCUMENTS) if d.ids is not None]
    for document in sample:
        encoder.require_known(document)
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
