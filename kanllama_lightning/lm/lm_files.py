"""What the files of an LM say: looked at before the libraries read them, and named if they fail."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kanllama_lightning.storage.small_files import (
    Positive,
    Within,
    Wrong,
    check,
    ordinary_size,
    read_text,
)
from kanllama_lightning.types import InputError

CONFIG = "config.json"
JSON_FILES = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "model.safetensors.index.json",
)
MOST_BYTES = 1 << 30
KEYS: Mapping[str, Any] = {
    "num_hidden_layers": Positive,
    "hidden_size": Positive,
    "intermediate_size": Positive,
    "num_attention_heads": Positive,
    "vocab_size": Positive,
    "num_key_value_heads": Positive | None,
    "head_dim": Positive | None,
    "max_position_embeddings": Positive,
    "rms_norm_eps": Annotated[float, Within(0)],
    "rope_theta": Annotated[float, Within(1)],
    "hidden_act": str,
    "rope_scaling": dict[str, Any] | None,
    "rope_parameters": dict[str, Any] | None,
}
"""What is in the configuration of a Llama, where it is there."""
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS, "su", "mrope")
"""Those that transformers knows, and older names that it still reads."""
COPY = "copy the model's own config.json again"


def check_config_file(folder: Path) -> None:
    """Refuse a configuration that is not readable, or that no model can be built from.

    Weights that are no ordinary files are refused too: reading a pipe would wait for ever.

    Raises:
        Wrong: Says what is wrong with which file or key.
    """
    check_config(_object(folder / CONFIG))
    for weights in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        try:
            ordinary_size(weights, COPY)
        except InputError as e:
            raise Wrong(str(e).removesuffix(f"; {COPY}")) from e


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse values with which a Llama cannot be built, or computes nothing.

    Raises:
        Wrong: Names key, value and what it must be.
    """
    for key, schema in KEYS.items():
        if key in config:
            check(config[key], schema, f"{CONFIG}: {key}")
    act = config.get("hidden_act", "silu")
    if act not in ACT2FN:
        raise Wrong(f"{CONFIG}: hidden_act={act!r} must be the name of a function, such as 'silu'")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise Wrong(
            f"{CONFIG}: num_key_value_heads={shared} must divide num_attention_heads={heads}"
        )
    for key in ("rope_scaling", "rope_parameters"):
        _check_rope(config.get(key) or {}, f"{CONFIG}: {key}")


def _check_rope(rope: Mapping[str, Any], where: str) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise Wrong(f"{where}.rope_type={kind!r} must be one of {', '.join(ROPE_TYPES)}")
    for key, schema in (
        ("factor", Annotated[float, Within(1)]),
        ("rope_theta", KEYS["rope_theta"]),
    ):
        if rope.get(key) is not None:
            check(rope[key], schema, f"{where}.{key}")


def broken(folder: Path) -> str | None:
    """The first file of a folder that is no JSON object, and why; None if all are."""
    for name in JSON_FILES:
        if (folder / name).exists():
            try:
                _object(folder / name)
            except Wrong as e:
                return str(e)
    return None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, COPY, MOST_BYTES))
    except InputError as e:
        raise Wrong(str(e).removesuffix(f"; {COPY}")) from e
    except (ValueError, RecursionError) as e:
        raise Wrong(f"{path.name}: is no valid JSON ({e})") from e
    if not isinstance(found, dict):
        raise Wrong(f"{path.name}: is a JSON {type(found).__name__} and no object")
    return found
