"""Prompts whose next words are known, for language models of text at large and for our own."""

import json
from pathlib import Path
from typing import Any

from kanllama_lightning.prompts.prompt import Prompt
from kanllama_lightning.prompts.world import world_prompts
from kanllama_lightning.types import InputError

__all__ = ["LLAMA", "Prompt", "load", "world_prompts"]

LLAMA: Path = Path(__file__).parent / "llama.jsonl"
"""The shipped set for Llama 3.2 and its like, written for this project."""


def load(path: str | Path) -> list[Prompt]:
    """Read prompts from a jsonl file: one object a line with `category`, `prompt` and `answer`.

    Raises:
        InputError: It cannot be read, or a line holds no such object; names file and line.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(
            f"prompts={str(path)!r}: cannot be read ({e.strerror}); give a jsonl file, or leave "
            "it out for the shipped set"
        ) from e
    found = [_line(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(
            f"prompts={str(path)!r}: holds no prompt; each line is an object such as "
            '{"category": "facts", "prompt": "Snow is", "answer": " white"}'
        )
    return found


def _line(path: Path, n: int, line: bytes) -> Prompt:
    def bad(what: str) -> InputError:
        return InputError(
            f"prompts={str(path)!r}, line {n}: {what}; a line is one JSON object with the strings "
            "category, prompt and answer (the answer with the blank before it)"
        )

    try:
        values: Any = json.loads(line.decode())
    except (ValueError, RecursionError) as e:
        raise bad(f"is no JSON in UTF-8 ({e})") from e
    if not isinstance(values, dict):
        raise bad(f"is no object but {type(values).__name__}")
    if set(values) != set(Prompt._fields):
        raise bad(f"has the keys {', '.join(sorted(values)) or 'none'}")
    for name in Prompt._fields:
        if not isinstance(values[name], str) or not values[name].strip():
            raise bad(f"{name}={values[name]!r} is no text")
    return Prompt(**values)
