"""Help texts, laid out from the catalogue of options."""

import argparse
import shutil
from collections.abc import Mapping, Sequence

from kanllama_lightning.cli import synonyms
from kanllama_lightning.cli.catalogue import ROOT, Option, fit_groups, head_options, heads

WIDTH = 100
TRAIN = """\
Trains sparse autoencoders, linear or KAN, on the activations of a frozen Llama.

  fit        train a head, validate it, and leave a run folder
  validate   measure the head of a checkpoint
  plan       say what a run would take, in time, memory and disk; nothing is loaded or written

Each has its own help: `python train.py fit --help`. To begin with:

  python train.py fit --config kan embedded     # a laptop
  python train.py fit --config kan              # Llama 3.2 1B
"""
EVALUATE = """\
Measures finished runs: what a head keeps of the language model, what its latents stand for.

  list       list the runs there are, with their state and figures
  report     write the record of runs, or of saved heads, into their eval/ folders
  compare    compare runs like for like, with intervals
  try        run the language model with and without its head on a text, and show which latents fire
  export     write a head for SAELens, sparsify or dictionary_learning, or its pages for Neuronpedia
  publish    put a head on the Hugging Face hub, with its figures and a card

Each has its own help: `python evaluate.py report --help`. To begin with:

  python evaluate.py report last                # the run that was finished last
"""
ABOUT = {
    "fit": "Trains a head on the activations of a frozen language model, validates it, and leaves "
    "a run folder. A config of a head (configs/kan.yaml) says most of what is needed; the options "
    "below change it.",
    "validate": "Measures the head of a checkpoint (--ckpt_path) on the validation sets; takes the "
    "options of the run.",
    "plan": "Says what a run with these options would take, in time, memory and disk. Takes the "
    "options of `fit`; nothing is loaded, started or written.",
}


def laid_out(usage: str, about: str, groups: Mapping[str, Sequence[Option]]) -> str:
    """A help text: how a command is called, what it does, and its options by group."""
    width = max(60, min(WIDTH, shutil.get_terminal_size().columns - 2))
    parser = argparse.ArgumentParser(
        usage=usage,
        description=about,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=28, width=width
        ),
    )
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:
            said = option.help
            if option.default and "default" not in said:
                said = f"{said.removesuffix('.')} (default: {option.default})."
            group.add_argument(
                f"--{option.name}",
                help=said.replace("%", "%%") or None,
                metavar=option.kind or option.name.rpartition(".")[2].upper(),
            )
    return parser.format_help()


def fit_help(command: str) -> str:
    """The help of `fit`, `validate` or `plan`."""
    listed = "\n".join(f"  {name:21} {_short(text)}" for name, text in heads().items())
    usage = f"python train.py {command} [--config FILE ...] [--option VALUE ...]"
    which = "heads, for --model.head (`python train.py fit --model.head.help KANEncoder`):"
    return f"{laid_out(usage, ABOUT[command], fit_groups())}\n{which}\n{listed}\n"


def _short(text: str) -> str:
    return text if len(text) < 76 else text[:72].rsplit(" ", 1)[0] + " ..."


def head_help(name: str) -> str | None:
    """The help of one head; None if there is none of that name."""
    known = heads()
    if name not in known:
        return None
    return laid_out(
        f"python train.py fit --model.head {name} [--model.head.option VALUE ...]",
        known[name],
        {"options": head_options(name)},
    )


def no_such_option(
    name: str,
    command: str,
    known: Sequence[str],
    elsewhere: Mapping[str, str] = synonyms.TRAIN,
) -> str:
    """What to say of an option that there is not."""
    near = synonyms.meant(name, known, elsewhere)
    hint = f" Did you mean --{near}?" if near else ""
    config = name.replace("-", "_")
    if command.startswith("python train.py") and (ROOT / "configs" / f"{config}.yaml").is_file():
        hint = f" Did you mean --config {config}?"
    if near == "model.head.target_l0" and name.endswith("k"):
        hint = f" Latents per token are --{near}, for every head."
    return f"--{name}: no such option.{hint} See `{command} --help`"
