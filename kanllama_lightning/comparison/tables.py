"""Figures of every run with intervals, means over seeds, differences at matched L0."""

import math
import statistics
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from kanllama_lightning.comparison.loading import (
    LOSSES,
    Evaluated,
    family_of,
    kind_of,
    ratio,
    text_of,
)
from kanllama_lightning.functional.bootstrap import centre, contrast, middle, ratios
from kanllama_lightning.measures.metrics import pooled, score

PAIR = (
    *("level", "a", "b", "l0_a", "l0_b", "matching", "seeds_a", "seeds_b", "quantity"),
    *("value_a", "value_b", "difference", "low", "high", "p", "covers", "verdict"),
)
"""Columns of `differences.csv`."""
MATCHED = 0.02
"""Share by which the larger of two L0 may exceed the smaller for them to count as matched."""
CORRECTED = 0.1
"""The same for a difference that is corrected along a measured slope."""
TRAINING = ("train_tokens", "train_passes", "train_tokens_per_second", "train_commit")
"""What a row says of how the head was trained."""
QUANTITIES = {"fvu": "FVU", "delta_ce": "delta CE", "kl": "KL"}
"""What has intervals; lower is better."""


class Seeds(NamedTuple):
    """Runs that differ in their seed alone; or one run by itself."""

    label: str
    runs: list[Evaluated]

    def l0(self) -> float:
        """Latents per token on the main set, mean over runs."""
        return statistics.fmean(run.l0() for run in self.runs)


class Drawn(NamedTuple):
    """The quantities with intervals, of one run on one set."""

    whole: Float[Tensor, " quantity"]
    draws: Float[Tensor, "resamples quantity"]
    """Over each resample of the documents."""
    text: Hashable
    """What says which documents; draws of equal ones are paired."""


def table(runs: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """One row per set and run, the main set first; figures that a record lacks are None.

    L0 in latents per token; `delta_ce` and `kl` in nats per token; `_low` and `_high` are the ends
    of a 95 % interval (bootstrap over documents); shares from 0 to 1.
    """
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.sets):
        have = [run for run in runs if len(run.of(name))]
        for run, drawn in zip(have, _draw(have, name), strict=True):
            rows.append(_row(run, name, drawn))
    return rows


def _row(run: Evaluated, name: str, drawn: Drawn) -> dict[str, Any]:
    own = run.of(name)
    tokens, targets = own["n_tokens"].sum(), own["n_targets"].sum()
    losses = {k: float(own[k].sum()) for k in LOSSES}
    ablated, clean = own["n_ablated"].sum(), own["ce_clean_ablated"].sum()
    means = pooled(losses, int(targets), int(ablated), float(clean))
    row: dict[str, Any] = {"set": name, "run": run.label, "folder": str(run.folder)}
    known = ("head", "d_sae", "parameters", "target_l0", "seed")
    row |= {key: run.summary.get(key) for key in known}
    row["l0"] = ratio(own["l0"].sum(), tokens)
    for i, key in enumerate(QUANTITIES):
        row[key] = float(drawn.whole[i])
        row[f"{key}_low"], row[f"{key}_high"] = middle(drawn.draws[:, i])
    scores = score(means, int(targets))
    row |= {key: scores[key] for key in ("ce_clean", "delta_ce_share", "ce_score")}
    row["ce_uniform"] = run.figure("losses", "ce_uniform", name)
    row["dead_tokens"] = run.figure("sparsity", "sparsity_tokens", name)
    for report, names in {
        "sparsity": ("dead_frac", "dense_frac"),
        "bits": ("bits_per_token",),
        "reconstruction": ("cosine", "bias"),
        "latents": ("lens_kurtosis_median", "lens_skewness_median", "lens_max_cosine_mean"),
        "capability": ("sae_kept_frac",),
        "concepts": ("recovered_frac", "mean_f1"),
    }.items():
        row |= {key: run.figure(report, key, name) for key in names}
    row |= {key: run.summary.get(key) for key in TRAINING}
    row |= {"n_tokens": int(tokens), "n_targets": int(targets), "documents": len(own)}
    return {k: None if _is_nan(v) else v for k, v in row.items()}


def _draw(runs: Sequence[Evaluated], name: str) -> list[Drawn]:
    """Quantities of each run on a set; runs on the same documents see the same resamples."""
    texts = [(run.digest(name), text_of(run.of(name))) for run in runs]
    found: dict[int, Drawn] = {}
    for text in dict.fromkeys(texts):
        places = [i for i, own in enumerate(texts) if own == text]
        pairs = [_sums(runs[i].of(name)) for i in places]
        top, bottom = (torch.cat(columns, 1) for columns in zip(*pairs, strict=True))
        n = len(QUANTITIES)
        whole, draws = (top.sum(0) / bottom.sum(0)).split(n), ratios(top, bottom).split(n, 1)
        found |= {i: Drawn(whole[j], draws[j], text) for j, i in enumerate(places)}
    return [found[i] for i in range(len(runs))]


