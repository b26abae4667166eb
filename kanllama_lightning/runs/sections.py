"""What figures are called in W&B: by section, in the order in which people read them.

W&B makes a section of what stands before the first `/` of a name, and sorts sections and charts by
name; only a name that begins with a letter can be filtered and sorted by (its documentation).
"""

import string
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

SECTIONS: dict[str, tuple[str, ...]] = {
    "main": (
        *("val/fvu", "val/l0", "val/delta_ce", "val/dead_frac", "train/loss"),
        *("tokens_per_second", "train/tokens_per_second"),
    ),
    "train": ("train/*",),
    "sparsity": ("val/l0_*", "val/dense_frac", "val/log10_frequency"),
    "losses": (
        *("val/ce_*", "val/delta_ce_*", "val/kl_*"),
        *("val/mse", "val/cosine", "val/l2_ratio", "val/bias"),
    ),
    "latents": ("val/*",),
    "other_sets": (),
    "controls": ("baseline/*",),
    "speed": ("time/*",),
    "debug": (
        *("train/grad_*", "train/dropped_frac", "train/out_of_grid", "trainer/global_step"),
        *("val/ce_tokens", "val/sparsity_tokens"),
    ),
    "record": (),
}
"""Figures by section; of several patterns that fit, the longest counts. `val/<set>/x`, of other
sets than the first, is in `other_sets`, what `evaluate.py` wrote in `record`."""
LEFT_OUT = ("epoch", "train/ev", "val/ev")
"""The data has no epochs that mean anything; EV is 1 - FVU."""
OF_A_HEAD = ("train", "val", "time", "baseline")
"""What stands behind the name of one of several heads."""


def titled_section(section: str) -> str:
    """A section as it is called in W&B: with a letter, by which it is sorted."""
    return f"{string.ascii_lowercase[[*SECTIONS].index(section)]}_{section}"


def charted(figure: str) -> str | None:
    """What a figure is called in W&B; None if it is not shown there.

    Args:
        figure: As it is logged: `val/fvu`, of several heads `kan/val/fvu`, which becomes
            `a_main/fvu/kan`: heads are next to each other. What is of no section stays as it is.
    """
    parts = figure.split("/")
    at = next((i for i, part in enumerate(parts) if part in OF_A_HEAD), 0)
    head, own = parts[:at], parts[at:]
    rest = own[1:] or own
    if own[0] == "val" and len(own) > 2:
        shown, section = f"val/{own[-1]}", "other_sets"
    else:
        shown = "/".join(own)
        fitting = {p: s for s, some in SECTIONS.items() for p in some if fnmatchcase(shown, p)}
        section = fitting[max(fitting, key=len)] if fitting else ""
    if shown in LEFT_OUT:
        return None
    return "/".join([titled_section(section), *rest, *head]) if section else figure


def by_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures under the names that `charted` gives them; without those that are not shown."""
    named = ((charted(figure), value) for figure, value in values.items())
    return {name: value for name, value in named if name is not None}
