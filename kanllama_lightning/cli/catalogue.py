"""What options there are, read from the sources of the classes that take them.

Nothing of size is imported, so that help and a misspelt option are answered at once.
`tests/test_help.py` checks that the command's own parser has the same options.
"""

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Option(NamedTuple):
    """An option of the command line."""

    name: str
    """Without the leading dashes."""
    help: str
    default: str = ""
    """As it would be typed; empty if it has none, or if `help` says it."""
    kind: str = ""
    """What its value is, such as `N`."""
    type: str = ""
    """What it is in Python, as annotated."""


RUN = {
    "config": "YAML file with any of these options; may be given several times, later ones count.",
    "seed_everything": "Seed of the head, of the order of the text and of the shuffling.",
    "head_seed": "Seed of the head's start, where it is not that of the run.",
    "run": "Folder of this run (default: a new one).",
    "runs_dir": "Folder that new run folders are made in.",
    "ckpt_path": "What to go on from: a run by folder or name, one of its checkpoints, or `last`, "
    "the newest unfinished run of the same configuration.",
    "allow": "Modules whose classes the config.yaml of a run folder may name, beside what is "
    "shipped; importing a module runs its code.",
    "print_config": "Print the configuration that the other options make, and end.",
}
"""Options of `train.py` that are of no class."""
RUN_DEFAULTS = {"seed_everything": "0", "runs_dir": "runs"}
RUN_TYPES = {
    "head_seed": "int | None",
    "run": "str | None",
    "runs_dir": "str",
    "ckpt_path": "str | None",
}
UNSHOWN = ("help", "weights_only", "verbose")
"""Options of Lightning's commands that mean nothing here, or nothing worth a line."""
TRAINER = {
    "accelerator": "cpu, gpu, or auto.",
    "devices": "How many, a list of them, or auto.",
    "num_nodes": "Machines that train together.",
    "strategy": "How several devices share the work; configs/multi_gpu.yaml sets it.",
    "precision": "Number format of a step: 32-true, or bf16-mixed.",
    "max_steps": "Stop after so many steps, before the budget is used up.",
    "max_time": "Stop after DD:HH:MM:SS; the run can be continued.",
    "val_check_interval": "Steps between two validations (default: a tenth of the run, or more "
    "where all of them would take over 5 % of the time).",
    "log_every_n_steps": "Steps between two rows of the training log.",
    "logger": "Where figures go beside the CSV files: a class, or false.",
    "callbacks": "Further callbacks, or settings of those that every run has.",
    "gradient_clip_val": "Clip gradients to this norm, in the place of clip_ratio.",
    "gradient_clip_algorithm": "norm or value.",
    "deterministic": "Only algorithms that give the same numbers every time (GPU).",
    "benchmark": "Let cuDNN choose its algorithms by trying them.",
    "detect_anomaly": "Say which operation made a NaN; slow.",
    "profiler": "Where the time of steps goes: simple, advanced or pytorch.",
}
"""Options of Lightning's Trainer that mean something here."""
OPTIMIZER = {
    "lr": "Peak learning rate; it warms up to it and falls to zero at the end.",
    "betas": "Decay of the running mean and mean square of gradients, such as [0.9, 0.999].",
    "eps": "Added to the root of the mean square.",
    "weight_decay": "Pull of the weights towards 0.",
    "fused": "Update all weights in one kernel.",
}
"""What is most often set of the optimizer, which may be any class of torch's kind."""
OPTIMIZER_TYPES = {
    "lr": "float",
    "betas": "list[float]",
    "eps": "float",
    "weight_decay": "float",
    "fused": "bool",
}
LINKED = ("lm", "tokenizer", "seed", "d_model", "transcoder")
"""Arguments that follow from other options."""
FOLLOWS = ("d_model", "transcoder")
"""Arguments of a head that follow from the LM."""
SUBCLASSES = ("class_path", "init_args", "dict_kwargs", "help")
"""What can be said of an option whose value is a class."""


