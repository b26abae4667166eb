"""Several processes on the CPU (gloo): what they do together is what one does with all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kanllama_lightning.functional import ranks
from kanllama_lightning.functional.losses import auxk
from kanllama_lightning.functional.sparse import largest_positive
from kanllama_lightning.heads import SAEHead
from tests.conftest import ALONE, CTX, SMALL, read_rows, side_by_side_config
from tests.gloo import launch
from train import main

ROOT = Path(__file__).resolve().parents[1]
EVERY_KIND = {
    "batch_topk": {"class_path": "BatchTopK"},
    "topk": {"class_path": "TopK"},
    "kan": {"class_path": "KANEncoder"},
    "matryoshka": {"class_path": "Matryoshka"},
    "standard": {"class_path": "Standard", "lr": 0.005},
    "gated": {"class_path": "Gated", "lr": 0.005},
    "jump_relu": {"class_path": "JumpReLU", "lr": 0.005},
    "spline_latent": {"class_path": "SplineLatent"},
    "curved": {"class_path": "CurvedDictionary"},
}


def test_alone_everything_is_the_identity() -> None:
    x = torch.randn(3, 2)
    with ranks.pooled():
        assert ranks.world() == 1
        assert ranks.rank() == 0
        for f in (ranks.total, ranks.smallest, ranks.largest, ranks.rows):
            assert f(x) is x
        assert ranks.lists([1, 2]) == [1, 2]


# ------------------------------------------------------- pure functions, three processes


def of_rank(rank: int) -> torch.Tensor:
    """Values with ties between processes, unequal in size; rank 2 has few positive ones."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5, 7, generator=generator).mul(4).round() / 4
    return x - 1 if rank == 2 else x


def child(folder: str) -> None:
    """What each process of `test_pure_functions` does; leaves its results in a file."""
    rank = torch.distributed.get_rank()
    x, found = of_rank(rank), {}
    with ranks.pooled():
        found["uneven"] = ranks.rows(x[: rank + 1])
        found["spread"] = ranks.summed_squares(x)
        error_hat = (x * 0.5).requires_grad_()
        loss = auxk(x, error_hat)
        loss.backward()
        found["auxk"], found["auxk grad"] = loss.detach(), error_hat.grad
        for count in (1, 4, 9, 16, 35):
            positions, cutoff = largest_positive(x, count)
            found[f"largest {count}"], found[f"cutoff {count}"] = positions, cutoff
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_pure_functions(tmp_path: Path) -> None:
    n = 3
    launch(n, "tests.test_ranks.child", str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(n)]
    union = torch.cat([of_rank(rank) for rank in range(n)])
    uneven = torch.cat([of_rank(rank)[: rank + 1] for rank in range(n)])
    want_hat = (union * 0.5).requires_grad_()
    want = auxk(union, want_hat)
    want.backward()
    assert want_hat.grad is not None
    for one in found:
        assert torch.equal(one["uneven"], uneven)
        torch.testing.assert_close(one["spread"], ranks.summed_squares(union))
    torch.testing.assert_close(sum(one["auxk"] for one in found) / n, want.detach())
    got = torch.cat([one["auxk grad"] for one in found]) / n
    torch.testing.assert_close(got, want_hat.grad)
    for count in (1, 4, 9, 16, 35):
        positions, cutoff = largest_positive(union, count * n)
        got = torch.cat([one[f"largest {count}"] + 35 * r for r, one in enumerate(found)])
        assert torch.equal(got, positions), count
        assert all(torch.equal(one[f"cutoff {count}"], cutoff) for one in found)


# ------------------------------------------------------- whole runs through the command line


def command(folder: Path, processes: int, *extra: str, **changed: Any) -> list[str]:
    given: dict[str, Any] = SMALL | {"run": folder, "trainer.logger": "false"}
    given |= {k.replace("__", "."): v for k, v in changed.items()}
    given |= {"trainer.devices": processes}
    args = [f"--{k}={v}" for k, v in given.items() if v is not None]
    overlay = [f"--config={ROOT / 'configs' / 'multi_gpu.yaml'}"] if processes > 1 else []
    return ["fit", *extra, *overlay, *args]


