"""Every phase that takes long counts what is done, when it is done."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kanllama_lightning.callbacks.progress import Progress
from kanllama_lightning.console.phase import Phase
from kanllama_lightning.dashboard.ablation import AblatedPlace, ablate
from kanllama_lightning.heads import BatchTopK, SAEHead
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.measures.directions import read_directions
from kanllama_lightning.measures.head_batch import run_head
from kanllama_lightning.measures.metrics import Activations
from kanllama_lightning.prompts import Prompt, asking
from kanllama_lightning.prompts.asking import ask, question
from kanllama_lightning.reports.ce_bench_report import CeBenchReport
from kanllama_lightning.reports.evaluation import rows_at_once
from kanllama_lightning.reports.report import EvalRun
from kanllama_lightning.types import TokenBatch
from tests.conftest import IdleTrainer


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every step of every phase: name and unit, what is done, of how much."""
    steps: list[tuple[str, int, int]] = []
    add = Phase.add

    def told(self: Phase, n: int = 1) -> None:
        add(self, n)
        steps.append((f"{self.name} {self.unit}", self.done, self.total))

    monkeypatch.setattr(Phase, "add", told)
    return steps


def a_head() -> SAEHead:
    head = BatchTopK(d_model=16, d_sae=32, target_l0=4)
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    head.start_(x)
    head.eval().calibrate_(x)
    return head


class Validating(IdleTrainer):
    """A trainer with two validation sets, of three batches and of one."""

    val_dataloaders = ([0, 0, 0], [0])
    is_global_zero = True


def test_a_validation_batch_counts_when_all_callbacks_are_through(
    counted: list[tuple[str, int, int]],
) -> None:
    trainer, progress, module = Validating(), Progress(), SimpleNamespace()
    done = []
    for loader, batch in ((0, 0), (0, 1), (0, 2), (1, 0)):
        progress.on_validation_batch_start(trainer, module, None, batch, loader)
        done.append(len(counted))  # while the batch is worked on
    assert done == [0, 1, 2, 3]
    assert counted[-1] == ("validating batches", 3, 4)
    progress.on_validation_epoch_end(trainer, module)
    progress.on_validation_batch_start(trainer, module, None, 0, 0)
    assert len(counted) == 3, "the next validation begins anew"


class Training(IdleTrainer):
    """A trainer of four steps, which logs every second one."""

    is_global_zero = True
    max_steps = 4
    log_every_n_steps = 2
    global_step = 0


def test_a_line_leaves_out_figures_that_were_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, progress = Training(), Progress()
    schedule = SimpleNamespace(batch=64)
    module = SimpleNamespace(schedule=schedule, heads=lambda: {"": None})
    monkeypatch.setattr(Training, "callback_metrics", {"train/loss": 0.5}, raising=False)
    with caplog.at_level("INFO"):
        for step in (1, 2, 3, 4):
            trainer.global_step = step
            if step == 4:
                trainer.callback_metrics["train/loss"] = 0.25
            progress.on_train_batch_end(trainer, module, None, None, step)
    said = ["loss" in record.message for record in caplog.records]
    assert said == [True, False, False, True]
    assert caplog.records[1].message.startswith("step 2/4  ")


def test_the_logit_lens_counts_blocks(
    make_lm: Callable[..., FrozenLM],
    tokens: TokenBatch,
    counted: list[tuple[str, int, int]],
) -> None:
    lm, head = make_lm(), a_head()
    view = run_head(lm.prefix(tokens.ids), tokens, "some", head)
    meter = Activations(32)
    meter.update(view.out.codes)
    read_directions(head, lm, meter, view.x, block=20)
    assert [done for _, done, _ in counted[:3]] == [20, 32, 52]
    assert counted[-1] == ("logit lens directions", 32 + 1024, 32 + 1024)


def test_prompts_are_counted_batch_by_batch(
    make_lm: Callable[..., FrozenLM],
    counted: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what the runs say does not depend on how many go at once."""
    lm, head = make_lm(), a_head()
    texts = [" ".join(f"w{i + k}" for k in range(2 + i)) for i in range(8)]
    asked = [question(lm, Prompt("some", text, (" w1 w2 w3",))) for text in texts]
    together = ask(head, lm, asked, top=3)
    assert ("asking prompts", 8, 8) in counted
    counted.clear()
    monkeypatch.setattr(asking, "TOKENS_AT_ONCE", 24)
    apart = ask(head, lm, asked, top=3)
    prompts = [done for name, done, _ in counted if name == "asking prompts"]
    assert len(prompts) > 3
    assert prompts[-1] == 8
    for one, other in zip(together, apart, strict=True):
        for run in asking.RUNS:
            assert one.readings[run].said == other.readings[run].said
            assert one.readings[run].rank == other.readings[run].rank
            assert one.readings[run].kl == pytest.approx(other.readings[run].kl, abs=1e-5)


def test_ablations_and_stories_are_counted(
    make_lm: Callable[..., FrozenLM],
    tokens: TokenBatch,
    counted: list[tuple[str, int, int]],
    tmp_path: Path,
) -> None:
    lm, head = make_lm(), a_head()
    places = [AblatedPlace(j, tokens.ids[0, : 3 + j], None) for j in range(5)]
    ablate(head, lm, places)
    assert counted == [("ablating latents places", 5, 5)]
    pairs = tmp_path / "pairs.jsonl"
    line = '{{"subject": "{}", "story1": "w1 w2 w3", "story2": "w4 w5"}}\n'
    pairs.write_text(line.format("a") + line.format("b"))
    report, run = CeBenchReport(str(pairs)), EvalRun(tmp_path, head, lm, {}, [], tmp_path)
    report.begin(run)
    report._latents(run)
    assert counted[-1] == ("reading stories", 4, 4)


class Sized(FrozenLM):
    """An LM of which the size alone counts."""

    def __init__(self, n: int) -> None:
        self.n = n

    @property
    def n_parameters(self) -> int:
        """As told."""
        return self.n


@pytest.mark.parametrize(
    ("parameters", "ctx_len", "rows"),
    [(1_000_000, 256, 16), (134_500_000, 256, 4), (1_236_000_000, 512, 1)],
)
def test_a_batch_of_the_pass_is_small_where_the_lm_is_large(
    parameters: int, ctx_len: int, rows: int
) -> None:
    assert rows_at_once(Sized(parameters), ctx_len, torch.device("cpu")) == rows
    assert rows_at_once(Sized(parameters), ctx_len, torch.device("cuda")) == 16
