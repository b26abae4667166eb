"""The planner: figures by hand, what it says, and that it starts, loads and writes nothing."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from kanllama_lightning.callbacks import baselines
from kanllama_lightning.cli.evaluate_command import REPORTS
from kanllama_lightning.cli.plan_command import PlanCLI
from kanllama_lightning.console.units import duration, size
from kanllama_lightning.heads import PCA, BatchTopK, SAEHead, Standard, TopK
from kanllama_lightning.heads.dense_kan import DenseKAN
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.plan import cpu_use, timing, validation
from kanllama_lightning.plan.costs import (
    HeadCost,
    Work,
    _Counter,
    head_cost,
    lm_flops,
    lm_rest_flops,
)
from kanllama_lightning.plan.estimate import RecordTime, RunEstimate
from kanllama_lightning.plan.plan_page import Free, table, verdict
from kanllama_lightning.plan.timing import (
    HeadTime,
    RestTime,
    head_time,
    lens_seconds,
    lm_rest_seconds,
    lm_seconds,
)
from kanllama_lightning.plan.validation import FEW, control_runs, validation_size, validations
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import SAEOutput
from tests.conftest import ALONE, SMALL, Fit, rest_slow, side_by_side_config
from tests.test_configs import HEAD_CONFIGS, ROOT, SOME
from train import main

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- costs by hand


def test_a_dense_linear_head_by_hand() -> None:
    """Two products forward; backward the gradients of both weights and of the latents."""
    cost = head_cost(Standard(d_model=4, d_sae=8, target_l0=2), autocast=False)
    assert cost.parameters == 4 * 8 + 8 * 4 + 8 + 4
    assert cost.flops_per_token == 5 * (2 * 4 * 8)
    assert cost.flops_per_step == 0
    assert cost.saved_per_token == 4 * (4 + 8 + 4), "x - b_dec, latents, error"


def test_topk_by_hand() -> None:
    """One product; then decoding and three gradients touch the k kept latents only."""
    cost = head_cost(TopK(d_model=16, d_sae=64, target_l0=3), autocast=False)
    assert cost.flops_per_token == 2 * 16 * 64 + 4 * (2 * 3 * 16)
    assert cost.flops_per_step == 2 * 16 * 64, "b_dec through the encoder, by its gradient alone"


def test_counting_leaves_the_head_as_it_was() -> None:
    head = BatchTopK(d_model=4, d_sae=8, target_l0=2)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head_cost(head, autocast=True)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert all(p.grad is None for p in head.parameters())


HOOKS = ["blocks.1.hook_resid_pre", "model.layers.1.self_attn", "blocks.1.hook_resid_mid"]
HOOKS += ["model.layers.0.mlp", "model.layers.2"]


@pytest.mark.parametrize("hook", HOOKS)
def test_lm_operations_are_those_of_a_real_pass(
    make_lm: Callable[..., FrozenLM], hook: str
) -> None:
    lm = make_lm(hook)
    ids = torch.zeros(3, 10, dtype=torch.int64)
    with _Counter() as counter:
        lm.acts(ids)
    attentions = lm.hook.layer + (lm.hook.kind != "resid_pre")
    scores = attentions * 4 * 16 * (10 + 1) / 2  # torch has no formula for these on a CPU
    assert 30 * (lm_flops(lm, 10) - scores) == counter.flops
    prefix = lm.prefix(ids)
    with _Counter() as counter:
        lm.logits(lm.resume(prefix, prefix.acts))
    scores = (lm.config.num_hidden_layers - attentions) * 4 * 16 * (10 + 1) / 2
    assert 30 * (lm_rest_flops(lm, 10) - scores) == counter.flops


def test_lm_parameters(make_lm: Callable[..., FrozenLM]) -> None:
    lm = make_lm()
    matrices = [p for p in lm.model.parameters() if p.dim() == 2]
    assert lm.n_parameters == sum(p.numel() for p in matrices)


# ------------------------------------------------------------------------------- measured


def test_a_slower_head_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.2)
    trainee = HeadTrainer(
        "", Standard(d_model=64, d_sae=512, target_l0=8), Schedule.of(10**6, 256), 5.0
    )
    assert min(head_time(trainee, torch.optim.Adam, CPU, autocast=False)) >= 0
    forward = trainee.head.forward

    def slowly(x: torch.Tensor) -> SAEOutput:
        time.sleep(len(x) / 5e3)
        return forward(x)

    monkeypatch.setattr(trainee.head, "forward", slowly)
    took = head_time(trainee, torch.optim.Adam, CPU, autocast=False)
    assert took.per_token * 256 + took.per_step > 0.9 * 256 / 5e3


def test_slow_work_is_measured_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.1)
    assert timing._affordable(lambda n: time.sleep(n / 256e3), 10**6, CPU) < 256 * 64
    assert timing._affordable(lambda _: time.sleep(1e-4), 1000, CPU) == 1000
    assert timing._affordable(lambda _: time.sleep(0.1), 1000, CPU) == 256


@pytest.mark.parametrize("hook", ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"])
def test_one_block_is_of_the_shape_of_the_lms(make_lm: Callable[..., FrozenLM], hook: str) -> None:
    lm = make_lm(hook)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    probe = lm.one_block(CPU)
    assert probe.acts(ids).shape == lm.acts(ids).shape
    assert lm.hook.layer == int(hook[7]), "the LM itself is as it was"
    assert lm.config.num_hidden_layers > 1
    own, one = (list(m.model.model.layers[0].parameters()) for m in (lm, probe))
    assert [(p.shape, p.dtype) for p in own] == [(p.shape, p.dtype) for p in one]


def test_blocks_before_the_hook_count(
    make_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_fastest", lambda works, _: [1.0 for _ in works])
    seconds = [lm_seconds(make_lm(f"model.layers.{i}"), 4, 64, CPU) for i in (0, 1, 2)]
    assert seconds == pytest.approx([1 / 256, 2 / 256, 3 / 256])


# ------------------------------------------------------------------------ estimates by hand


def made(**changed: Any) -> RunEstimate:
    given: dict[str, Any] = {
        "costs": {"A": HeadCost(100, 1000.0, 500.0, 16.0), "B": HeadCost(50, 500.0, 0.0, 0.0)},
        "lm_flops": 4000.0,
        "times": {"A": HeadTime(1e-3, 5e-4), "B": HeadTime(5e-4, 6e-4)},
        "lm_seconds": 0.002,
        "tokens": 1000,
        "batch": 10,
        "filling": 200,
        "d_row": 8,
        "head_weights": 600,
        "lm_weights": 7000,
        "buffer": 300,
        "planes": 40,
        "cached": False,
        "cache_rows": 1200,
    }
    return RunEstimate(**given | changed)


def test_memory_and_disk_by_hand() -> None:
    e = made()
    assert e.step_memory == 10 * (16 + 4 * 40)
    assert e.memory == 4 * 600 + 300 + 7000 + 1760
    assert e.run_disk == 3 * (3 * 600 + 300) + 2 * 600
    assert e.cache_disk == 1200 * 8 * 2


def test_time_by_hand() -> None:
    e = made()
    head = 1e-3 + 5e-4 + (5e-4 + 6e-4) / 10
    assert e.head_seconds == pytest.approx(head)
    assert e.lm_share == pytest.approx(0.002 / (0.002 + head))
    assert e.seconds(2, cached=False) == pytest.approx(2 * (1000 * head + 1200 * 0.002))
    disk = 16 / 1e9
    want = 1200 * (0.002 + disk) + 3 * (1000 * head + 1200 * disk)
    assert e.seconds(3, cached=True) == pytest.approx(want)
    assert made(cached=True).token_seconds == pytest.approx(head + disk)


@pytest.mark.parametrize(("lm", "pays"), [(4000.0, 2), (0.2, 2), (0.07, 3), (0.05, 5), (0.045, 6)])
def test_runs_to_pay_is_the_first_number_that_saves_time(lm: float, pays: int) -> None:
    e = made(lm_seconds=lm / 2e6)
    assert e.runs_to_pay == pays
    assert e.seconds(pays, cached=True) < e.seconds(pays, cached=False)
    if pays > 2:
        assert e.seconds(pays - 1, cached=True) >= e.seconds(pays - 1, cached=False)


def test_verdicts() -> None:
    assert made(lm_seconds=1.5e-8).runs_to_pay is None
    cheap = verdict(made(lm_seconds=5e-5), "model.layers.0", 10**9)
    assert cheap == "not worth it at model.layers.0: the LM pass is 3 % of a step".replace(
        " %", "%"
    )
    paying = verdict(made(), "h", 10**9)
    assert paying.startswith("pays from 2 runs on: 10 runs take 19 s instead of 40 s")
    assert "--data.cache FOLDER" in paying
    crowded = verdict(made(), "h", made().cache_disk // 2)
    assert crowded.startswith("would pay from 2 runs on, but")
    assert crowded.endswith("--data.cache_tokens 540")
    slow_disk = made(lm_seconds=1.5e-8, times={"A": HeadTime(1.5e-9, 0.0)})
    assert verdict(slow_disk, "h", 10**9).startswith("not worth it at h: reading takes as long")


def test_validations_by_hand() -> None:
    e = made(lm_rest_seconds=0.003, val_tokens=100, val_sets=2, validations=4, control_runs=6)
    seen = 0.002 + 5 * 0.003 + (1e-3 + 5e-4) / 3
    assert e.seen_seconds == pytest.approx(seen)
    assert e.validation_seconds == pytest.approx(200 * seen)
    assert e.all_validations_seconds == pytest.approx(5 * 200 * seen + 6 * 100 * 0.003)


def test_validations_that_the_time_pays_for_by_hand() -> None:
    """5 % of the time of training and validations together, as far as they are due."""
    common: dict[str, Any] = {"lm_rest_seconds": 1e-4, "val_tokens": 10, "val_sets": 1}
    e = made(**common, validations=10, paced=True)
    training, one = e.seconds(1, cached=False), e.validation_seconds
    n = e.validations_made
    assert 0 < n < 10
    assert n * one <= 0.05 * (training + n * one)
    assert (n + 1) * one > 0.05 * (training + (n + 1) * one)
    assert e.all_validations_seconds == pytest.approx((n + 1) * one)
    assert made(**common, validations=10).validations_made == 10
    assert made(**common, validations=1, paced=True).validations_made == 1


def test_the_start_and_a_checkpoint_take_memory_by_hand() -> None:
    e = made(start_tokens=500, row=16)
    assert e.start_memory == 2 * 500 * 16
    assert e.memory == 4 * 600 + 300 + 7000 + 16000
    assert e.checkpoint == 3 * 600 + 300
    assert made(on_cpu=True).memory == made().memory + 2100


def test_controls_are_counted_as_they_are_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PCA is shared by heads of one L0; every head is run untrained, and the LM untouched."""
    heads = {"a": {"class_path": "TopK"}, "b": {"class_path": "BatchTopK"}}
    heads["c"] = {"class_path": "TopK", "init_args": {"target_l0": 6}}
    ran: list[int] = []
    losses = baselines.losses_by_head

    def counted(lm: Any, batch: Any, x_hats: Any, ablations: Any) -> Any:
        ran.append(1 + len(x_hats) + len(ablations))
        return losses(lm, batch, x_hats, ablations)

    monkeypatch.setattr(baselines, "losses_by_head", counted)
    assert fit(side_by_side_config(tmp_path, heads), **ALONE, model__tokens="640") == 0
    size = {"d_model": 16, "d_sae": 32}
    made: list[SAEHead] = [kind(**size, target_l0=4) for kind in (TopK, BatchTopK)]
    made.append(TopK(**size, target_l0=6))
    assert set(ran) == {control_runs(made)} == {6}
    assert control_runs([PCA(16, 4)]) == 0


