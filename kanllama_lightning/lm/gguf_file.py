"""A Llama in one GGUF file: its configuration, tokenizer and weights, as transformers has them.

Sources: the format's specification and the tensor names, row order of queries and keys, and
pre-tokenizers of https://github.com/ggml-org/llama.cpp.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from kanllama_lightning.types import InputError

SUFFIX = ".gguf"
CONVERT = (
    "give the model as a folder with config.json, tokenizer.json and model.safetensors (the hub "
    "has one of most models, from which the file was made)"
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Weights in the file, and what transformers calls them."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3_FACTORS = (8.0, 32.0)
"""By how much Llama 3.1, and 3.2, stretch their positions."""
CONTROL, OWN, BYTE = 3, 4, 6
"""Kinds of tokens: markers; words that somebody added; single bytes."""
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA_3 = (
    pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
)
PRE_TOKENIZERS: Mapping[str, tuple[pre_tokenizers.PreTokenizer, ...]] = {
    "gpt-2": (GPT_2,),
    "smollm": (DIGITS, GPT_2),
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
}
"""How text is cut before pairs are merged, by the name the file gives it."""


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the one in a folder that holds no other model.

    Raises:
        InputError: The folder holds several.
    """
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == SUFFIX and p.is_file())
    if len(found) > 1:
        raise InputError(
            f"lm.name={str(path)!r}: holds {len(found)} GGUF files; name one of them, such as "
            f"{found[0]}"
        )
    return found[0] if found else None


