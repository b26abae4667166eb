"""GGUF files: the same model as the folder they were made from, or refused in one line."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kanllama_lightning.embedded import MODEL_DIR, story
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.gguf_file import GGUFFile, llama_3_factors
from kanllama_lightning.training.cache_key import _weights
from kanllama_lightning.types import InputError
from tests.conftest import SHARED
from tests.gguf_writer import Q, write_gguf

HOOK = "model.layers.1.mlp"
TEXTS = (
    *(story(3, i).text for i in range(5)), "In 1984, 12345.67 men  ran", "a\n\n\tb   c ", "",
    "C'est déjà l'été; Größe 42 µm", "数学は123楽しい", "smile 😀 1️⃣", "it's we'll I'D",
    "<|end_of_text|> literally", "</s> literally",
)  # fmt: skip


def loss(lm: FrozenLM, text: str) -> float:
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *ids_of(lm, text)]])
    prefix = lm.prefix(ids)
    logits = lm.logits(lm.resume(prefix, prefix.acts))
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


def ids_of(lm: FrozenLM, text: str) -> list[int]:
    found: list[int] = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(MODEL_DIR, tmp_path_factory.mktemp("gguf") / "embedded.gguf")


def test_a_file_is_the_folder_it_was_made_from(file: Path) -> None:
    """To the bit in fp32, tokens and roles of tokens included; a folder with the file is it too."""
    folder = FrozenLM("embedded", HOOK).load_()
    for name in (str(file), str(file.parent)):
        lm = FrozenLM(name, HOOK).load_()
        want, have = folder.model.state_dict(), lm.model.state_dict()
        assert want.keys() == have.keys()
        assert all(torch.equal(want[k], have[k]) for k in want)
        assert [ids_of(lm, t) for t in TEXTS] == [ids_of(folder, t) for t in TEXTS]
        assert lm.tokenizer.all_special_ids == folder.tokenizer.all_special_ids
        assert lm.tokenizer.decode(ids_of(lm, TEXTS[8])) == TEXTS[8]
        assert (lm.positions, lm.vocab_size) == (folder.positions, folder.vocab_size)
        assert loss(lm, TEXTS[0]) == loss(folder, TEXTS[0])
        assert _weights(lm) != _weights(folder)
        assert "Llama" in type(lm.model).__name__


@pytest.mark.parametrize("kind", [Q.Q8_0, Q.Q4_1, Q.F16], ids=lambda kind: kind.name)
def test_quantised_files_cost_little(kind: Any, tmp_path: Path) -> None:
    exact = FrozenLM("embedded", HOOK).load_()
    lm = FrozenLM(str(write_gguf(MODEL_DIR, tmp_path / "q.gguf", kind)), HOOK).load_()
    worst = {Q.F16: 0.001, Q.Q8_0: 0.005, Q.Q4_1: 0.3}[kind]
    assert abs(loss(lm, TEXTS[1]) - loss(exact, TEXTS[1])) < worst


@pytest.mark.skipif(not SHARED.exists(), reason="the real model and text are not here")
def test_sentence_piece(tmp_path: Path) -> None:
    folder = SHARED / "stories260K-hf"
    exact = FrozenLM(str(folder), HOOK).load_()
    lm = FrozenLM(str(write_gguf(folder, tmp_path / "s.gguf")), HOOK).load_()
    # its folder drops blanks beyond one, and those behind a marker
    kept = [t for t in TEXTS[:-1] if t.split(" ") == t.split()]
    assert [ids_of(lm, t) for t in kept] == [ids_of(exact, t) for t in kept]
    assert loss(lm, "Once upon a time, Tom went out.") == loss(
        exact, "Once upon a time, Tom went out."
    )


@pytest.mark.parametrize(("changed", "said"), [
    ({"general__architecture": "gemma3"}, "holds a model of kind 'gemma3'"),
    ({"llama__block_count": 3}, "in the file but not in the model: "),
    ({"llama__block_count": 5}, "missing from the file: model.layers.4"),
    ({"llama__embedding_length": None}, "has no llama.embedding_length"),
    ({"llama__embedding_length": 130}, "130 and 4 attention heads"),
    ({"llama__attention__head_count": 0}, "and 0 attention heads"),
    ({"llama__attention__head_count": "4"}, "must be of type int"),
    ({"llama__attention__head_count_kv": 3}, "num_key_value_heads"),
    ({"llama__rope__scaling__type": "yarn"}, "stretches positions by 'yarn'"),
    ({"llama__rope__dimension_count": 16}, "parts differ in width"),
    ({"llama__expert_count": 8}, "mixture of experts"),
    ({"tokenizer__ggml__pre": "deepseek-llm"}, "cuts text as 'deepseek-llm'"),
    ({"tokenizer__ggml__pre": None}, "does not say how it cuts text"),
    ({"llama__rope__scaling__type": "linear"}, "has no llama.rope.scaling.factor"),
    ({"llama__rope__scaling__factor": float("nan")}, "stretches positions by nan"),
    ({"llama__rope__scaling__factor": 0.0}, "stretches positions by 0.0, which is no factor"),
    ({"tokenizer__ggml__model": "t5"}, "tokenizer of kind 't5'"),
    ({"tokenizer__ggml__merges": ["a"]}, "merges that are no pairs"),
    ({"tokenizer__ggml__tokens": ["a", "a"]}, "names a token twice"),
    ({"tokenizer__ggml__tokens": ["a", "b"]}, "token"),
    ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        FrozenLM(str(write_gguf(MODEL_DIR, tmp_path / "x.gguf", **changed)), HOOK).load_()
    assert said in str(refused.value)
    assert "lm.name" in str(refused.value)


def test_files_that_are_none(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:9000])
    text = tmp_path / "text.gguf"
    text.write_text("once upon a time")
    for path in (cut, text):
        with pytest.raises(InputError, match="is no whole GGUF file"):
            FrozenLM(str(path), HOOK)
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(InputError, match="whole|cut"):
        FrozenLM(str(half), HOOK).load_()
    with pytest.raises(InputError, match="no such file"):
        FrozenLM(str(tmp_path / "none.gguf"), HOOK)
    with pytest.raises(InputError, match="holds 3 GGUF files; name one"):
        FrozenLM(str(tmp_path), HOOK)


@pytest.mark.parametrize("key", ["scaling__factor", "scale_linear"])
def test_positions_stretched_without_a_kind_are_linear(key: str, tmp_path: Path) -> None:
    write_gguf(MODEL_DIR, tmp_path / "x.gguf", **{f"llama__rope__{key}": 8.0})
    rope = GGUFFile(tmp_path / "x.gguf").config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 8.0)


@pytest.mark.parametrize("key", [b"tokenizer.ggml.token_type", b"tokenizer.ggml.tokens"])
def test_a_list_longer_than_the_file_is_refused_at_once(
    file: Path, tmp_path: Path, key: bytes
) -> None:
    damaged = bytearray(file.read_bytes())
    at = damaged.index(key) + len(key) + 4 + 4  # behind its kind and the kind of its values
    damaged[at + 7] = 0x7F  # the highest byte of its length
    (tmp_path / "x.gguf").write_bytes(damaged)
    with pytest.raises(InputError, match="is no whole GGUF file"):
        GGUFFile(tmp_path / "x.gguf")


def test_positions_of_llama_3() -> None:
    """By transformers' own formula; the file has only the factors, from which it is known."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=2048, num_attention_heads=32, rope_parameters=rope)
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 5e5 ** (np.arange(0, 64, 2) / 64)
    assert np.allclose(plain / slowed.numpy(), llama_3_factors(5e5, 64, 32.0), rtol=1e-5)