def test_the_rest_of_the_lm(
    make_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks less what is before the hook point, and the unembedding of 64 positions."""
    monkeypatch.setattr(timing, "_fastest", lambda *_: [2.56, 0.64])
    for layer in (0, 2):
        lm = make_lm(f"model.layers.{layer}")
        rest = lm_rest_seconds(lm, (layer + 1) * 0.01, 4, 64, CPU)
        assert rest == (pytest.approx((2 - layer) * 0.01), pytest.approx(0.01))
    monkeypatch.setattr(timing, "_fastest", lambda *_: [timing.LENS_DIRECTIONS * 0.25])
    assert lens_seconds(lm, CPU) == pytest.approx(0.25), "the whole vocabulary of the tiny LM"


def test_a_record_by_hand() -> None:
    times = RecordTime(0.002, RestTime(0.003, 0.001), 0.5)
    e = made(record=times)
    assert e.read_seconds == pytest.approx(0.002 + (1e-3 + 5e-4) / 3)
    assert e.work_seconds(Work()) == 0
    work = Work(upto=10, on=20, logits=30, directions=4, requests=7)
    assert e.work_seconds(work) == pytest.approx(10 * 0.002 + 20 * 0.003 + 30 * 0.001 + 4 * 0.5)
    record = {"a": work._replace(requests=0), "b": Work(), "c": Work(requests=7), "d": "no words"}
    shown = table(e, "h", "here", Free(1, 1), record)
    what, figures, how = (list(column.cells) for column in shown.columns)
    at = what.index("record: a")
    assert what[at : at + 3] == ["record: a", "record: c", "record: d"], "b takes the pass alone"
    read, own = 65_536 * e.read_seconds, e.work_seconds(work)
    assert figures[at - 2 : at] == [duration(read + own), duration(read)]
    assert figures[at : at + 3] == [duration(own), "7 calls", ""]
    assert how[at + 2] == "cannot be made: no words"


def test_other_processes_are_told_from_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds, in which all cores were busy for 16 and this process and its children for 6."""
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")

    def set_clocks(busy: int, own: float, now: float) -> None:
        spent = [busy - 3, 1, 1, 500, 70, 0, 1, 0]
        stat.write_text("cpu  " + " ".join(str(n * ticks) for n in spent) + " 0 0\ncpu0 1 2\n")
        monkeypatch.setattr(os, "times", lambda: (own - 1, 0.5, 0.25, 0.25, now))
        monkeypatch.setattr(cpu_use.time, "monotonic", lambda: now)

    monkeypatch.setattr(cpu_use, "STAT", stat)
    set_clocks(100, 5, 1000)
    watch = cpu_use.CPUUse()
    set_clocks(116, 11, 1010)
    assert watch.others() == pytest.approx(1.0)
    set_clocks(106, 11, 1010)  # busy with this alone
    assert watch.others() == 0
    monkeypatch.setattr(cpu_use, "STAT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (2.5, 0, 0))
    assert cpu_use.CPUUse().others() == 1.5


def test_sizes_and_durations() -> None:
    assert [size(2**20), size(3 * 2**30)] == ["1.0 MiB", "3.00 GiB"]
    assert [size(300), size(5000), size(60_000)] == ["0.3 KiB", "4.9 KiB", "58.6 KiB"]
    assert [size(0), size(12 * 2**20), size(2**27)] == ["0 bytes", "12.0 MiB", "0.12 GiB"]
    assert [duration(s) for s in (90, 600, 7200)] == ["90 s", "10 min", "2.0 h"]


# ------------------------------------------------------------------------------ command line


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., PlanCLI]:
    """Runs `plan` in an empty folder; what would load or start something fails."""
    seen: list[PlanCLI] = []
    run = PlanCLI._run_subcommand

    def keep(self: PlanCLI, subcommand: str) -> None:
        seen.append(self)
        run(self, subcommand)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("plan loads and starts nothing")

    monkeypatch.setattr(PlanCLI, "_run_subcommand", keep)
    monkeypatch.setattr(FrozenLM, "load_", never)
    monkeypatch.setattr("wandb.init", never)
    monkeypatch.setattr(timing, "BUDGET_S", 0.001)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def plan(*args: str) -> PlanCLI:
        assert main(["plan", *args]) == 0
        assert not list((tmp_path / "here").iterdir())
        assert seen[-1].trainer is None
        return seen[-1]

    return plan


@pytest.mark.parametrize("config", rest_slow(HEAD_CONFIGS, SOME), ids=lambda c: c.stem)
def test_plans_every_config(
    config: Path, planned: Callable[..., PlanCLI], capsys: pytest.CaptureFixture
) -> None:
    overlay = str(ROOT / "configs" / "embedded.yaml")
    cli = planned("--config", str(config), "--config", overlay)
    heads: dict[str, SAEHead] = cli.model.heads()
    for head, cost in zip(heads.values(), cli.estimate.costs.values(), strict=True):
        assert cost.parameters == head.n_parameters()
        assert cost.parameters == sum(p.numel() for p in head.parameters() if p.requires_grad)
        assert cost.flops_per_token >= 2 * head.d_model * head.d_sae, "at least the encoder"
    assert 0 < cli.estimate.token_seconds < 1
    said = capsys.readouterr().out
    assert all(f"{head.n_parameters():,}" in said for head in heads.values())
    assert "a step" in said
    assert "activation cache" in said
    assert cli.estimate.validations == cli.estimate.tokens // cli.estimate.batch // 500
    assert 0 < cli.estimate.seen_seconds < 1
    assert "the whole run" in said
    alone = ("sparsity", "bits", "reconstruction")  # the pass is all they need
    for kind in REPORTS:
        applies = kind.name != "interpretability" or not any(
            isinstance(head, DenseKAN) for head in heads.values()
        )
        assert (f"record: {kind.name}" in said) == (kind.name not in alone and applies)
    assert "cannot be made" not in said


@pytest.fixture
def small(tiny_lm_dir: Path, text_file: Path) -> Callable[..., list[str]]:
    """Arguments of a run on the tiny model that says nothing of validation tokens."""

    def args(**changed: Any) -> list[str]:
        given = SMALL | {"lm.name": tiny_lm_dir, "data.train": text_file, "data.val_tokens": None}
        given |= {name.replace("__", "."): value for name, value in changed.items()}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]

    return args


