"""Who lives where and may import whom (CONTRIBUTING.md): the arrows, read from the code."""

import ast
from collections import Counter
from pathlib import Path

from kanllama_lightning import heads

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "kanllama_lightning"
FILES = {  # by module; callbacks lie beside the package, which has a link to them
    ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
    for root, folder in ((ROOT, PACKAGE), (ROOT / PACKAGE, f"{PACKAGE}/callbacks"))
    for path in (ROOT / folder).rglob("*.py")
}
FILES = {m if m.startswith(PACKAGE) else f"{PACKAGE}.{m}": path for m, path in FILES.items()}
ROOMS = (
    "errors",
    "functional",
    "types",
    "storage",
    "console",
    "embedded",
    "heads",
    "lm",
    "exchange",
    "corpus",
    "data",
    "runs",
    "measures",
    "training",
    "plan",
    "pages",
    "prompts",
    "dashboard",
    "judge",
    "comparison",
    "reports",
    "interactive",
    "callbacks",
    "cli",
)
"""The rooms of the package, each of which imports from those before it alone."""
PARTS = {
    f"{PACKAGE}.heads.{name}"
    for name in (
        "head",
        "sae",
        "encoders",
        "hidden_units",
        "selections",
        "penalties",
        "controller",
        "decoders",
        "reach",
        "bends",
        "kan_linear",
    )
}
"""What heads are put together from; heads import no other head."""
BARE = {
    "functional": "torch jaxtyping typing collections contextlib contextvars math functools "
    "inspect itertools logging warnings triton kanllama_lightning",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # a package that is only on the way to a module of it does not count
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= FILES.keys() else {node.module}
    return found


IMPORTS = {module: imports(path) for module, path in FILES.items()}
OURS = {module: used & FILES.keys() - {module} for module, used in IMPORTS.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_root_holds_rooms() -> None:
    modules = [path.name for path in (ROOT / PACKAGE).glob("*.py")]
    assert sorted(modules) == ["__init__.py", "errors.py", "types.py"]
    assert {room(module) for module in FILES} == {"", *ROOMS}


def test_no_arrow_goes_up() -> None:
    up = [
        f"{module} imports {used}"
        for module in FILES
        for used in OURS[module]
        if room(used) and room(module) and ROOMS.index(room(used)) > ROOMS.index(room(module))
    ]
    assert not up
    assert not [m for m, used in IMPORTS.items() if any(u.startswith("tests") for u in used)]


def test_no_circle() -> None:
    left = {module: set(used) for module, used in OURS.items()}
    while free := {module for module, used in left.items() if not used & left.keys()}:
        left = {module: used for module, used in left.items() if module not in free}
    # the door of a room leads to the modules in it, which may name the room
    assert not left, left


def test_no_name_stands_twice() -> None:
    modules = Counter(module.rpartition(".")[2] for module in FILES)
    classes = Counter(
        node.name
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    twice = [name for count in (modules, classes) for name, n in count.items() if n > 1]
    assert not twice


def test_what_rooms_do_without() -> None:
    for module, used in IMPORTS.items():
        libraries = {name.split(".")[0] for name in used}
        if room(module) == "functional":
            assert libraries <= set(BARE["functional"].split()), module
        if room(module) == "heads":
            assert not libraries & {"lightning", "transformers", "datasets", "wandb"}, module
        if room(module) == "embedded" and not module.endswith(".build"):
            assert not libraries & {"torch", "transformers"}, "the story world is plain Python"
        if room(module) == "data" and module.endswith(("shards", "cached_activations")):
            assert {room(u) for u in OURS[module]} <= {"types", "storage", "data"}, (
                "reading a cache needs neither LM nor text"
            )
        if module not in (f"{PACKAGE}.heads", *PARTS) and room(module) == "heads":
            heads_used = {u for u in OURS[module] if room(u) == "heads"}
            assert heads_used <= PARTS, f"{module}: a head imports no other head"


def test_a_head_inherits_from_its_kind_alone() -> None:
    """From what a run trains, what a head is, what it is put together by, and no more."""
    for kind in (getattr(heads, name) for name in heads.__all__):
        ours = [c.__name__ for c in kind.__mro__ if c.__module__.startswith(PACKAGE)]
        assert len(ours) <= 4, ours


def test_no_string_ladder_over_heads() -> None:
    """Heads are chosen by class path; no code compares a head's name."""
    for path in FILES.values():
        text = path.read_text()
        assert '== "KANEncoder"' not in text
        assert "architecture ==" not in text
