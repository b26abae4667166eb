"""Writes a folder of a Llama as a GGUF file, as llama.cpp's converter would."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

from kanllama_lightning.lm.gguf_file import NAMES

Q = gguf.GGMLQuantizationType


def write_gguf(folder: Path, file: Path, format: Any = Q.F32, **changed: Any) -> Path:
    """The model of a folder in one file.

    Args:
        folder: With config.json, tokenizer.json and model.safetensors.
        file: Is written.
        format: Number format of the matrices.
        changed: Keys of the file, `.` written as `__`, with other values; None leaves one out.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(None, "llama")
    for key, value in (_settings(config) | _tokenizer(folder) | _named(changed)).items():
        if value is not None:
            _add(writer, key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        array = tensor.float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, key in heads.items():
            if part in name:  # two halves, turned together, become pairs
                halves = array.reshape(config[key], 2, -1, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        kind = format if array.ndim > 1 else Q.F32
        writer.add_tensor(_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _named(changed: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changed.items()}


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.freq_base": float(
            (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 1e4)
        ),
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }


def _tokenizer(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "tokenizer.json").read_text())
    model = about["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in about["added_tokens"] if token["special"]}
    bytewise = {f"<0x{i:02X}>" for i in range(256)}
    found = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token in special else 6 if token in bytewise else 1 for token in tokens
        ],
    }
    if not model["byte_fallback"]:
        merges = [" ".join(pair) for pair in model["merges"]]
        pre = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}
        return found | pre | {"tokenizer.ggml.merges": merges}
    made = {"".join(pair): -float(i) for i, pair in reversed(list(enumerate(model["merges"])))}
    return found | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [made.get(token, -1e6) for token in tokens],
        "tokenizer.ggml.unknown_token_id": model["vocab"][model["unk_token"]],
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _name(name: str) -> str:
    known = {theirs: ours for ours, theirs in NAMES.items()}
    part, _, kind = name.rpartition(".")
    if part.startswith("model.layers."):
        layer, _, inner = part.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{known[inner]}.{kind}"
    return f"{known[part]}.{kind}"
