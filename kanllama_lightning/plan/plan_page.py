"""The plan as a table for a terminal."""

from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

from kanllama_lightning.console.units import duration, size
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.plan.estimate import DISK_RATE, FEW_PERCENT, RunEstimate
from kanllama_lightning.plan.validation import FEW
from kanllama_lightning.runs.time_share import VALIDATIONS

RUNS = 10
RECORD_TOKENS = 65_536
"""Of each set, in the record that is priced."""


class Free(NamedTuple):
    """Bytes that are free."""

    memory: int
    disk: int


def table(
    estimate: RunEstimate,
    hook_point: str,
    device: str,
    free: Free,
    record: Mapping[str, Work | str],
) -> Table:
    """What a run takes, a line each, and how each figure was come by.

    Args:
        estimate: The figures.
        hook_point: Where activations are read.
        device: Where the run would be.
        free: Memory free there, and disk free here.
        record: What each report takes for a record of RECORD_TOKENS tokens, beside the pass that
            they share; or why it cannot be made.
    """
    e, made = estimate, Table(title=f"Plan of a run on {device}; nothing was started or written")
    made.add_column("what")
    made.add_column("figure", justify="right")
    made.add_column("how")
    for name, cost in e.costs.items():
        made.add_row(f"{name}: parameters", f"{cost.parameters:,}", "counted")
        made.add_row(
            f"{name}: forward and backward",
            f"{cost.flops_per_token / 1e6:,.2f} MFLOP/token",
            "counted on small batches: products and sparse sums",
        )
    made.add_row(
        "LM up to the hook point",
        f"{e.lm_flops / 1e6:,.2f} MFLOP/token",
        f"{hook_point}, from the LM's configuration",
    )
    made.add_section()
    made.add_row("heads: weights", size(e.head_weights), "fp32")
    made.add_row("heads: gradients, Adam", size(3 * e.head_weights), "three times the weights")
    made.add_row("buffer and queue", size(e.buffer), "")
    made.add_row("LM", size(e.lm_weights), "its weights")
    made.add_row("start statistics", size(e.start_memory), "their sample, with and without sinks")
    made.add_row("or a step", size(e.step_memory), "saved for backward, and the pre-activations")
    made.add_row(
        "a checkpoint's copy",
        size(e.checkpoint),
        "in the host's memory while it is written; every 5 minutes, at most 2% of the time",
    )
    made.add_row("memory", size(e.memory), f"{size(free.memory)} free here")
    made.add_section()
    made.add_row(
        "disk: run folder",
        size(e.run_disk),
        f"checkpoints and the head, at most; {size(free.disk)} free here",
    )
    if e.cached:
        made.add_row("disk: cache", size(e.cache_disk), f"{e.cache_rows:,} activations, bf16")
    made.add_section()
    for name, time in e.times.items():
        made.add_row(
            f"{name}: a step",
            f"{1000 * (time.per_token * e.batch + time.per_step):,.1f} ms",
            "measured here, as at the start, on random rows; then AuxK and fewer latents may come",
        )
    made.add_row(
        "LM: as many tokens",
        f"{1000 * e.lm_seconds * e.batch:,.1f} ms",
        "measured here, with one random block of its shape",
    )
    made.add_row("training", f"{1 / e.token_seconds:,.0f} tokens/s", "once the buffer is full")
    made.add_row("LM's share of a step", f"{e.lm_share:.0%}", "without a cache")
    made.add_row(
        f"time of {e.tokens:,} tokens",
        duration(e.seconds(1, e.cached)),
        "reading text comes on top, and the validations",
    )
    few = f"; under {FEW:,} of a set: delta CE's interval will be wide" * (e.val_tokens < FEW)
    made.add_row(
        "a validation",
        duration(e.validation_seconds),
        f"{e.val_sets * e.val_tokens:,} tokens; what looks at weights alone comes on top" + few,
    )
    made.add_row(
        "all validations",
        duration(e.all_validations_seconds),
        f"{e.validations_made} in training"
        + (f", at most {VALIDATIONS:.0%} of its time" if e.paced else ", as told")
        + "; and the final one with its controls",
    )
    made.add_row(
        "the whole run",
        duration(e.seconds(1, e.cached) + e.all_validations_seconds),
        "training and validations",
    )
    made.add_section()
    read = RECORD_TOKENS * e.read_seconds
    works = {name: work for name, work in record.items() if isinstance(work, Work)}
    seconds = {name: e.work_seconds(work) for name, work in works.items()}
    made.add_row(
        f"a record of {RECORD_TOKENS:,} tokens",
        duration(read + sum(seconds.values())),
        "`evaluate.py report`, of all heads, in float32; drawing comes on top",
    )
    made.add_row("record: the pass", duration(read), "up to the hook point and through the heads")
    for name, work in record.items():
        if isinstance(work, str):
            made.add_row(f"record: {name}", "", f"cannot be made: {work}")
        elif work.requests:
            made.add_row(f"record: {name}", f"{work.requests:,.0f} calls", "only if it is named")
        elif any(work):
            made.add_row(f"record: {name}", duration(seconds[name]), _parts(work))
    if e.processes > 1:
        made.add_section()
        for name, (deal, why) in e.dealing.items():
            made.add_row(
                f"{name}: latents dealt out",
                f"better {'so' if deal else 'not'}",
                f"{why}; --model.deal_latents auto does so",
            )
    made.add_section()
    made.add_row("activation cache", size(e.cache_disk), verdict(e, hook_point, free.disk))
    return made


def _parts(work: Work) -> str:
    """What a report is made of."""
    said = {
        "positions up to the hook point": work.upto,
        "on from it": work.on,
        "to losses": work.logits,
        "directions of the logit lens": work.directions,
    }
    return ", ".join(f"{n:,.0f} {what}" for what, n in said.items() if n)


def verdict(e: RunEstimate, hook_point: str, free_disk: int) -> str:
    """Whether to cache activations, and why."""
    pays = e.runs_to_pay
    disk = f"at {DISK_RATE / 1e9:.0f} GB/s of disk, assumed"
    if e.lm_share < FEW_PERCENT:
        return f"not worth it at {hook_point}: the LM pass is {e.lm_share:.0%} of a step"
    if pays is None:
        return f"not worth it at {hook_point}: reading takes as long as the LM pass, {disk}"
    if e.cache_disk > free_disk:
        fit = int(0.9 * free_disk / e.cache_disk * e.cache_rows)
        return (
            f"would pay from {pays} runs on, but {size(free_disk)} are free here; fewer "
            f"activations fit, which then repeat: --data.cache_tokens {fit}"
        )
    live, cached = (duration(e.seconds(RUNS, c)) for c in (False, True))
    return (
        f"pays from {pays} runs on: {RUNS} runs take {cached} instead of {live}, {disk}; add "
        "--data.cache FOLDER"
    )