def train(folder: Path, processes: int, *extra: str, **changed: Any) -> subprocess.Popen[bytes]:
    """`train.py fit` in a process of its own, which starts the others itself."""
    return subprocess.Popen(
        [sys.executable, "train.py", *command(folder, processes, *extra, **changed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train_alone(folder: Path, *extra: str, **changed: Any) -> int:
    """The same with one process: this one."""
    return main(command(folder, 1, *extra, **changed))


@pytest.mark.slow
def test_two_processes_are_one_on_the_union(
    tiny_lm_dir: Path, whole_rows: Path, tmp_path: Path
) -> None:
    """Without a buffer each step's batch is the same set of rows, so every number must agree."""
    config = side_by_side_config(tmp_path, EVERY_KIND, d_sae=48)
    batch = 8 * (CTX - 1)
    common = {
        **ALONE, "lm.name": tiny_lm_dir, "data.train": whole_rows, "data.append_eos": "false",
        "model.sae_batch_tokens": batch, "model.tokens": 24 * batch,
        "model.start_tokens": 4 * batch, "model.buffer.capacity_tokens": 0,
        "data.val_fraction": 0.1, "data.val_tokens": 21 * CTX,
    }  # fmt: skip
    two = train(tmp_path / "two", 2, config, **common, data__lm_batch_seqs=4)
    assert train_alone(tmp_path / "one", config, **common, data__lm_batch_seqs=8) == 0
    assert two.wait(300) == 0
    for name in EVERY_KIND:
        a, b = (SAEHead.load(tmp_path / n / name / "head").state_dict() for n in ("one", "two"))
        for key, want in a.items():
            torch.testing.assert_close(
                b[key],
                want,
                rtol=2e-3,
                atol=2e-4,
                equal_nan=True,
                msg=lambda text, at=f"{name} {key}": at + text,
            )
        got, known = (
            json.loads((tmp_path / n / name / "summary.json").read_text()) for n in ("two", "one")
        )
        for key in (k for k in known if k.startswith("val/") and "lens" not in k):
            # scores that mean nothing in so small a world are null
            if known[key] is None:
                assert got[key] is None, (name, key)
            else:
                # documents are drawn anew for intervals, in the order in which they came
                drawn = key.endswith(("_low", "_high"))
                close = pytest.approx(known[key], rel=5e-3, abs=1e-2 if drawn else 1e-3)
                assert got[key] == close, (name, key)
        # every validation row was measured once, whoever did it
        tokens = [sum(int(r["n_tokens"]) for r in read_rows(tmp_path / n / name / "l0.csv"))
                  for n in ("one", "two")]  # fmt: skip
        assert tokens[0] == tokens[1] > 0


@pytest.mark.slow
def test_processes_share_a_cache(tiny_lm_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """The first writes it, both read it: no row twice, and they end alike."""
    run, seen = tmp_path / "run", tmp_path / "seen"
    spy = ["--trainer.callbacks+=tests.spy.Spy", f"--trainer.callbacks.folder={seen}"]
    common = {"lm.name": tiny_lm_dir, "data.train": text_file, "model.tokens": 1280}
    process = train(run, 2, *spy, **common, data__cache=tmp_path / "cache")
    assert process.wait(300) == 0
    states = [torch.load(seen / f"2-processes-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    read = [row for rows in read_by(seen, 2) for row in rows]
    assert len(read) >= 1280
    assert len({tuple(row) for row in read}) > 0.9 * len(read)  # the first words of rows repeat


def read_by(folder: Path, processes: int) -> list[list[tuple[int, ...]]]:
    """The rows each process ran the LM on, in order."""
    files = [folder / f"{processes}-processes-{rank}.json" for rank in range(processes)]
    return [[tuple(row) for row in json.loads(file.read_text())] for file in files]


@pytest.mark.slow
def test_processes_share_the_text_and_end_alike_and_another_number_goes_on(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """With buffers, and rows that count unequally many tokens: two processes, then three, then one.

    Together they read what one process reads, row by row and each once; at a change of their number
    no row is left out, and none is read again but by those who were ahead.
    """
    run, seen, batch = tmp_path / "run", tmp_path / "seen", 60
    common = {
        "model.head": "BatchTopK", "lm.name": tiny_lm_dir, "data.train": text_file,
        "model.sae_batch_tokens": batch, "model.tokens": 90 * batch, "model.start_tokens": 240,
        "model.buffer.capacity_tokens": 300, "data.lm_batch_seqs": 2, "data.val_tokens": 320,
    }  # fmt: skip
    spy = ["--trainer.callbacks+=tests.spy.Spy", f"--trainer.callbacks.folder={seen}"]
    first = train(run, 2, *spy, **common, trainer__max_steps=30)
    assert first.wait(300) == 0
    assert train(run, 3, *spy, **common, trainer__max_steps=60, ckpt_path=run).wait(300) == 0
    assert train_alone(run, *spy, **common, ckpt_path=run) == 0
    assert json.loads((run / "summary.json").read_text())["tokens"] == 90 * batch

    other = tmp_path / "alone"
    spy[1] = f"--trainer.callbacks.folder={other}"
    assert train_alone(tmp_path / "whole", *spy, **common | {"model.tokens": 110 * batch}) == 0
    order = read_by(other, 1)[0]
    assert len(set(order)) == len(order), "the text is too short for this test: it repeats"
    sessions = [[row for rows in read_by(seen, n) for row in rows] for n in (2, 3, 1)]
    for session in sessions:
        assert len(set(session)) == len(session), "a row was read twice in one session"
    everything = [row for session in sessions for row in session]
    assert set(everything) == set(order[: len(set(everything))]), "a row was left out"
    ahead = 2 * 2 * 3  # rows of an LM batch, of at most three processes, at two changes
    assert len(everything) - len(set(everything)) <= ahead

    for n in (2, 3):
        states = [torch.load(seen / f"{n}-processes-{rank}.pt") for rank in range(n)]
        for state in states[1:]:
            assert all(torch.equal(state[key], value) for key, value in states[0].items())
    steps = [int(row["step"]) for row in read_rows(run / "l0.csv")]
    assert steps == sorted(steps)
