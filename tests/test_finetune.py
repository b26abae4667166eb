"""A short fine-tune of finished heads: what it changes, and the table it ends in."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import finetune
from benchmarks.compare_heads import RATES, STUDIES, Cell, Comparison
from benchmarks.finetune import SHARES, Bench, Tuned, main, parts, tune
from kanllama_lightning import heads
from kanllama_lightning.corpus import resolve
from kanllama_lightning.heads.sae import SAE
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.schedule import Schedule
from kanllama_lightning.types import InputError
from tests.conftest import Finished
from tests.test_compare_heads import finish

LENGTH = 32


@pytest.fixture
def text(text_file: Path, tmp_path: Path) -> Path:
    """The parts of a study's text."""
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [json.dumps({"text": d.text}) + "\n" for d in resolve(str(text_file)).once()]
    for name, own in (("train", lines[40:]), ("choose", lines[:20]), ("report", lines[20:40])):
        (folder / f"{name}.jsonl").write_text("".join(own))
    return folder


def kl(bench: Bench) -> float:
    """Of the predictions with the head spliced in, on rows for choosing."""
    (batch,) = parts(bench.rows("choose", 16), 16)
    with torch.no_grad():
        spliced = bench.spliced(batch)
        log_p = bench.log_p(spliced, spliced.prefix.acts, batch.keep)
        log_q = bench.log_p(spliced, spliced.filled(bench.head(spliced.x).x_hat), batch.keep)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_predictions_are_followed_where_they_are_asked_for(finished: Finished, text: Path) -> None:
    """The control, as long and at the same rate, follows them less."""
    run = finished.folder
    found, weights = {}, {}
    for way in finetune.WAYS:
        bench = Bench(run, text)
        before = kl(bench)
        tune(bench, way, 3e-3, 12_800, 256, seed=0, whole=2560)
        assert not bench.head.training
        found[way] = kl(bench)
        weights[way] = bench.head.state_dict()
        again = Bench(run, text)
        tune(again, way, 3e-3, 12_800, 256, seed=0, whole=2560)
        for name, value in again.head.state_dict().items():
            assert torch.equal(value, weights[way][name]), (way, name)
    # an untrained LM has few ways to say less with as small an error
    assert found["kl"] < 0.98 * found["mse"]
    assert found["kl"] < 0.9 * before
    norms = weights["kl"]["decoder.W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize(
    ("head", "ramped"), [(heads.CurvedDictionary, "reach"), (heads.JumpReLU, "coefficient")]
)
def test_what_ramps_in_a_run_does_not_begin_anew(
    head: type[SAE], ramped: str, finished: Finished, text: Path
) -> None:
    bench, whole = Bench(finished.folder, text), 2_000_000
    (batch,) = parts(bench.rows("train", 64), 64)
    x = bench.spliced(batch).x
    bench.head = head(d_model=x.shape[1], d_sae=32, target_l0=4)
    bench.head.start_(x)
    trainer = HeadTrainer("", bench.head.train(), Schedule.of(whole, 256), 5.0)
    for step, rows in enumerate(x.repeat(20, 1).split(256)):
        trainer.step(rows, step, min(1.0, step / 80))

    def now() -> torch.Tensor:
        (value,) = (v for k, v in bench.head.state_dict().items() if k.endswith(ramped))
        return value.clone()

    before = now()
    assert before.max() > 0
    tune(bench, "kl", 0.0, 256, 256, 0, whole)
    torch.testing.assert_close(now(), before, rtol=0.5 if ramped == "coefficient" else 0, atol=0)


def test_what_is_spliced_in_passes_gradients(finished: Finished, text: Path) -> None:
    bench = Bench(finished.folder, text)
    (batch,) = parts(bench.rows("choose", 2), 2)
    spliced = bench.spliced(batch)
    x_hat = spliced.x.double().float().requires_grad_()
    log_q = bench.log_p(spliced, spliced.filled(x_hat), batch.keep)
    torch.testing.assert_close(log_q, bench.log_p(spliced, spliced.prefix.acts, batch.keep))
    (grad,) = torch.autograd.grad(log_q[:, 3].sum(), x_hat)
    step = torch.zeros_like(x_hat)
    step[1] = 1e-2 * torch.randn(x_hat.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = [
            bench.log_p(spliced, spliced.filled(x_hat + sign * step), batch.keep)[:, 3].sum()
            for sign in (1, -1)
        ]
    assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((grad * step).sum()), rel=0.02)


