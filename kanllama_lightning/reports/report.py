"""What a report is, and what it is given: a saved head, its LM, and one shared pass over text."""

import copy
import inspect
import json
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Int
from torch import Tensor

from kanllama_lightning.heads.head import SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import SplicedLosses
from kanllama_lightning.pages.plots import write_page, write_png, write_svg
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.storage.files import replacing, write_text
from kanllama_lightning.storage.small_files import ANEW, read_csv
from kanllama_lightning.types import ValidationBatch

Figures = Mapping[str, float | int | str | bool | None]
"""Named figures of a report, flat; they become `<report>/<name>` in `summary.json`."""


INDEX = "index.html"
"""The page that a record is read from."""
DRAWINGS = "svg"
"""Folder, within a record, of the figures as drawings."""
ABLATED_TOKENS = 1 << 13
"""Of a set of twice as many tokens or more, about so many are ablated."""


def ablated_every(tokens: int) -> int:
    """n where every n-th batch is ablated, the first one included.

    Args:
        tokens: Of the set, as far as its losses are looked at.
    """
    return max(1, tokens // ABLATED_TOKENS)


class Seen(NamedTuple):
    """One batch of the shared pass, as one head sees it."""

    batch: ValidationBatch
    number: int
    """Number of the batch within its set."""
    losses: SplicedLosses | None
    """Next-token losses of every counted position: `clean`, `recon` (this head's) and, in the
    batches that are ablated, `zero` and `mean`. None if no report of the pass has `splices`."""


class EvalRun:
    """A saved head under evaluation, where its record goes, and what was written of it just now.

    Args:
        folder: The run folder (or the folder of a saved head): what people call it by.
        head: The head, in evaluation mode, on the LM's device.
        lm: The loaded LM.
        card: `head.json`: class path, constructor arguments, provenance.
        sets: Names of the token sets of the pass, in order; the first is the main one.
        out: Folder of the record.
        counts: How often each token id occurs in the main set, [vocab].
        png: Whether figures are also written as PNG, which needs kaleido and a browser.
        record: Folder of the record that `out` is a part of (default: `out` itself).
    """

    def __init__(
        self,
        folder: Path,
        head: SAEHead,
        lm: FrozenLM,
        card: dict[str, Any],
        sets: Sequence[str],
        out: Path,
        counts: Int[Tensor, " vocab"] | None = None,
        png: bool = False,
        record: Path | None = None,
    ) -> None:
        self.record = record or out
        self.folder, self.head, self.lm, self.card = folder, head, lm, card
        self.sets, self.out, self.counts, self.png = list(sets), out, counts, png
        self.reports: list[Report] = []
        """What was asked for here, made just now or there already."""
        self.tables: dict[str, pd.DataFrame] = {}
        self.figures: dict[str, go.Figure] = {}

    @property
    def title(self) -> str:
        """One line that says what was evaluated."""
        kind = self.head.title
        return f"{kind}, {self.head.d_sae} latents at {self.lm.hook.name} of {self.lm.name}"

    def write_table(self, file: str, rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> None:
        """Write a CSV file, whole; floats read back exactly."""
        table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(list(rows))
        with replacing(self.out / file) as part:
            table.to_csv(part, index=False, lineterminator="\r\n")  # so that a lone \r is quoted
        self.tables[Path(file).stem] = table

    def path(self, file: str) -> Path:
        """Where a file is: among those written here, or else in the record this belongs to."""
        own = self.out / file
        return own if own.is_file() else self.record / file

    def read_table(self, file: str, columns: Mapping[str, Any]) -> pd.DataFrame:
        """Columns of a CSV file of this record, by name and what is in them (`read_csv`).

        Raises:
            InputError: It is damaged, or holds no row.
        """
        path = self.path(file)
        rows = read_csv(path, columns, ANEW)
        if not rows:
            raise InputError(f"{path}: is damaged: holds no row; {ANEW}")
        return pd.DataFrame(rows)

    def write_text(self, file: str, text: str) -> None:
        """Write a text file, whole."""
        write_text(self.out / file, text)

    def write_page(self, file: str, title: str, text: str, figures: Sequence[go.Figure]) -> None:
        """Write a page of figures that opens from disk, without a network.

        Args:
            file: Name, such as `losses.html`.
            title: Heading; escaped, as is the text.
            text: A paragraph below it: what is shown, over how many tokens, in which units.
            figures: In order, each with a title; what they show is escaped by whoever made them.
        """
        heading = f"{title}: {self.title}"
        write_page(self.out / file, heading, text, figures, self.record, up=INDEX)
        stem = Path(file).stem
        named = {f"{stem}_{i}": figure for i, figure in enumerate(figures)}
        self.figures |= named
        write_svg(self.out / DRAWINGS, named)
        if self.png:
            write_png(self.out / "png", named)


class Report(ABC):
    """One question about a head. An instance serves one head, once.

    `begin` checks what it needs, before anything is computed; `observe` sees every batch of the
    pass over the text, up to `tokens` of each set; `finish` computes, writes files and returns
    figures. A report that needs no text overrides `finish` alone and sets `streams` to False.
    Every constructor argument is kept as an attribute of the same name.
    """

    name: ClassVar[str]
    """What it is called by on the command line."""
    files: ClassVar[tuple[str, ...]]
    """What it writes into the record."""
    streams: ClassVar[bool] = True
    """Whether it looks at text."""
    splices: ClassVar[bool] = False
    """Whether it needs the next-token losses of every batch."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Files of the record that it takes in where they are: it is made anew when they change."""
    on_request: ClassVar[bool] = False
    """Whether it is only made when asked for by name."""

    picture: ClassVar[str | None] = None
    """Drawing that stands for it in the index of a record; None for the first of its own."""

    tokens: int | None = None
    """Most tokens of each set it looks at; None for all."""

    def applies(self, run: EvalRun) -> str | None:
        """Why it makes no sense for this head; None if it does."""
        return None

    def begin(self, run: EvalRun) -> None:  # noqa: B027
        """Start afresh; raise InputError for what cannot work."""

    def observe(self, run: EvalRun, seen: Seen) -> None:  # noqa: B027
        """Take in one batch."""

    def finish(self, run: EvalRun) -> Figures | None:
        """Write the files, return the figures; None if there is nothing to record."""
        return {}

    def work(self, lm: FrozenLM, heads: Sequence[SAEHead], tokens: int, ctx_len: int) -> Work:
        """What it takes for a few heads, beside the pass over the text that reports share.

        Args:
            lm: Its weights need not be loaded.
            heads: Those that it applies to; of no use but for their sizes.
            tokens: Tokens of the text.
            ctx_len: Tokens per row.
        """
        return Work()

    def settings(self) -> dict[str, Any]:
        """The constructor arguments, for the record and to know whether it is up to date."""
        names = [n for n in inspect.signature(type(self).__init__).parameters if n != "self"]
        return json.loads(json.dumps({name: getattr(self, name) for name in names}, default=str))

    def own(self) -> bool:
        """Whether it is asked something of the user's own, which is no part of the record."""
        return False

    def wanting(self, run: EvalRun) -> str | None:
        """Why what is there says little; the command ends with it, and with exit code 2."""
        return None

    def told(self, run: EvalRun) -> str | None:
        """What was asked and what came of it, for the terminal; None if a table says it.

        Called when the files are there, of this call or an earlier one.
        """
        return None

    def fresh(self) -> "Report":
        """A copy for another head."""
        return copy.deepcopy(self)