def test_validation_is_a_tenth_of_the_counted_training(
    planned: Callable[..., PlanCLI],
    small: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "head_cost", lambda *_, **__: HeadCost(1, 3000.0, 64.0, 0.0))
    monkeypatch.setattr(validation, "lm_flops", lambda *_: 10.0)
    monkeypatch.setattr(validation, "lm_rest_flops", lambda *_: 5.0)
    cli = planned(*small())
    given = (cli.model, cli.datamodule, 10)
    assert validations(40, 10) == 4
    training = 2560 * 3000 + 40 * 64 + (2560 + 512) * 10
    one = 5 * (10 + 4 * 5 + 1000) + 3 * 5  # a token, five times, and PCA, untrained, untouched
    least = validation_size(*given)
    assert least == (4096, pytest.approx(4096 * one / training)), "the least, whatever it takes"
    assert cli.datamodule.val_tokens == least.tokens
    monkeypatch.setattr(validation, "LEAST", 32)
    sized = validation_size(*given)
    assert sized.tokens == int(0.1 * training / one) // 32 * 32 == 128
    assert sized.share == pytest.approx(128 * one / training)
    assert 0.08 < sized.share <= 0.1
    cli.datamodule.cache = "somewhere"
    monkeypatch.setattr(validation, "head_cost", lambda *_, **__: HeadCost(1, 1.0, 0.0, 0.0))
    cheap = validation_size(*given)
    assert cheap.share == pytest.approx(cheap.tokens * (5 * (30 + 1 / 3) + 15) / 2560), "no LM"
    monkeypatch.setattr(validation, "VAL_TOKENS", 70)
    monkeypatch.setattr(validation, "SHARE", 1e9)
    assert validation_size(*given).tokens == 64, "at most, in whole rows"