def test_drawn_rows_are_those_of_the_seed(finished: Finished, text: Path) -> None:
    bench = Bench(finished.folder, text)
    first, same, other = (bench.rows("train", 8, seed).ids for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    whole = bench.rows("train", 1 << 20).ids
    assert all((row == whole).all(1).any() for row in first)


def study(folder: Path, run: Path, text: Path) -> Comparison:
    """A finished study of two heads and two seeds, all of them the same run."""
    heads, seeds = ("batch_topk", "mlp"), (0, 1)
    k = yaml.safe_load((run / "config.yaml").read_text())["model"]["head"]["init_args"]["target_l0"]
    own = STUDIES["stories"]._replace(heads=heads, seeds=seeds, l0=(k,), tokens=40_960)
    comparison = Comparison(own, folder)
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(own._asdict()))
    shutil.copytree(text, folder / "text")
    for head in heads:
        for lr, fvu in zip(RATES, (0.2, 0.1, 0.2), strict=True):
            finish(comparison, Cell(head, k, lr, 0), fvu)
        for seed in seeds:
            cell = folder / Cell(head, k, RATES[1], seed).name
            shutil.rmtree(cell, ignore_errors=True)
            shutil.copytree(run, cell, symlinks=True)
            (cell / "cell.json").write_text(json.dumps({"commit": "abc", "exit": 0}))
            summary = json.loads((cell / "summary.json").read_text())
            (cell / "summary.json").write_text(json.dumps(summary | {"val/choose/fvu": 0.1}))
    return comparison


def test_mistakes_are_one_line(
    finished: Finished, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: str) -> str:
        assert main([*args, "--out", str(tmp_path / "out"), "--dirty"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert "holds no study" in refused("--runs", str(tmp_path))
    runs = study(tmp_path / "runs", finished.folder, text).out
    assert "--heads kan: " in refused("--runs", str(runs), "--heads", "batch_topk", "kan")
    assert "not finished at L0 77" in refused("--runs", str(runs), "--l0", "77")
    for name in ("tokens", "batch", "workers", "l0"):
        assert f"--{name} 0: must" in refused("--runs", str(runs), f"--{name}", "0")
    finetune.same(tmp_path / "out", {"tokens": 7})
    with pytest.raises(InputError, match="holds heads of tokens 7, and 8 was asked for"):
        finetune.same(tmp_path / "out", {"tokens": 8})
    bench = Bench(finished.folder, text)
    with pytest.raises(InputError, match="--tokens 31: less than one row of 32"):
        tune(bench, "kl", 1e-3, 31, 256, 0, 2560)
    with pytest.raises(InputError, match="the training text has [0-9]+; take no more"):
        tune(bench, "kl", 1e-3, 10**9, 256, 0, 2560)


@pytest.mark.slow
def test_from_a_study_to_the_table(
    finished: Finished, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    comparison = study(tmp_path / "runs", finished.folder, text)
    out = tmp_path / "out"
    args = ["--runs", str(comparison.out), "--out", str(out), "--batch", "256", "--dirty"]
    assert main(args) == 0
    said, progress = capfd.readouterr()
    assert progress.count("on the choosing text") == 2 * 2 * 3
    assert "; 4,096 tokens; shares of the learning rate: batch_topk mse 0." in said
    with (out / "differences.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["quantity"] == "kl"]
    named = {(row["a"], row["b"]) for row in found}
    assert ("batch_topk after kl", "batch_topk after mse") in named
    assert ("batch_topk after kl", "mlp after kl") in named
    assert len(named) == len(found), "each pair once"
    for row in found:
        own, other = float(row["value_a"]), float(row["value_b"])
        assert float(row["difference"]) == pytest.approx(own - other, abs=1e-6)
    assert all(float(row["low"]) <= float(row["difference"]) for row in found)
    cell = comparison.finals("batch_topk", comparison.study.l0[0])[1]
    kept = [Tuned(cell, "kl", share).folder(out) / "cell.json" for share in SHARES]
    about = [json.loads(path.read_text()) for path in kept if path.is_file()]
    assert len(about) == 1, "the other seeds take the share that the first one chose"
    assert about[0]["lr"] == pytest.approx(
        cell.lr * float(kept[0].parts[-3].split("-")[1]), rel=1e-9
    )
    assert main(args) == 0
    assert "on the choosing text" not in capfd.readouterr().err, "what is there is not made again"