def _sums(
    own: pd.DataFrame,
) -> tuple[Float[Tensor, "doc quantity"], Float[Tensor, "doc quantity"]]:
    """Numerators and denominators of the quantities."""
    tops = (own["e2"], own["ce_recon"] - own["ce_clean"], own["kl_recon"])
    bottoms = (own["x2"], own["n_targets"], own["n_targets"])
    top, bottom = (
        torch.stack([torch.from_numpy(c.to_numpy(copy=True)) for c in columns], 1)
        for columns in (tops, bottoms)
    )
    return top, bottom


def seeds(runs: Sequence[Evaluated], tolerance: float = MATCHED) -> list[Seeds]:
    """The runs, those put together that differ in their seed alone.

    That is: same head class, width, parameters, L0 target, training data and token budget, and
    all seeds different; without an L0 target also the same L0.

    Args:
        runs: To be compared.
        tolerance: Share by which L0 may differ where there is no target.
    """
    kinds: dict[str, list[Evaluated]] = {}
    for run in runs:
        kinds.setdefault(kind_of(run), []).append(run)
    found: list[Seeds] = []
    for members in kinds.values():
        first = members[0].summary
        numbers = {run.summary.get("seed") for run in members}
        l0s = [run.l0() for run in members]
        matched = first.get("target_l0") is not None or _matched(min(l0s), max(l0s), tolerance)
        if len(members) > 1 and len(numbers) == len(members) and None not in numbers and matched:
            label = f"{first['head']}, {first['d_sae']:,} latents, L0 {statistics.fmean(l0s):.3g}"
            label += f" ({len(members)} seeds)"
            taken = label in {other.label for other in found}
            label += f" like {members[0].label}" if taken else ""
            found.append(Seeds(label, members))
        else:
            found += [Seeds(run.label, [run]) for run in members]
    return found


def _matched(a: float, b: float, tolerance: float) -> bool:
    return max(a, b) <= (1 + tolerance) * min(a, b)


def seed_table(
    runs: Sequence[Evaluated], groups: Sequence[Seeds] | None = None
) -> list[dict[str, Any]]:
    """Means over seeds on the main set, one row per group.

    FVU, delta CE and KL have a 95 % interval over documents and seeds (`_low`, `_high`;
    `functional.bootstrap.centre`), the other figures the range over seeds (`_min`, `_max`).

    Args:
        runs: To be compared.
        groups: How they are put together; left out, those that differ in their seed alone, where
            there are several.
    """
    by_label = {row["run"]: row for row in table(runs) if row["set"] == runs[0].sets[0]}
    drawn = dict(zip((r.label for r in runs), _draw_main(runs), strict=True))
    if groups is None:
        groups = [group for group in seeds(runs) if len(group.runs) > 1]
    rows = []
    for group in groups:
        own = [by_label[run.label] for run in group.runs if run.label in by_label]
        if len(own) < len(group.runs):
            continue
        row: dict[str, Any] = {"group": group.label, "seeds": len(own)}
        row["runs"] = " ".join(run.label for run in group.runs)
        part = [drawn[run.label] for run in group.runs]
        for i, key in enumerate(QUANTITIES):
            whole, draws = _stacked(part, i)
            row[key], row[f"{key}_low"], row[f"{key}_high"] = centre(whole, draws)
        for key in ("l0", "delta_ce_share", "ce_score", "dead_frac", "recovered_frac"):
            values = [r[key] for r in own if r[key] is not None]
            known = len(values) == len(own)
            row[key] = statistics.fmean(values) if known else None
            row[f"{key}_min"] = min(values) if known else None
            row[f"{key}_max"] = max(values) if known else None
        rows.append({k: None if _is_nan(v) else v for k, v in row.items()})
    return rows


def differences(
    runs: Sequence[Evaluated],
    tolerance: float = MATCHED,
    groups: Sequence[Seeds] | None = None,
) -> list[dict[str, Any]]:
    """Differences a - b on the main set, of every pair at matched L0.

    Pairs of runs (`level` = run): the 95 % interval covers the documents, drawn alike for both; it
    says which of these two heads is better on such text. Pairs with a group of several seeds
    (`level` = seeds): difference of the means over seeds, and the interval covers documents and
    seeds (`functional.bootstrap.contrast`); a claim about two kinds of head needs three seeds of
    each. Intervals are not corrected for the number of pairs: of many, one in twenty misses.

    A pair further apart in L0 than the tolerance, by up to a tenth, is brought to one L0 along the
    slope of one of the two, measured between it and the nearest runs of its kind with another L0
    (`matching` says so); without such runs it is left out.

    Args:
        runs: To be compared.
        tolerance: Share by which the larger L0 may exceed the smaller.
        groups: How the runs are put together, to compare these groups alone; left out, those that
            differ in their seed alone, and each run with each as well.
    """
    drawn = dict(zip((r.label for r in runs), _draw_main(runs), strict=True))
    known = list(seeds(runs, tolerance) if groups is None else groups)
    pairs = list(combinations(known, 2))
    if groups is None:
        pairs = [(a, b) for a, b in pairs if len(a.runs) + len(b.runs) > 2]
        pairs += combinations([Seeds(run.label, [run]) for run in runs], 2)
    rows = []
    for a, b in pairs:
        parts = [[drawn[run.label] for run in group.runs] for group in (a, b)]
        matching = _to_one_l0(a, b, parts, known, drawn, tolerance)
        if matching is None:
            continue
        for i, quantity in enumerate(QUANTITIES):
            rows.append(
                {
                    "level": "seeds" if len(a.runs) + len(b.runs) > 2 else "run",
                    "a": a.label,
                    "b": b.label,
                    "l0_a": a.l0(),
                    "l0_b": b.l0(),
                    "matching": matching,
                    "seeds_a": len(a.runs),
                    "seeds_b": len(b.runs),
                    "quantity": quantity,
                }
                | _difference(a.label, b.label, parts, i)
            )
    return rows