def test_validation_is_sized_where_nobody_says(
    planned: Callable[..., PlanCLI],
    small: Callable[..., list[str]],
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first, again = planned(*small()), planned(*small())
    assert first.datamodule.val_tokens == again.datamodule.val_tokens == 4096 < FEW
    assert "validation: 4,096 tokens of each set" in caplog.text
    assert "--data.val_tokens" in caplog.text
    assert "will be wide" in " ".join(capsys.readouterr().out.split())
    caplog.clear()
    said = planned(*small(data__val_tokens=16384))
    assert said.datamodule.val_tokens == said.estimate.val_tokens == 16384
    assert "tokens of each set" not in caplog.text
    assert "will be wide" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_target_needs_no_weights(
    tiny_lm_dir: Path, tmp_path: Path, planned: Callable[..., PlanCLI]
) -> None:
    """The shape of Llama 3.2 1B; its folder holds a configuration and a tokenizer."""
    folder = tmp_path / "lm"
    shutil.copytree(tiny_lm_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    )
    (folder / "config.json").write_text(json.dumps(shape.to_dict() | {"model_type": "llama"}))
    args = ["--lm.name", str(folder), "--lm.revision", "null", "--data.cache", "cache"]
    # bf16 without instructions for it takes seconds per product
    args += ["--lm.dtype", "float32", "--trainer.precision", "32-true"]
    e = planned("--config", str(ROOT / "configs" / "topk.yaml"), *args).estimate
    assert e.lm_weights == pytest.approx(4 * 1.2358e9, rel=1e-3), "1.24 billion parameters"
    block = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192)  # weights of block 0
    assert e.lm_flops == 2 * block + 4 * 2048 * (512 + 1) / 2
    assert e.costs["TopK"].flops_per_token == 2 * 2048 * 16384 + 4 * (2 * 64 * 2048)
    assert e.head_weights == 4 * (2 * 2048 * 16384 + 16384 + 2048)
    assert e.buffer == (262144 + 4096 + 8 * 512) * 2048 * 2
    assert e.tokens == 300_003_328
    assert e.cache_rows == 300_003_328 + 3_000_000 // 3
    assert e.cached


def test_mistakes_are_those_of_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [f"--{k}={v}" for k, v in SMALL.items()] + ["--lm.name=embedded"]
    for wrong, named in (
        ("--model.head=KANEncodr", "Did you mean KANEncoder"),
        ("--model.tokns=5", "model.tokns"),
        ("--trainer.precision=16-mixed", "bf16-mixed"),
        ("--model.head.d_model=8", "lm.name"),
    ):
        assert main(["plan", *given, f"--data.train={tmp_path}/x.jsonl", wrong]) == 2
        assert named in capsys.readouterr().err
    assert main(["plan", *given, f"--data.train={tmp_path}/x.jsonl"]) == 2
    assert "x.jsonl" in capsys.readouterr().err
