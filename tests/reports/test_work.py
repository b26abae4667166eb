"""What reports say they take of the LM, against what they are seen to run."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kanllama_lightning.dashboard.ablation import AblatedPlace, ablate
from kanllama_lightning.heads import BatchTopK, SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.splice import ablated, losses_by_head
from kanllama_lightning.measures.directions import RANDOM
from kanllama_lightning.measures.head_batch import run_heads
from kanllama_lightning.plan.costs import Work
from kanllama_lightning.prompts.asking import ask
from kanllama_lightning.reports.capability_report import CapabilityReport
from kanllama_lightning.reports.ce_bench_report import CeBenchReport
from kanllama_lightning.reports.dashboard_report import DashboardReport
from kanllama_lightning.reports.latents_report import LatentsReport
from kanllama_lightning.reports.losses_report import LossesReport
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.reports.sparsity_report import SparsityReport
from kanllama_lightning.types import Prefix, TokenBatch


class CountingLM(FrozenLM):
    """Counts the positions that it is run on."""

    upto = on = logit = 0

    def prefix(self, ids: Tensor) -> Prefix:
        """Up to the hook point."""
        self.upto += ids.numel()
        return super().prefix(ids)

    def resume(self, prefix: Prefix, acts: Tensor) -> Tensor:
        """On from it."""
        self.on += acts.shape[:2].numel()
        return super().resume(prefix, acts)

    def resume_at(
        self, prefix: Prefix, row: Tensor, pos: Tensor, acts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """On from it, places behind the rows."""
        self.on += prefix.acts.shape[:2].numel() + len(row)
        return super().resume_at(prefix, row, pos, acts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of so many."""
        self.logit += hidden.shape[:-1].numel()
        return super().logits(hidden)


@pytest.fixture
def lm(tiny_lm_dir: Path) -> CountingLM:
    made = CountingLM(str(tiny_lm_dir), "model.layers.1.mlp", untrained=True)
    made.load_()
    return made


def a_head(seed: int = 0) -> SAEHead:
    head = BatchTopK(d_model=16, d_sae=32, target_l0=4, seed=seed)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(seed))
    head.start_(x)
    head.eval().calibrate_(x)
    return head


def test_losses_run_the_lm_on_for_each_head_and_three_times(
    lm: CountingLM, tokens: TokenBatch
) -> None:
    heads = {"a": a_head(), "b": a_head(1)}
    views = run_heads(lm.prefix(tokens.ids), tokens, "some", heads)
    x = views["a"].x
    x_hats = {name: view.out.x_hat for name, view in views.items()}
    losses_by_head(lm, views["a"], x_hats, ablated(x, heads["a"].x_mean))
    n = tokens.ids.numel()
    work = LossesReport().work(lm, list(heads.values()), n, 12)
    assert work == Work(on=lm.on, logits=5 * n)
    assert 0.5 * work.logits < lm.logit <= work.logits, "special tokens have no loss"
    few = LossesReport(tokens=10).work(lm, list(heads.values()), n, 12)
    assert few.on == 50
    assert SparsityReport().work(lm, list(heads.values()), n, 12) == Work()


def test_stories_are_read_up_to_the_hook_point(lm: CountingLM, tmp_path: Path) -> None:
    line = '{{"subject": "{}", "story1": "w1 w2 w3", "story2": "w4 w5"}}\n'
    pairs, head = tmp_path / "pairs.jsonl", a_head()
    pairs.write_text(line.format("a") + line.format("b"))
    report = CeBenchReport(str(pairs))
    run = EvalRun(tmp_path, head, lm, {}, [], tmp_path)
    report.begin(run)
    report._latents(run)
    assert report.work(lm, [head], 100, 10) == Work(upto=lm.upto)
    assert report.work(lm, [head, head], 100, 10).upto == 2 * lm.upto


def test_prompts_are_asked_once_and_long_answers_at_most_once_more(
    lm: CountingLM, tmp_path: Path
) -> None:
    """What is closed after its first token is not asked again, and so is cheaper than said."""
    prompts, head = tmp_path / "prompts.jsonl", a_head()
    line = '{{"category": "c", "prompt": "w1 w2 w{}", "answer": " w{}{}"}}\n'
    prompts.write_text("".join(line.format(i, i, " w9" * (i % 2)) for i in range(6)))
    report = CapabilityReport(prompts=str(prompts))
    report.begin(EvalRun(tmp_path, head, lm, {}, [], tmp_path))
    work = report.work(lm, [head], 100, 10)
    ask(head, lm, report._questions, top=3)
    first = 3 * 4 + 3 * 5
    assert work == Work(upto=first + 4 * 3 * 6, on=4 * (first + 3 * 6), logits=4 * (9 + 3))
    assert first <= lm.upto <= 1.2 * work.upto
    assert 4 * first <= lm.on <= 1.2 * work.on


def test_ablations_are_of_rows_up_to_their_last_place(lm: CountingLM) -> None:
    head, rows, ctx_len = a_head(), 40, 64
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (rows, ctx_len), generator=generator)
    row = torch.randint(rows, (8 * 10,), generator=generator).tolist()
    at = torch.randint(1, ctx_len + 1, (8 * 10,), generator=generator).tolist()
    places = [
        AblatedPlace(i // 8, ids[r, :n], None) for i, (r, n) in enumerate(zip(row, at, strict=True))
    ]
    work = DashboardReport(ablated=10).work(lm, [head], rows * ctx_len, ctx_len)
    ablate(head, lm, places, batch_seqs=4)
    assert lm.upto / 1.3 < work.upto < 1.3 * lm.upto
    assert lm.on / 1.3 < work.on < 1.3 * lm.on
    assert work.logits == lm.logit == 2 * 80
    assert work.directions == 32 + RANDOM
    assert LatentsReport().work(lm, [head, head], 100, 10) == Work(directions=2 * (32 + RANDOM))
    assert DashboardReport(ablated=0).work(lm, [head], 100, 10).upto == 0
