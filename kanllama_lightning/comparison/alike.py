"""What is like for like, and what is not."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

from kanllama_lightning.comparison.loading import Evaluated, as_json, kind_of, ratio, text_of
from kanllama_lightning.types import InputError

SAME_CE, SAME_CE_BF16 = 1e-4, 2e-2
"""Nats per target by which one LM may differ from itself, between devices and batch sizes."""
IDENTITY = {
    "lm": "LM",
    "revision": "revision of the LM",
    "hook_point": "hook point",
    "d_model": "d_model",
    "dtype": "number format of the evaluation",
}
"""What must be equal for figures to mean the same."""


def conflicts(runs: Sequence[Evaluated], force: bool = False) -> list[str]:
    """What is not like for like, a sentence each.

    Args:
        runs: To be compared.
        force: Whether to go on, and list it, where figures do not mean the same.

    Raises:
        InputError: They do not: another LM, hook point, width, text or number format.
    """
    refused = [_differing(name, runs, partial(_field, key)) for key, name in IDENTITY.items()]
    refused.append(_differing("tokens evaluated on", runs, _tokens))
    refused.append(_other_lm(runs))
    serious = [sentence for sentence in refused if sentence]
    if serious and not force:
        raise InputError(
            "these runs are not like for like: " + "; ".join(serious) + "; leave some out, or "
            "evaluate them alike with `python evaluate.py report RUN ...` (same --text, "
            "--documents and --dtype), or compare them all the same with --force"
        )
    flags = [f"Not comparable: {sentence}." for sentence in serious]
    return flags + [f"{sentence[0].upper()}{sentence[1:]}." for sentence in _flags(runs)]


def _flags(runs: Sequence[Evaluated]) -> list[str]:
    """What does not forbid a comparison, but may explain it."""
    data = [run.summary.get("train_data") for run in runs]
    keys = dict.fromkeys(key for d in data if isinstance(d, dict) for key in d)
    differ = [k for k in keys if len({as_json(d.get(k)) for d in data if isinstance(d, dict)}) > 1]
    differ = differ or ["train"]  # of others it is not known

    def trained_on(run: Evaluated) -> Any:
        own = run.summary.get("train_data")
        return {k: own.get(k) for k in differ} if isinstance(own, dict) else own

    found = [
        _differing("training data", runs, trained_on),
        _differing("token budget", runs, partial(_field, "train_tokens")),
        _differing("width d_sae", runs, partial(_field, "d_sae")),
        _further_apart("number of parameters", runs, "parameters", 0.10),
        _further_apart("normalisation scale", runs, "scale", 0.02),
        _differing("LM dtype in training", runs, partial(_field, "lm_dtype")),
    ]
    for run in runs:
        tokens = run.summary.get("train_tokens")
        if tokens == 0:
            found.append(f"{run.label} is untrained")
        elif run.summary.get("train_finished") is False:
            count = "an unknown number of" if tokens is None else f"{tokens:,}"
            found.append(f"{run.label} is unfinished: it stopped after {count} tokens")
    found += _positions(runs)
    for name in dict.fromkeys(name for run in runs for name in run.sets[1:]):
        have = [run for run in runs if name in run.sets]
        found.append(_differing(f"tokens of the set {name}", have, partial(_digest, name)))
    for a, b in combinations(runs, 2):
        own = a.summary.get("head_sha256")
        if own is not None and own == b.summary.get("head_sha256"):
            found.append(f"{a.label} and {b.label} are the very same head")
        elif kind_of(a) == kind_of(b) and a.summary.get("seed") == b.summary.get("seed"):
            found.append(
                f"{a.label} and {b.label} share head, width, L0 target, training and seed "
                f"({a.summary.get('seed')}): they are not counted as seeds"
            )
    return [sentence for sentence in found if sentence]


def _tokens(run: Evaluated) -> str:
    name = run.sets[0]
    entry, digest = run.summary["sets"][name], run.digest(name) or "unknown"
    return f"{entry.get('tokens', 0):,} tokens of {name}, sha256 {digest[:12]}"


def _other_lm(runs: Sequence[Evaluated]) -> str:
    """Runs on the first one's text whose original loss is another one, or of other documents."""
    first, found = runs[0], []
    own = first.of(first.sets[0])
    for run in runs[1:]:
        if run.sets[0] != first.sets[0] or run.digest(run.sets[0]) != first.digest(first.sets[0]):
            continue
        other = run.of(run.sets[0])
        if text_of(own) != text_of(other):
            found.append(
                f"documents with losses ({len(own):,} for {first.label}, {len(other):,} for "
                f"{run.label})"
            )
            continue
        gap = abs(own["ce_clean"].to_numpy() - other["ce_clean"].to_numpy())
        allowed = SAME_CE if run.summary.get("dtype") == "float32" else SAME_CE_BF16
        if (gap > allowed * own["n_targets"].clip(lower=1).to_numpy()).any():
            means = [ratio(d["ce_clean"].sum(), d["n_targets"].sum()) for d in (own, other)]
            found.append(
                f"original loss of the LM on the same documents ({means[0]:.5f} nats per token "
                f"for {first.label}, {means[1]:.5f} for {run.label})"
            )
    return "; ".join(f"different {sentence}" for sentence in found)


def _positions(runs: Sequence[Evaluated]) -> list[str]:
    """Sets of which a run counts other activations: sinks are left out by the head's own limit."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        have = [run for run in runs if len(run.of(name))]
        counted = _differing(
            f"number of activations counted in {name}", have, partial(_counted, name)
        )
        same = len({run.digest(name) for run in have}) == 1
        found += [counted] if counted and same else []
    return found


def _field(key: str, run: Evaluated) -> Any:
    return run.summary.get(key)


def _digest(name: str, run: Evaluated) -> str | None:
    return run.digest(name)


def _counted(name: str, run: Evaluated) -> str:
    return f"{run.of(name)['n_tokens'].sum():,.0f}"


def _differing(
    what: str, runs: Sequence[Evaluated], value: Callable[[Evaluated], Any]
) -> str | None:
    """The sentence that says who has which value; None if all have one."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        groups.setdefault(_said(value(run)), []).append(run.label)
    if len(groups) < 2:
        return None
    return f"different {what}: " + "; ".join(f"{v} ({', '.join(w)})" for v, w in groups.items())


def _further_apart(what: str, runs: Sequence[Evaluated], key: str, tolerance: float) -> str | None:
    """The sentence that lists values further apart than a share of the smallest."""
    values = {run.label: run.summary.get(key) for run in runs}
    known = [abs(v) for v in values.values() if v is not None]
    if not known or max(known) <= (1 + tolerance) * min(known):
        return None
    said = _differing(what, runs, partial(_field, key))
    return f"{said}; more than {tolerance:.0%} apart"


def _said(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else as_json(value)