def _to_one_l0(
    a: Seeds,
    b: Seeds,
    parts: list[list[Drawn]],
    groups: Sequence[Seeds],
    drawn: dict[str, Drawn],
    tolerance: float,
) -> str | None:
    """How a and b are brought to one L0, moving one of `parts` there; None if they cannot be."""
    if _matched(a.l0(), b.l0(), tolerance):
        return "matched"
    if not _matched(a.l0(), b.l0(), CORRECTED):
        return None
    for i, (own, other) in enumerate([(a, b), (b, a)]):
        way = other.l0() - own.l0()
        labels = {run.label for run in other.runs}
        near = [
            group
            for group in groups
            if labels.isdisjoint(run.label for run in group.runs)  # else it is moved onto itself
            and family_of(group.runs[0]) == family_of(own.runs[0])
            and abs(group.l0() - own.l0()) >= abs(way)
            and {drawn[run.label].text for run in group.runs} == {d.text for d in parts[i]}
        ]
        if near:
            there = min(near, key=lambda group: abs(group.l0() - own.l0()))
            share = way / (there.l0() - own.l0())
            ahead = [drawn[run.label] for run in there.runs]
            parts[i] = _moved(parts[i], ahead, share)
            return (
                f"{own.label} moved from L0 {own.l0():.2f} to {other.l0():.2f} along its slope "
                f"to {there.l0():.2f}"
            )
    return None


def _moved(part: Sequence[Drawn], ahead: Sequence[Drawn], share: float) -> list[Drawn]:
    """Runs, moved a share of the way from their mean to that of others; draw by draw."""
    step = torch.stack([d.whole for d in ahead]).mean(0) - torch.stack(
        [d.whole for d in part]
    ).mean(0)
    steps = torch.stack([d.draws for d in ahead]).mean(0) - torch.stack(
        [d.draws for d in part]
    ).mean(0)
    return [Drawn(d.whole + share * step, d.draws + share * steps, d.text) for d in part]


def _stacked(
    part: Sequence[Drawn], i: int
) -> tuple[Float[Tensor, " runs"], Float[Tensor, "resamples runs"]]:
    """The quantity at place i of several runs."""
    return torch.stack([d.whole[i] for d in part]), torch.stack([d.draws[:, i] for d in part], 1)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _draw_main(runs: Sequence[Evaluated]) -> list[Drawn]:
    """Each run on its main set; under --force these may have several names."""
    found: dict[str, Drawn] = {}
    for name in dict.fromkeys(run.sets[0] for run in runs):
        own = [run for run in runs if run.sets[0] == name]
        found |= dict(zip((run.label for run in own), _draw(own, name), strict=True))
    return [found[run.label] for run in runs]


def _difference(a: str, b: str, parts: Sequence[Sequence[Drawn]], i: int) -> dict[str, Any]:
    """Values, difference, interval and verdict for the quantity at place i."""
    (whole_a, draws_a), (whole_b, draws_b) = (_stacked(part, i) for part in parts)
    row: dict[str, Any] = {"value_a": float(whole_a.mean()), "value_b": float(whole_b.mean())}
    covers = "documents and seeds" if len(whole_a) + len(whole_b) > 2 else "documents"
    if len({d.text for part in parts for d in part}) > 1:
        blank = dict.fromkeys(("difference", "low", "high", "p"))
        return row | blank | {"covers": None, "verdict": "not comparable: different documents"}
    value, low, high, p = contrast(whole_a, draws_a, whole_b, draws_b)
    if math.isnan(low) or math.isnan(high):
        verdict = "no interval"
    elif high < 0:
        verdict = f"{a} lower"
    elif low > 0:
        verdict = f"{b} lower"
    else:
        verdict = "no difference shown"
    return row | {
        "difference": value,
        "low": low,
        "high": high,
        "p": None if math.isnan(p) else p,
        "covers": covers,
        "verdict": verdict,
    }