@cache
def _classes(path: Path) -> Mapping[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def _all_in(folder: str) -> Mapping[str, ast.ClassDef]:
    files = sorted((ROOT / folder).glob("*.py"))
    return {name: node for file in files for name, node in _classes(file).items()}


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def described(node: ast.ClassDef) -> dict[str, str]:
    """What the docstring of a class says of its arguments."""
    lines = (ast.get_docstring(node) or "").partition("Args:\n")[2].split("\n")
    said: dict[str, str] = {}
    name = ""
    for line in lines:
        begins = re.match(r"    (\w+): (.*)", line)
        if begins:
            name, said[begins[1]] = begins[1], begins[2]
        elif line.startswith("        ") and name:
            said[name] += " " + line.strip()
        elif line.strip():
            break
    return said


def _arguments(
    node: ast.ClassDef, known: Mapping[str, ast.ClassDef], prefix: str
) -> dict[str, Option]:
    """Arguments of a class by name; what it hands on (`**shared`) are those of its parents."""
    init = next(
        (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
    )
    parents = [known[base] for base in _bases(node) if base in known]
    if init is None:
        inherited = (_arguments(parent, known, prefix) for parent in parents)
        return next((found for found in inherited if found), {})
    said, args = described(node), init.args
    given = [*args.posonlyargs, *args.args][1:]
    blanks = [None] * (len(given) - len(args.defaults))
    pairs = [*zip(given, [*blanks, *args.defaults], strict=True)]
    pairs += zip(args.kwonlyargs, args.kw_defaults, strict=True)
    found = {
        arg.arg: Option(
            prefix + arg.arg,
            said.get(arg.arg, ""),
            _shown(default),
            "" if arg.annotation is None else _kind(ast.unparse(arg.annotation)),
            "" if arg.annotation is None else ast.unparse(arg.annotation),
        )
        for arg, default in pairs
    }
    if args.kwarg is not None:
        for parent in parents:
            found |= {k: v for k, v in _arguments(parent, known, prefix).items() if k not in found}
    return found


def _shown(default: ast.expr | None) -> str:
    if default is None:
        return ""
    text = ast.unparse(default)
    if re.fullmatch(r"\d{5,}", text):
        return f"{int(text):_}"
    if text in ("True", "False"):
        return text.lower()
    return "" if text == "None" or re.fullmatch(r"[A-Z][A-Z_]+", text) else text.strip("'\"")


def _kind(annotation: str) -> str:
    kinds = [part.strip() for part in annotation.replace(" | None", "").split("|")]
    names = {"str": "TEXT", "int": "N", "float": "X", "bool": "true|false", "Path": "PATH"}
    return "|".join(names.get(kind, "VALUE") for kind in kinds) if len(kinds) < 3 else "VALUE"


def arguments(file: str, name: str, prefix: str) -> list[Option]:
    """Options that a class of a module takes, such as those of `FrozenLM`, under `lm.`.

    Args:
        file: File of the module, in the package.
        name: Name of the class.
        prefix: What its options begin with.
    """
    known = _classes(ROOT / file)
    return [o for k, o in _arguments(known[name], known, prefix).items() if k not in LINKED]


def heads() -> dict[str, str]:
    """Heads that a config may name, with the first line of what they say of themselves."""
    known = _all_in("heads")

    def is_head(name: str) -> bool:
        return name == "SAEHead" or any(is_head(b) for b in _bases(known[name]) if b in known)

    def shipped(node: ast.ClassDef) -> bool:
        return not any(k.arg == "shipped" for k in node.keywords)

    return {
        name: (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
        for name, node in sorted(known.items())
        if name != "SAEHead" and is_head(name) and shipped(node) and not name.startswith("_")
    }


def head_options(name: str) -> list[Option]:
    """Options of one head."""
    known = _all_in("heads")
    found = _arguments(known[name], known, "model.head.")
    return [option for key, option in found.items() if key not in FOLLOWS]


def all_head_options() -> list[Option]:
    """Options of any head: the shared ones first, then those that only some heads have."""
    kinds = {name: {o.name: o for o in head_options(name)} for name in heads()}
    shared = [o for o in head_options("SAE") if o.name != "model.head.seed"]
    own: dict[str, list[str]] = {}
    options: dict[str, Option] = {}
    for name, mine in kinds.items():
        for option in mine.values():
            if option.name not in {o.name for o in shared} | {"model.head.seed"}:
                own.setdefault(option.name, []).append(name)
                known = options.setdefault(option.name, option)
                if known.default != option.default:  # each head's own help says its own
                    options[option.name] = known._replace(default="")
    told = [
        options[key]._replace(help=f"{options[key].help} For {', '.join(names)}.".strip())
        for key, names in sorted(own.items())
    ]
    side_by_side = arguments("training/side_by_side.py", "SideBySide", "model.head.")
    names = {o.name for o in [*shared, *told]}
    return [*shared, *told, *(o for o in side_by_side if o.name not in names)]


@cache
def trainer_arguments() -> Mapping[str, str]:
    """Arguments of Lightning's Trainer, which is not imported, with their annotations."""
    found = find_spec("lightning")
    assert found is not None
    assert found.submodule_search_locations
    file = Path(found.submodule_search_locations[0]) / "pytorch" / "trainer" / "trainer.py"
    init = next(
        n
        for n in _classes(file)["Trainer"].body
        if isinstance(n, ast.FunctionDef) and n.name == "__init__"
    )
    return {
        arg.arg: "" if arg.annotation is None else ast.unparse(arg.annotation)
        for arg in [*init.args.args, *init.args.kwonlyargs]
        if arg.arg != "self"
    }


@cache
def optimizers() -> Mapping[str, str]:
    """Optimizers by their names: torch's, which is not imported, and the one of this package."""
    found = find_spec("torch")
    assert found is not None
    assert found.submodule_search_locations
    folder = Path(found.submodule_search_locations[0]) / "optim"
    torch = {
        name: f"torch.optim.{name}"
        for file in sorted(folder.glob("[a-z]*.py"))
        for name, node in _classes(file).items()
        if "Optimizer" in _bases(node) or name == "AdamW"
    }
    return torch | {"Adam": "kanllama_lightning.training.optim.Adam"}


def reports() -> dict[str, tuple[bool, list[Option]]]:
    """Reports by name: whether one is made only when it is named, and its options."""
    found: dict[str, tuple[bool, list[Option]]] = {}
    for file in sorted((ROOT / "reports").glob("*_report.py")):
        for node in _classes(file).values():
            if "Report" not in _bases(node):
                continue
            values = {
                target.id: statement.value.value
                for statement in node.body
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
                for target in statement.targets
                if isinstance(target, ast.Name)
            }
            name = str(values["name"])
            options = _arguments(node, {}, f"{name}.")
            found[name] = (bool(values.get("on_request")), list(options.values()))
    return found


def fit_groups() -> dict[str, list[Option]]:
    """Options of `fit`, `validate` and `plan`, by what they are about."""
    run = [
        Option(name, text, RUN_DEFAULTS.get(name, ""), type=RUN_TYPES.get(name, ""))
        for name, text in RUN.items()
    ]
    module = arguments("training/module.py", "SAEModule", "model.")
    trainer = [Option(f"trainer.{name}", text) for name, text in TRAINER.items()]
    optimizer = [
        Option(f"model.optimizer.{k}", text, type=OPTIMIZER_TYPES[k])
        for k, text in OPTIMIZER.items()
    ]
    return {
        "the run": run,
        "the language model": arguments("lm/frozen.py", "FrozenLM", "lm."),
        "the text": arguments("data/token_data.py", "TokenData", "data."),
        "training": module,
        "the head": all_head_options(),
        "the optimizer": optimizer,
        "the buffer of activations": arguments("data/buffer.py", "ShuffleBuffer", "model.buffer."),
        "devices, precision, how often (Lightning's Trainer)": trainer,
    }


def wrong_option(args: Iterable[str]) -> str | None:
    """The first option of `fit` that there is not; None if all are known, as far as can be said.

    What is said of classes other than heads is left to the parser.
    """
    options = [o.name for group in fit_groups().values() for o in group]
    trainer = [f"trainer.{name}" for name in trainer_arguments()]
    linked = [f"{group}.{name}" for group in ("lm", "data", "model") for name in LINKED]
    firsts = {*RUN, *UNSHOWN, "c", "lm", "data", "model", "trainer", "optimizer"}
    seconds = {".".join(name.split(".")[:2]) for name in [*options, *trainer, *linked]}
    in_head = {name.split(".")[2] for name in options if name.startswith("model.head.")}
    for arg in args:
        if not arg.startswith("--") or arg == "--":
            continue
        name = arg[2:].partition("=")[0].removesuffix("+")
        parts = name.split(".")
        known = parts[0] in firsts and (len(parts) == 1 or ".".join(parts[:2]) in seconds)
        if known and len(parts) > 2 and parts[:2] == ["model", "head"]:
            inner = parts[3:] if parts[2] == "init_args" else parts[2:]
            known = not inner or inner[0] in {*in_head, *SUBCLASSES, *LINKED}
        if not known:
            return name
    return None