class _Reader(gguf.GGUFReader):
    """`gguf.GGUFReader` that refuses to read on behind the end of the file.

    That one gives what there is, which may be nothing, for as many numbers as the file says. It
    also takes parts of a memory map, several times as slow as of the plain array made of it here.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, *order: Any, **named: Any) -> Any:
        if isinstance(self.data, np.memmap):
            self.data: Any = self.data.view(np.ndarray)
        size = int(np.dtype(dtype).itemsize) * int(count)
        if not 0 <= int(offset) <= int(offset) + size <= len(self.data):
            raise ValueError(f"{size:,} bytes are said to be at {int(offset):,}, where it ends")
        return super()._get(offset, dtype, count, *order, **named)


class GGUFFile:
    """What is in a GGUF file; refused where transformers would compute something else.

    Args:
        path: The file.

    Raises:
        InputError: It holds no model of the Llama kind, or one that cannot be read whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = _Reader(path)
        except Exception as e:  # whatever bytes that are no such file lead to
            raise self._refused(f"is no whole GGUF file ({type(e).__name__}: {e})") from e
        kind = self._get("general.architecture", str)
        if kind != "llama":
            raise self._refused(
                f"holds a model of kind {kind!r}; of GGUF files only 'llama' is read: {CONVERT}"
            )
        if self._get("llama.expert_count", int, 0):
            raise self._refused(f"holds a mixture of experts, which is not read: {CONVERT}")

    @cached_property
    def config(self) -> LlamaConfig:
        """Configuration of the model.

        Raises:
            InputError: A size is missing or none, or positions are stretched in another way than
                Llama does.
        """
        n_heads = self._get("llama.attention.head_count", int)
        width = self._get("llama.embedding_length", int)
        if not (n_heads > 0 and width > 0 and width % n_heads == 0):
            raise self._refused(
                f"has width {width} and {n_heads} attention heads, which must divide it"
            )
        head_dim = self._get("llama.attention.key_length", int, width // n_heads)
        turned = self._get("llama.rope.dimension_count", int, head_dim)
        if (
            turned != head_dim
            or self._get("llama.attention.value_length", int, head_dim) != head_dim
        ):
            raise self._refused(f"has attention heads whose parts differ in width: {CONVERT}")
        return LlamaConfig(
            vocab_size=len(self._tokens),
            hidden_size=width,
            intermediate_size=self._get("llama.feed_forward_length", int),
            num_hidden_layers=self._get("llama.block_count", int),
            num_attention_heads=n_heads,
            num_key_value_heads=self._get("llama.attention.head_count_kv", int, n_heads),
            head_dim=head_dim,
            max_position_embeddings=self._get("llama.context_length", int),
            rms_norm_eps=self._get("llama.attention.layer_norm_rms_epsilon", float),
            rope_parameters=self._rope(head_dim),
            tie_word_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            bos_token_id=self._special("bos"),
            eos_token_id=self._special("eos"),
            pad_token_id=None,
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Tokenizer of the model, markers included.

        Raises:
            InputError: It is of a kind that is not read.
        """
        kind = self._get("tokenizer.ggml.model", str)
        if kind == "gpt2":
            made = self._byte_level()
        elif kind == "llama":
            made = self._sentence_piece()
        else:
            raise self._refused(
                f"has a tokenizer of kind {kind!r}; 'gpt2' and 'llama' are read: {CONVERT}"
            )
        kinds = self._list("tokenizer.ggml.token_type", int, [1] * len(self._tokens))
        for special in (True, False):
            made.add_tokens([
                AddedToken(text, normalized=False, special=special)
                for text, of in zip(self._tokens, kinds, strict=True)
                if of == (CONTROL if special else OWN)
            ])  # fmt: skip
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        named = {f"{role}_token": self._special(said) for role, said in roles.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            clean_up_tokenization_spaces=False,
            **{role: self._tokens[i] for role, i in named.items() if i is not None},
        )

    def weights(self) -> dict[str, Tensor]:
        """All weights in fp32 under transformers' names, queries and keys in its order of rows.

        Raises:
            InputError: One is in a number format that cannot be read.
        """
        found = {}
        for name, tensor in self._tensors.items():
            if name == ROPE_FACTORS:
                continue
            try:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            except Exception as e:  # formats without a reader, and parts that are cut off
                raise self._refused(
                    f"{name} is in the format {tensor.tensor_type.name}, which is not read "
                    f"({e}): {CONVERT}"
                ) from e
            shape = tuple(int(n) for n in reversed(tensor.shape))
            weight = torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))
            found[_name(name)] = self._rows_as_halves(name, weight)
        return found

    def _rows_as_halves(self, name: str, weight: Tensor) -> Tensor:
        """Rows of queries and keys: the file has pairs that are turned together side by side."""
        heads = {
            "attn_q": self.config.num_attention_heads,
            "attn_k": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None:
            return weight
        pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape).contiguous()

    def _byte_level(self) -> Tokenizer:
        if self._reader.get_field("tokenizer.ggml.pre") is None:
            raise self._refused(
                "does not say how it cuts text (tokenizer.ggml.pre), as files of before May 2024: "
                f"convert the model again with a newer llama.cpp, or {CONVERT}"
            )
        pre = self._get("tokenizer.ggml.pre", str)
        if pre not in PRE_TOKENIZERS:
            raise self._refused(
                f"cuts text as {pre!r}; read are {', '.join(map(repr, PRE_TOKENIZERS))}: {CONVERT}"
            )
        pairs = [tuple(m.split(" ")) for m in self._list("tokenizer.ggml.merges", str)]
        if not all(len(pair) == 2 for pair in pairs):
            raise self._refused("has merges that are no pairs: the file is damaged")
        vocabulary = {text: i for i, text in enumerate(self._tokens)}
        ignore = PRE_TOKENIZERS[pre] is LLAMA_3
        made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignore))
        made.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
        made.decoder = decoders.ByteLevel()
        return made

    def _sentence_piece(self) -> Tokenizer:
        """Pairs are merged by the score of what they make, ties by the place of their parts."""
        vocabulary = {text: i for i, text in enumerate(self._tokens)}
        scores = self._list("tokenizer.ggml.scores", float)
        if len(scores) != len(self._tokens):
            raise self._refused(f"has {len(scores)} scores of {len(self._tokens)} tokens")
        kinds = self._list("tokenizer.ggml.token_type", int, [1] * len(self._tokens))
        pairs = [
            (-scores[i], vocabulary[text[:at]], vocabulary[text[at:]], text[:at], text[at:])
            for text, i in vocabulary.items()
            if kinds[i] not in (CONTROL, OWN, BYTE)
            for at in range(1, len(text))
            if text[:at] in vocabulary and text[at:] in vocabulary
        ]
        unknown = self._special("unknown")
        made = Tokenizer(models.BPE(
            vocabulary, [pair[3:] for pair in sorted(pairs)], fuse_unk=True, byte_fallback=True,
            unk_token=None if unknown is None else self._tokens[unknown],
        ))  # fmt: skip
        blank = normalizers.Replace(" ", "▁")
        first = self._get("tokenizer.ggml.add_space_prefix", bool, True)
        made.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), blank]) if first else blank
        )
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if first:
            parts.append(decoders.Strip(" ", 1, 0))
        made.decoder = decoders.Sequence(parts)
        return made

    def _rope(self, head_dim: int) -> dict[str, Any]:
        """How positions turn queries and keys; those of Llama 3 are known by their factors."""
        theta = self._get("llama.rope.freq_base", float, 10_000.0)
        # llama.cpp's rules: a factor without a kind is linear, and once had another key
        kind = self._get("llama.rope.scaling.type", str, "")
        key, once = "llama.rope.scaling.factor", "llama.rope.scale_linear"
        if self._reader.get_field(key) is None and self._reader.get_field(once) is not None:
            key = once
        factor = self._get(key, float, None if kind == "linear" else 1.0)
        if kind == "linear" or (kind == "" and factor != 1.0):
            if not (math.isfinite(factor) and factor > 0):
                raise self._refused(f"stretches positions by {factor}, which is no factor")
            if ROPE_FACTORS in self._tensors:
                raise self._refused(f"stretches positions in two ways at once: {CONVERT}")
            return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        if kind not in ("", "none"):
            raise self._refused(f"stretches positions by {kind!r}, which is not read: {CONVERT}")
        if ROPE_FACTORS not in self._tensors:
            return {"rope_type": "default", "rope_theta": theta}
        have = self._tensors[ROPE_FACTORS].data.astype(np.float64)
        for factor in LLAMA_3_FACTORS:
            if have.shape == (head_dim // 2,) and np.allclose(
                have, llama_3_factors(theta, head_dim, factor), rtol=1e-4
            ):
                return {
                    "rope_type": "llama3", "rope_theta": theta, "factor": factor,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }  # fmt: skip
        raise self._refused(f"stretches positions by factors that are not Llama 3's: {CONVERT}")

    def _refused(self, why: str) -> InputError:
        return InputError(f"lm.name: {self.path} {why}")

    def _special(self, role: str) -> int | None:
        i = self._get(f"tokenizer.ggml.{role}_token_id", int, -1)
        return i if 0 <= i < len(self._tokens) else None

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    @cached_property
    def _tokens(self) -> list[str]:
        tokens = self._list("tokenizer.ggml.tokens", str)
        if len(set(tokens)) != len(tokens):
            raise self._refused("tokenizer.ggml.tokens names a token twice")
        return tokens

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the file; refused if of another kind, or missing without a default."""
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise self._refused(f"has no {key}, which a Llama needs")
            return default
        value = field.contents()
        if type(value) is not kind:
            raise self._refused(
                f"{key}={str(value)[:80]!r} must be of type {kind.__name__}: {CONVERT}"
            )
        return value

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """A list of the file, one value for each token or merge."""
        values = self._get(key, list, default)
        if not all(type(value) is kind for value in values):
            raise self._refused(f"{key} must be a list of {kind.__name__}")
        return values


def llama_3_factors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """By how much Llama 3 slows each frequency of its positions.

    Args:
        theta: Base of the frequencies.
        head_dim: Width of an attention head.
        factor: The most it slows one.

    Returns:
        `[head_dim / 2]`, from 1 (fast ones) to `factor` (slow ones).
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = 8192.0, 1.0, 4.0
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _name(name: str) -> str:
    """What transformers calls a weight; the file's own name if it has no such thing."""
    *place, part, kind = ["", *name.split(".")] if "." in name else ["", name, ""]
    if part not in NAMES:
        return name
    known = f"{NAMES[part]}.{kind}"
    return (
        f"model.layers.{place[2]}.{known}" if place[1:2] == ["blk"] and len(place) == 3 else known
    )
