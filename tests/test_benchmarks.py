"""The benchmarks against peers: what is run, what is counted, what the tables say."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import end_to_end, gpu_step, peers, table, turns
from benchmarks.head_step_peers import measure
from benchmarks.job import Job, build, lm_folder, rows_file
from benchmarks.peer_steps import Ours, is_penalised, settle
from kanllama_lightning.corpus import LocalCorpus
from kanllama_lightning.data.token_data import TokenData
from kanllama_lightning.lm.frozen import FrozenLM

ROOT = Path(__file__).resolve().parents[1]
SMALL = Job(tokens=640, d_model=16, n_layers=2, vocab=64, ctx_len=16, batch_tokens=64)


def run(rate: float, **others: Any) -> dict[str, Any]:
    """What one run of one runner leaves."""
    return {
        "steps": 97,
        "seconds": 10.0,
        "tokens_per_second": rate,
        "tokens_per_cpu_second": rate / (2 if rate > 5000 else 1),
        "lm_tokens_per_token": 1.0,
        "peak_rss_mib": rate / 10,
        "load_before": 0.5,
        **others,
    }


def our_run(rate: float, summary: dict[str, float]) -> dict[str, Any]:
    times = {"time/lm": 0.5, "time/head": 0.25, "time/optimizer": 0.15, "time/data": 0.1}
    summary = {"tokens_per_second": 0.8 * rate, "val/l0": 32.0} | times | summary
    return run(rate, summary=summary)


def end_to_end_row() -> dict[str, Any]:
    rounds = [
        {"ours": our_run(ours, {}), "saelens": run(theirs)}
        for ours, theirs in ((9000.0, 3000.0), (8000.0, 4000.0), (6000.0, 1500.0))
    ]
    about = {
        "benchmark": "end_to_end",
        "measures": "tokens/s",
        "command": "python benchmarks/end_to_end.py",
        "commit": "abc1234",
        "date": "2026-11-25",
        "machine": "a CPU, 2 cores",
        "threads": 2,
        "peers": {"sae_lens": "6.54.12"},
        "notes": ["eai-sparsify==1.3.3 left out: no such wheel"],
    }
    return about | end_to_end.result(rounds)


def test_ratios_are_those_of_one_round() -> None:
    row = end_to_end_row()
    # 3, 2 and 4: the ratio of the medians, 8000 / 3000, would be another number
    assert row["ours_over"] == {"saelens": {"median": 3.0, "min": 2.0, "max": 4.0}}
    assert row["tokens_per_second"]["ours"] == {"median": 8000.0, "min": 6000.0, "max": 9000.0}
    assert row["peak_rss_mib"] == {"ours": 900, "saelens": 400}


def test_time_outside_is_what_is_neither_lm_nor_a_step_of_the_head() -> None:
    found = end_to_end.shares(our_run(1.0, {}))
    assert found.pop("outside") == pytest.approx(0.1)
    assert found == {"lm": 0.5, "head": 0.25, "optimizer": 0.15, "data": 0.1}


def test_the_page_has_figures_ranges_and_their_command(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(end_to_end_row()) + "\n")
    step = {
        "benchmark": "head_step_peers",
        "head": "Standard",
        "tok_model_sae_k": [4096, 256, 4096, 32],
        "settled": True,
        "l0": {"ours": 32.0, "sae_lens": 32.0},
        "over_ours": {"sae_lens": {"median": 2.5, "min": 2.0, "max": 3.0, "of_minima": 2.4}},
        "ms": {"ours": {"median": 300.0, "min": 290.0, "max": 350.0}},
        "above_state_mib": {"ours": 130.5, "sae_lens": 384.0},
    }
    row = end_to_end_row() | step | {"load_before": 1.5}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"other": 1}) + "\n")
    text = table.page(table.load(tmp_path))
    assert "| SAELens | 3,000 (1,500-4,000) | 3 (2-4) | 1.5 (1-2) | 400 | 1.00 |" in text
    standard = "| Standard (settled) | 300 (290-350) | 2.5 (2-3) | 32 / 32 | 130.5 / 384 |"
    assert standard in text
    assert text.count("`python benchmarks/end_to_end.py`") == 2
    assert "eai-sparsify==1.3.3 left out: no such wheel" in text
    assert "lm 50.0% (50.0%-50.0%)" in text


def test_only_what_is_between_the_marks_is_replaced() -> None:
    page = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    once = table.put(page, "new", "page.md")
    assert once == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.put(once, "new", "page.md") == once
    with pytest.raises(SystemExit, match=r"page\.md: has no place for tables"):
        table.put("no marks", "new", "page.md")


def test_the_committed_page_has_its_marks() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert "new tables" in table.put(page, "new tables", "performance.md")


def test_every_shared_package_is_pinned() -> None:
    pins = peers.pins((ROOT / "constraints.txt").read_text())
    assert sorted(pin.split("==")[0] for pin in pins) == sorted(peers.SHARED)


def test_the_job_gives_whole_rows_of_its_own_vocabulary(tmp_path: Path) -> None:
    folder = build(SMALL, tmp_path)
    made = rows_file(folder).stat().st_mtime_ns
    assert build(SMALL, tmp_path) == folder
    assert rows_file(folder).stat().st_mtime_ns == made, "built a second time"
    lm = FrozenLM(str(lm_folder(folder)), "model.layers.1", untrained=True).load_()
    corpus = LocalCorpus(
        str(rows_file(folder)), column="input_ids", tokenizer=lm_folder(folder).name
    )
    data = TokenData(lm.tokenizer, corpus, ctx_len=16, val_tokens=64, append_eos=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.ids.shape == (8, 16)
    assert batch.keep.sum() == 8 * 15, "all but BOS is text"
    assert lm.acts(batch.ids).shape == (8, 16, 16)


def test_the_job_has_rows_for_one_pass() -> None:
    job = Job(end_to_end.TOKENS)
    assert job.steps == 97
    assert job.rows * (job.ctx_len - 1) > job.tokens + job.buffer_tokens


@pytest.mark.parametrize("kind", Ours.kinds)
def test_our_step_trains_and_settles(kind: str) -> None:
    torch.manual_seed(0)
    contestant = Ours(kind, torch.randn(256, 16), 64, 4)
    settle(contestant, 4) if is_penalised(kind) else None
    assert contestant.l0() == pytest.approx(4, abs=0.05)
    before = [p.detach().clone() for p in contestant.parameters]
    contestant.step()
    assert any((a != b).any() for a, b in zip(before, contestant.parameters, strict=True))
    assert contestant.trainee.grad_norm_mean > 0


def test_a_missing_peer_is_left_out() -> None:
    nobody = peers.Peers(None, {}, ["sae-lens left out: no such wheel"])
    row = measure("TopK", (64, 16, 32, 4), 1, False, nobody, time.perf_counter)
    assert row["over_ours"] == {}
    assert row["l0"] == {"ours": 4.0}
    assert list(row["above_state_mib"]) == ["ours"]
    assert "exit" in peers.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert "No module named" in peers.run([sys.executable, "-c", "import sae_lens_of_nobody"])
    assert peers.run([sys.executable, "-c", "pass"]) == ""


LIGHT = {"lightning", "wandb", "datasets", "transformers", "torchmetrics", "plotly", "jsonargparse"}
"""What a bare machine with a GPU has not."""


def test_the_step_of_a_gpu_needs_little_more_than_torch() -> None:
    code = "import sys, benchmarks.gpu_step; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not LIGHT & set(done.stdout.split())
    assert "safetensors" in done.stdout.split(), "the names were not looked at"


def gpu_step_tiny(*options: str) -> dict[str, Any]:
    script = str(ROOT / "benchmarks" / "gpu_step.py")
    done = subprocess.run(
        [sys.executable, script, "--tiny", *options], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_step_of_a_gpu_has_its_fields_and_parts_that_add_up() -> None:
    found = gpu_step_tiny("--no-fit")
    assert {"command", "commit", "device", "torch", "size", "ceilings", "kernels_on"} <= set(found)
    assert set(found["left_out"]) == {"fit", "sparsify at 32", "sparsify at 64"}
    assert {(s["head"], s["d_sae"], s["n_dead"]) for s in found["steps"]} == {
        (kind, d_sae, dead) for kind in gpu_step.HEADS for d_sae in (32, 64) for dead in (0, 8)
    }
    for step in found["steps"]:
        assert sum(step["parts_ms"].values()) == pytest.approx(step["ms"], rel=1e-6)
        ends = {"buffer", "backward", "clip", "adam", "norm"}
        middle = {"forward"} if step["head"] == "Gated" else {"encode", "select"}
        assert ends | middle <= set(step["parts_ms"])
        assert min(step["parts_ms"].values()) > 0
        assert step["share_of_floor"] == pytest.approx(step["floor_ms"] / step["ms"])
        assert step["step_peak_mib"] > 0
    floors = {(s["head"], s["d_sae"]): s["floor_ms"] for s in found["steps"]}
    assert floors["TopK", 64] > floors["TopK", 32]
    assert floors["KANDirect", 64] > floors["KANEncoder", 64] > floors["TopK", 64]
    for kind in gpu_step.PROFILED:
        times = [kernel["ms"] for kernel in found["kernels"][kind]]
        assert len(times) == 15
        assert times == sorted(times, reverse=True)
    assert found["peer"] == []


def test_the_floor_is_that_of_the_formula() -> None:
    step = gpu_step.TrainingStep("TopK", gpu_step.TINY, 32, torch.device("cpu"))
    one = {"bf16_product_per_second": 1.0, "copied_bytes_per_second": 1.0}
    weights = 2 * 16 * 32 + 16 + 32
    passes = 4 * 2 * 64 * 4 * 16
    assert step.floor_ms(one) == 1000 * (2 * 64 * 16 * 32 + passes + 28 * weights)


def test_dead_latents_cost_the_step_something() -> None:
    """AuxK runs for those that are said to be dead, and for nobody else."""
    step = gpu_step.TrainingStep("TopK", gpu_step.TINY, 32, torch.device("cpu"))
    seen = []
    original = step.trainer.step

    def spied(*args: Any, **kwargs: Any) -> Any:
        losses, out = original(*args, **kwargs)
        seen.append("auxk" in losses)
        return losses, out

    step.trainer.step = spied  # type: ignore[method-assign]
    for dead in (0, 8):
        step.kill(dead)
        for _ in range(12):
            step()
    assert seen == [False] * 14 + [True] * 14


@pytest.mark.slow
def test_the_step_of_a_gpu_ends_with_a_whole_run() -> None:
    found = gpu_step_tiny("--head", "TopK")
    assert "fit" not in found["left_out"]
    assert found["fit"]["tokens_per_second"] > 0
    assert sum(v for k, v in found["fit"].items() if k.startswith("time/")) == pytest.approx(1)


@pytest.mark.slow
def test_end_to_end_times_our_own_command(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "end_to_end.py")
    options = ["--only", "ours", "--tokens", "16384", "--repeats", "1", "--buffer", "8192"]
    options += ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=True
    )
    row = json.loads(done.stdout)
    assert row["steps"] == 4
    assert row["tokens_per_second"]["ours"]["median"] > 0
    # nothing but the training batches: the buffer was filled before the clock started
    assert row["lm_tokens_per_token"]["ours"] == pytest.approx(1.0, abs=0.35)
    assert (
        row["tokens_per_second_with_start"]["median"] < row["tokens_per_second"]["ours"]["median"]
    )
    shares = {part: share["median"] for part, share in row["our_shares"].items()}
    assert sum(shares.values()) - shares["outside"] == pytest.approx(1.0, abs=0.01)
    assert 0 < shares["outside"] < 0.5
    assert table.page([row]).startswith("## Training, end to end")


def test_side_by_side_and_long_runs_have_their_tables() -> None:
    spread = {"median": 200.0, "min": 190.0, "max": 220.0}
    together = {
        "benchmark": "side_by_side",
        "command": "python benchmarks/side_by_side.py",
        "heads": {"topk": "TopK"},
        "ms": {"whole": {k: 2 * v for k, v in spread.items()}, "topk": spread, "lm": spread},
        "over_parts": {"median": 1.05, "min": 0.98, "max": 1.1},
    }
    soak = {
        "benchmark": "soak",
        "command": "python benchmarks/soak.py",
        "growth": 1.004,
        "mib": {"200": 630.0, "20000": 632.5},
    }
    made = table.page([together, soak])
    assert "| topk | TopK | 200 (190-220) |" in made
    assert "over the sum of its parts: 1.05 (0.98-1.1)." in made
    assert "| 20,000 | 632 |" in made
    assert "second fifth: 1.004." in made


def test_turns_tell_how_much_faster_a_command_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside other work too: the same work twice takes twice as long, whoever begins."""
    work = "import pathlib; n = int(pathlib.Path('n').read_text())\nfor i in range(n): pass"
    for name, n in (("one", 20_000_000), ("two", 40_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "n").write_text(str(n))
    folders = [str(tmp_path / name) for name in ("one", "two")]
    args = ["--cwd", folders[0], "--cwd", folders[1], "--rounds", "2", "--turn", "0.05"]
    assert turns.main([*args, "--", sys.executable, "-S", "-c", work]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1.5 < found["median"] < 2.6
    assert len(found["seconds"]) == 2
    (tmp_path / "two/n").write_text("no number")
    assert turns.main([*args, "--", sys.executable, "-S", "-c", work]) == 2
    said = capsys.readouterr().err
    assert f"error: in {folders[1]}: exit code 1; it said" in said
    assert "no number" in said
    assert turns.main([*args, "--", "no/such/program"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"error: in {folders[0]}: no/such/program cannot be begun: No such file or directory\n"
    )
    with pytest.raises(SystemExit):
        turns.main([*args[2:], "--", "true"])
    assert "--cwd: give it twice" in capsys.readouterr().err
