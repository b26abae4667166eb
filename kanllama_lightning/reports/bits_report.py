"""How many bits it takes to write down which latents fire, and how strongly."""

import torch

from kanllama_lightning.measures.bits import Sample, bits_per_token, joined
from kanllama_lightning.reports.report import EvalRun, Figures, Report, Seen


class BitsReport(Report):
    """Bits per token of the code, with values rounded as coarsely as costs 1 % of FVU (`bits.csv`).

    L0 counts latents and not what they say: of two heads with the same L0 the wider one has more to
    choose from. `docs/methods.md`, C, has the formula.

    Args:
        tokens: Tokens looked at, at most, of each set; they are held in memory.
    """

    name = "bits"
    files = ("bits.csv",)

    def __init__(self, tokens: int = 8192) -> None:
        self.tokens: int = tokens
        self._samples: dict[str, list[Sample]] = {}

    def begin(self, run: EvalRun) -> None:
        """Nothing seen yet."""
        self._samples = {name: [] for name in run.sets}

    def observe(self, run: EvalRun, seen: Seen) -> None:
        """Keep a batch's codes, and what they stand for."""
        batch = seen.batch
        sample = Sample(batch.out.codes.sparse(), batch.x, batch.out.x_hat)
        self._samples[batch.set_name].append(_to(sample, torch.device("cpu")))

    def finish(self, run: EvalRun) -> Figures:
        """A row per set."""
        figures: dict[str, float] = {}
        rows = []
        for name, parts in self._samples.items():
            if not parts:
                continue
            sample = _to(joined(parts), run.lm.device)
            found = bits_per_token(run.head.decode, sample)
            own = {"tokens": sample.codes.n_rows, "bits_per_token": found.total}
            own |= {"bits_which": found.which, "bits_values": found.values, "step": found.step}
            rows.append({"set": name} | own | {"fvu": found.fvu, "fvu_exact": found.fvu_exact})
            figures |= {f"{name}/{key}": value for key, value in own.items()}
        run.write_table("bits.csv", rows)
        return figures


def _to(sample: Sample, device: torch.device) -> Sample:
    codes = sample.codes
    moved = codes._replace(
        values=codes.values.to(device),
        rows=codes.rows.to(device),
        latents=codes.latents.to(device),
    )
    return Sample(moved, sample.x.to(device), sample.x_hat.to(device))