LLAMA_CPP_FILE = os.environ.get("GGUF_FILE")


@pytest.mark.llama_cpp
@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP_FILE, reason="set GGUF_FILE to a file that both read")
def test_llama_cpp_reads_the_same() -> None:
    """Token ids of a few hundred texts, and logits to the noise of llama.cpp's own arithmetic."""
    llama_cpp = pytest.importorskip("llama_cpp")
    assert LLAMA_CPP_FILE
    theirs = llama_cpp.Llama(LLAMA_CPP_FILE, n_ctx=512, logits_all=True, verbose=False)
    lm = FrozenLM(LLAMA_CPP_FILE, HOOK).load_()
    for text in texts():
        want = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids_of(lm, text) == want, text
    apart = []
    for text in texts()[:300:3]:
        ids = ids_of(lm, text)[:200]
        theirs.reset()
        theirs.eval(ids)
        want = torch.tensor(np.array(theirs.scores[: len(ids)])).log_softmax(-1)
        prefix = lm.prefix(torch.tensor([ids]))
        have = lm.logits(lm.resume(prefix, prefix.acts))[0].log_softmax(-1)
        apart.append((have.exp() * (have - want)).sum(-1))
    kl = torch.cat(apart)
    print(f"{len(kl)} tokens, KL mean {kl.mean():.5f}, median {kl.median():.5f}")  # noqa: T201
    assert len(kl) > 1000
    assert kl.median() < 0.005  # it rounds activations to 8 bits, which rarely is a lot
    assert kl.mean() < 0.02


def texts() -> list[str]:
    """Sentences, code, digits, blanks and other scripts."""
    import pydoc_data.topics

    prose = [t for topic in pydoc_data.topics.topics.values() for t in topic.split("\n\n")][::20]
    odd = [
        f"{a}{blank}{b}"
        for a in ("x1", "1984", "12 345,67", "été", "Ünder", "日本語", "привет", "שלום", "🙂")
        for blank in ("", " ", "  ", "\n", "\t", " \n ", "\u00a0", "\u3000")
        for b in ("7", "seven", "!?", "don't", "")
    ]
    return [t for t in (*prose[:300], *odd, *TEXTS[:-2]) if t]
