"""The options of `evaluate.py`, for its parser and for its help."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from kanllama_lightning.cli import synonyms
from kanllama_lightning.cli.catalogue import Option, reports
from kanllama_lightning.cli.command_line import spelt
from kanllama_lightning.cli.help import laid_out, no_such_option
from kanllama_lightning.cli.kinds import NotUnderstood, number, typed


class Setting(NamedTuple):
    """An option of a command, as its parser takes it."""

    name: str
    help: str
    type: Any = str
    default: Any = None
    many: bool = False
    """Whether several values follow."""
    required: bool = False


TEXT = (
    Setting(
        "documents", "Documents of each set (default: 2,000, or as many as there are).", int | None
    ),
    Setting(
        "text",
        "Files, folders or hub datasets to evaluate on (default: the run's held-out text and "
        "validation sets).",
        many=True,
    ),
    Setting("ctx_len", "With --text: tokens per row (default: the run's).", int | None),
    Setting(
        "batch_seqs",
        "Rows that the LM runs at once (default: 16; fewer of a large LM on a CPU).",
        int | None,
    ),
    Setting("wandb", "Send tables and figures to the W&B run too, if the run had one.", bool, True),
    Setting(
        "png",
        "Write figures as PNG too; needs the extra `png` and Chrome or Chromium.",
        bool,
        False,
    ),
)
MACHINE = (
    Setting("runs_dir", "Folder in which `last` and names of runs are looked for.", str, "runs"),
    Setting(
        "allow",
        "Modules whose classes a run's files may name, beside those shipped here; importing a "
        "module runs its code.",
        default=[],
        many=True,
    ),
    Setting("device", "cpu, cuda, or auto.", str, "auto"),
    Setting(
        "dtype",
        "Number format of the LM; bfloat16 blurs losses by up to 1 in 100.",
        Literal["float32", "bfloat16"],
        "float32",
    ),
    Setting(
        "lm.name",
        "LM: hub name, folder, or `embedded` (default: the one it was trained on).",
        str | None,
    ),
    Setting("lm.revision", "Commit, tag or branch of a hub LM.", str | None),
    Setting(
        "lm.bos",
        "Token that every row begins with, by its text or id (default: the run's).",
        int | str | None,
    ),
    Setting(
        "lm.hook_point",
        "Where the activations are (default: where the head was trained).",
        str | None,
    ),
    Setting(
        "lm.input_point",
        "Where a transcoder reads (default: where it was trained).",
        str | None,
    ),
    Setting(
        "lm.untrained",
        "Declares random weights: waives the checks that only a trained LM passes.",
        bool,
        False,
    ),
)
REPORT = (
    Setting(
        "reports",
        "Which reports to make, by name (default: all that apply, but those that ask a language "
        "model).",
        many=True,
    ),
    Setting("again", "Make anew what is there already.", bool, False),
)
COMPARE = (
    Setting("out", "Folder that the comparison goes to.", str, "comparison"),
    Setting(
        "tolerance",
        "Share by which L0 may differ for it to count as matched; up to a tenth, differences "
        "are corrected along the slope that other sparsities of a head give (default: 0.02).",
        float | None,
    ),
    Setting("force", "Compare what is not like for like all the same, and say so.", bool, False),
)
TRY = (
    Setting("text", "What the LM reads.", required=True),
    Setting("n_new", "Tokens it writes on from there.", int, 20),
    Setting("top", "Likeliest next tokens to show.", int, 5),
    Setting("latents", "Latents to show per token.", int, 5),
    Setting(
        "steer",
        "LATENT=STRENGTH: also run with the latent's activation set to STRENGTH on every "
        "token (head's units, as shown; 0 ablates it), the error of the reconstruction left in "
        "place.",
        many=True,
    ),
    Setting("out", "HTML file (default: RUN/eval/try.html).", str | None),
)
EXPORT = (
    Setting(
        "to",
        "Whose format: saelens (any head; curved ones for our plug-in), sparsify (TopK alone), "
        "dictionary_learning (linear heads), or neuronpedia (pages of the latents).",
        Literal["saelens", "sparsify", "dictionary_learning", "neuronpedia"],
        required=True,
    ),
    Setting("out", "Folder that the export goes to.", required=True),
    Setting(
        "tokens",
        "Tokens that it is read back and compared on (default: 8,192); to neuronpedia: tokens "
        "looked at, in whole rows (default: all of the first set).",
        int | None,
    ),
    Setting(
        "model_id",
        "To neuronpedia: its name of the LM (default: made of the LM's, such as llama3.1-8b).",
        str | None,
    ),
    Setting(
        "sae_set",
        "To neuronpedia: name of the source set (default: place, head and number of latents, "
        "such as mlp-kanencoder-512).",
        str | None,
    ),
    *(setting for setting in TEXT if setting.name in ("text", "ctx_len", "batch_seqs")),
)
PUBLISH = (
    Setting("dry_run", "List what would be sent, and send nothing.", bool, False),
    Setting(
        "license",
        "Licence of the head, by its name on the hub, such as mit; its card says so.",
        str | None,
    ),
    Setting("private", "Make the repository a private one, if it is not there yet.", bool, False),
)
LIST = (Setting("runs_dir", "Folder that the runs lie in.", str, "runs"),)
SETTINGS = {
    "list": LIST,
    "report": (*REPORT, *TEXT, *MACHINE),
    "compare": (*COMPARE, *TEXT, *MACHINE),
    "try": (*TRY, *MACHINE),
    "export": (*EXPORT, *MACHINE),
    "publish": (*PUBLISH, *(s for s in MACHINE if s.name in ("runs_dir", "allow"))),
}
PLACES = {
    "report": "Finished runs by folder, name or the beginning of a name, or folders of saved "
    "heads, also of SAELens, sparsify and dictionary_learning; `last` is the run finished last.",
    "compare": "Finished runs, or LABEL=RUN; a run of heads side by side is all of "
    "them; several seeds of a head are taken together.",
    "try": "A finished run by folder or name, or the folder of a saved head; or `last`.",
    "export": "A finished run by folder or name, or the folder of a saved head; or `last`.",
    "publish": "A finished run by folder or name, or the folder of a saved head; or `last`.",
}
"""What each command is given first."""
ONE_RUN = ("try", "export", "publish")
"""Commands that take one run."""
REPOSITORY = "Where to on the Hugging Face hub: OWNER/NAME; made if it is not there."
ABOUT = {
    "list": "Lists runs, the newest first: state, heads, hook point, L0, FVU, delta CE (nats per "
    "token), tokens trained on, date.",
    "report": "Writes the record of finished runs, or of saved heads, into their eval/ folders. "
    "What is there is not made again.",
    "compare": "Compares finished runs, like for like; what is missing of their records is made "
    "first.",
    "try": "Runs the LM with and without its head on a text, and shows which latents fire.",
    "export": "Writes a head into a folder of SAELens, sparsify or dictionary_learning, reads it "
    "back, and says how far the two differ on activations; or writes pages of its latents for "
    "Neuronpedia.",
    "publish": "Puts a head on the Hugging Face hub: weights, a folder for SAELens, the figures of "
    "its record and a card. No text, no optimizer state and no secret goes there.",
}
CONFIG = "YAML file with any of these options."


def _options(settings: Sequence[Setting]) -> list[Option]:
    return [
        Option(s.name, s.help, "" if s.default in (None, []) else str(s.default).lower()
               if isinstance(s.default, bool) else str(s.default))
        for s in settings
    ]  # fmt: skip


def groups(command: str) -> dict[str, list[Option]]:
    """The options of a command, by what they are about."""
    if command == "list":
        return {"where": _options(LIST)}
    config = [Option("config", CONFIG)]
    found = {"what to do": config + _options([s for s in SETTINGS[command] if s not in MACHINE])}
    own = [setting for setting in MACHINE if setting in SETTINGS[command]]
    found["where, and on which model" if own == list(MACHINE) else "where"] = _options(own)
    if command == "report":
        for name, (on_request, options) in reports().items():
            found[f"{name}, made only when it is named" if on_request else name] = options
    return found


def names(command: str) -> list[str]:
    """The options of a command."""
    return [option.name for options in groups(command).values() for option in options]


def read(given: Sequence[str]) -> list[str]:
    """The command as its parser takes it.

    Args:
        given: The command and what follows it.

    Raises:
        NotUnderstood: A name or a value is wrong.
    """
    command, *rest = given
    settings = {setting.name: setting for setting in SETTINGS[command]}
    kinds = {name: _annotation(setting.type) for name, setting in settings.items()}
    kinds |= {o.name: o.type for _, own in reports().values() for o in own}
    first = next((i for i, arg in enumerate(rest) if re.match("--?[A-Za-z]", arg)), len(rest))
    places, found = rest[:first], []
    for name, words, joined in spelt(rest[first:]):
        known = (*names(command), "help", "print_config", "lm", *reports())
        if name.removesuffix("+") not in known:
            raise NotUnderstood(no_such_option(
                name, f"python evaluate.py {command}", names(command), synonyms.EVALUATE
            ))  # fmt: skip
        if name == "reports":
            words, left = _reports(words)
            places += left
        if name == "steer":
            words = [_steering(pair) for word in words for pair in word.split(",")]
        if name in settings and settings[name].many and words:
            found += [f"--{name}", *words] if words[0][:1] != "-" else [f"--{name}={words[0]}"]
        elif name in kinds and kinds[name] and (words or joined is None):
            found.append(f"--{name}={typed(name, words, kinds[name])}")
        else:
            found += [f"--{name}" if joined is None else f"--{name}={joined}",
                      *(words if joined is None else [])]  # fmt: skip
    missing = [s.name for s in SETTINGS[command] if s.required and not any(
        arg == f"--{s.name}" or arg.startswith(f"--{s.name}=") for arg in found)]  # fmt: skip
    if not places and command in PLACES:
        example = "last" if command != "compare" else "kan=runs/KAN linear=runs/LINEAR"
        raise NotUnderstood(
            f"{command}: of what? Name a run behind it: python evaluate.py {command} {example}"
        )
    if command == "publish" and len(places) != 2:
        raise NotUnderstood(
            "publish: a run and where it goes: python evaluate.py publish last OWNER/NAME "
            "--dry_run true"
        )
    if missing:
        raise NotUnderstood(f"--{missing[0]}: is missing; {settings[missing[0]].help}")
    return [command, *places, *found]


def _annotation(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _reports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of reports, however they are listed, and runs that stand behind them."""
    listed = [one for word in words for one in re.split(r"[,\s]+", word.strip("[]")) if one]
    runs = [one for one in listed if one == "last" or "/" in one or Path(one).is_dir()]
    named = [one for one in listed if one not in runs]
    for name in named:
        if name not in reports():
            near = get_close_matches(name, reports(), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise NotUnderstood(
                f"--reports {name}: no such report.{hint} Known: {', '.join(reports())}"
            )
    return named, runs


def _steering(pair: str) -> str:
    """LATENT=STRENGTH, also typed with a colon."""
    found = re.fullmatch(r"(\d+)[=:](.+)", pair.strip())
    value = None if found is None else number(found[2])
    if found is None or value is None:
        raise NotUnderstood(
            f"--steer {pair!r}: must be LATENT=STRENGTH, a number and an activation, such as 12=3.5"
        )
    return f"{found[1]}={found[2]}"


def help_of(command: str) -> str:
    """The help of a command."""
    if command == "list":
        return laid_out(
            "python evaluate.py list [--runs_dir FOLDER]", ABOUT[command], groups(command)
        )
    place = "RUN" if command in ONE_RUN else "RUN ..."
    usage = f"python evaluate.py {command} {place} [--option VALUE ...]"
    about = f"{ABOUT[command]} {place}: {PLACES[command]}"
    return laid_out(usage, about, groups(command))
