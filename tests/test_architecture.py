"""Who may import whom (CONTRIBUTING.md): the arrows, read from the code."""

import ast
from pathlib import Path

import pytest

from kanllama_lightning import heads

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    p.relative_to(ROOT)
    for folder in ("kanllama_lightning", "callbacks")
    for p in (ROOT / folder).rglob("*.py")
]
HEADS = "kanllama_lightning.heads"
READING = {f"kanllama_lightning.{name}" for name in ("types", "files", "small_files", "named")}
"""What may be used wherever a saved file is read."""
PARTS = {
    f"{HEADS}.{name}"
    for name in (
        "base",
        "sae",
        "encoders",
        "hidden_units",
        "selections",
        "penalties",
        "controller",
        "decoders",
        "reach",
        "kan_linear",
    )
}
"""What heads are put together from; heads import no other head."""


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


def ours(file: Path) -> set[str]:
    """Modules of the project that a file imports."""
    modules = {".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in FILES}
    return imports(file) & modules


@pytest.mark.parametrize("file", FILES, ids=str)
def test_arrows(file: Path) -> None:
    name = ".".join(file.with_suffix("").parts)
    used = ours(file)
    assert "tests" not in packages(file)
    if name in ("kanllama_lightning.types", "kanllama_lightning.files"):
        assert not used
    if ".functional." in name:
        assert packages(file) <= {
            "torch",
            "jaxtyping",
            "typing",
            "collections",
            "contextlib",
            "contextvars",
            "math",
            "functools",
            "itertools",
            "logging",
            "warnings",
            "kanllama_lightning",
        }
        assert all(f"{u}.".startswith("kanllama_lightning.functional.") for u in used)
    if name.startswith(f"{HEADS}.") and file.name != "__init__.py":
        assert not packages(file) & {"lightning", "transformers", "datasets", "wandb"}
        allowed = PARTS | {HEADS, *READING}
        assert all(u in allowed or ".functional" in u for u in used if u != "kanllama_lightning")
    if name.startswith("kanllama_lightning."):
        assert "callbacks" not in packages(file), (
            "YAML and train.py name callbacks, the library does not"
        )
    if ".plan." not in name and name != "kanllama_lightning.cli":
        assert not any("lightning.plan." in u for u in used), (
            "only the command line names the planner"
        )
    if name in ("kanllama_lightning.cache.reading", "kanllama_lightning.cache.shards"):
        assert used <= {"kanllama_lightning.cache.shards", *READING}, (
            "reading a cache needs neither LM nor text"
        )
    if ".reports." not in name:
        assert not any(".reports" in u for u in used), "only evaluate.py names reports"
    if name.startswith("callbacks."):
        bad = {"kanllama_lightning.module", "kanllama_lightning.cli", "kanllama_lightning.tokens"}
        assert not used & bad
    if ".embedded." in name and not name.endswith("build"):
        assert not packages(file) & {"torch", "transformers"}, "the story world is plain Python"


def test_a_head_inherits_from_its_kind_alone() -> None:
    """From what a run trains, what a head is, what it is put together by, and no more."""
    for kind in (getattr(heads, name) for name in heads.__all__):
        ours = [c.__name__ for c in kind.__mro__ if c.__module__.startswith("kanllama_lightning")]
        assert len(ours) <= 4, ours


def test_no_string_ladder_over_heads() -> None:
    """Heads are chosen by class path; no code compares a head's name."""
    for file in FILES:
        text = (ROOT / file).read_text()
        assert '== "KANEncoder"' not in text
        assert "architecture ==" not in text
