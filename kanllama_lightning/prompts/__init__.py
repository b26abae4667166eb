"""Prompts whose next words are known, for language models of text at large and for our own."""

from pathlib import Path
from typing import Annotated, Any

from kanllama_lightning.prompts.prompt import Prompt
from kanllama_lightning.prompts.world_prompts import world_prompts
from kanllama_lightning.storage.small_files import Like, Wrong, check, from_json, read_bytes
from kanllama_lightning.types import InputError

__all__ = ["LLAMA", "Prompt", "load", "world_prompts"]

LLAMA: Path = Path(__file__).parent / "llama.jsonl"
"""The shipped set for Llama 3.2 and its like, written for this project."""

KEYS = {"category", "prompt", "answer"}
Text = Annotated[str, Like(r"(?s).*\S.*", "a text")]


def load(path: str | Path) -> list[Prompt]:
    """Read prompts from a jsonl file: one object a line with `category`, `prompt` and `answer`.

    `answer` is a text or a list of them, any of which is right.

    Raises:
        InputError: It cannot be read, or a line holds no such object; names file and line.
    """
    path = Path(path).expanduser()
    try:
        lines = read_bytes(path, "give a jsonl file, or leave it out for the shipped set").split(
            b"\n"
        )
    except InputError as e:
        raise InputError(f"prompts={e}") from e
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
            "category, prompt and answer (with the blank before it; or a list of answers)"
        )

    try:
        values = check(from_json(line.decode()), dict[str, Any])
        if set(values) != KEYS:
            raise Wrong(f"has the keys {', '.join(sorted(values)) or 'none'}")
        answers = values.pop("answer")
        given = answers if isinstance(answers, list) else [answers]
        known = check(values | {f"answer {i}": a for i, a in enumerate(given)}, dict[str, Text])
        if not given:
            raise Wrong("answer=[] must be a text, or a list of one or more")
        return Prompt(known["category"], known["prompt"], tuple(given))
    except UnicodeDecodeError as e:
        raise bad(f"is no text in UTF-8 (byte {e.start})") from e
    except Wrong as e:
        raise bad(str(e)) from e
