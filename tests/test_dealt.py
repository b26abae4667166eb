"""Latents dealt out over processes: they do what one process does that has all of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kanllama_lightning import heads
from kanllama_lightning.functional.shard import LatentShard
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.heads.dealt import dealt_tensors
from kanllama_lightning.training.dealing import fewer_bytes
from kanllama_lightning.types import InputError
from tests import test_ranks as run_ranks
from tests.conftest import ALONE, CTX, side_by_side_config
from tests.dealt_steps import KINDS, TRANSCODER, N, Part, off, train
from tests.gloo import ROOT, launch

FIVE: dict[str, dict[str, Any]] = {
    "topk": {"class_path": "TopK"},
    "batch_topk": {"class_path": "BatchTopK"},
    "kan": {"class_path": "KANEncoder"},
    "matryoshka": {"class_path": "Matryoshka"},
    "jump_relu": {"class_path": "JumpReLU"},
}
ZERO = torch.zeros(1)


def test_tensors_are_dealt_out_and_put_together() -> None:
    """Every latent to one process; encoders stay stored with the latents first."""
    W = torch.randn(12, 5).T
    parts = [LatentShard(rank, 4).own(W, 1) for rank in range(4)]
    assert torch.equal(parts[1], W[:, [1, 5, 9]])
    assert all(part.T.is_contiguous() for part in parts)
    assert torch.equal(torch.stack([p.T for p in parts], 1).flatten(0, 1).T, W)
    assert LatentShard(1, 4).numbers(torch.arange(3)).tolist() == [1, 5, 9]


def test_what_cannot_be_dealt_out_is_refused_in_a_line() -> None:
    for head, why in (
        (heads.CurvedDictionary(d_model=8, d_sae=32, target_l0=2), "LatentCurves of Curved"),
        (heads.BatchTopK(d_model=8, d_sae=30, target_l0=2), "30 latents, which 4 processes"),
        (heads.KANEncoder(d_model=8, d_sae=32, target_l0=2, d_hidden=6), "6 hidden units"),
        (heads.DenseKANReLU(d_model=8, d_sae=32, target_l0=2), "in a way of its own"),
        (heads.PCA(8, 4), "in a way of its own"),
    ):
        with pytest.raises(InputError, match=f"deal_latents=true: .*{why}") as e:
            dealt_tensors(head, 4)
        assert "\n" not in str(e.value)
        assert not fewer_bytes(head, 4, 4096, 2)[0]
    assert dealt_tensors(heads.BatchTopK(d_model=8, d_sae=32, target_l0=2), 4)


def test_every_tensor_of_latents_is_listed() -> None:
    """Of a head whose number of latents is no other size in it, nothing of that size is left."""
    for kind, args in KINDS.items():
        head = getattr(heads, kind)(d_model=5, d_sae=24, target_l0=2, **args)
        dealt = dealt_tensors(head, 4)
        for name, tensor in [*head.named_parameters(), *head.named_buffers()]:
            wanted = 12 if ".units." in name else 24
            along = [i for i, size in enumerate(tensor.shape) if size == wanted]
            assert along == ([dealt[name]] if name in dealt else []), (kind, name)


def test_large_heads_are_dealt_out_and_small_ones_are_not() -> None:
    with torch.device("meta"):
        large = heads.BatchTopK(d_model=2048, d_sae=16384, target_l0=64)
        small = heads.BatchTopK(d_model=256, d_sae=2048, target_l0=32)
    assert fewer_bytes(large, 8, 4096, 2)[0]
    assert not fewer_bytes(small, 8, 4096, 2)[0]


def same_as_one(folder: Path, kinds: list[str], steps: int, within: float) -> None:
    for kind in kinds:
        one = train(kind, steps, None)
        found = [torch.load(folder / f"{kind}-{rank}.pt") for rank in range(N)]
        for rank in found[1:]:
            assert off(rank, found[0]) == {n: 0.0 for n in off(rank, found[0])}, kind
        apart = off(found[0], one)
        assert all(error <= within for error in apart.values()), (kind, apart)
        assert found[0]["dead"] == one["dead"], kind
        assert one["dead"] or kind in ("JumpReLU", "Standard"), kind


def test_four_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    kinds, steps = ["TopK", "KANEncoder", "Gated"], 12
    launch(N, "tests.dealt_steps.child", str(tmp_path), kinds, steps)
    same_as_one(tmp_path, kinds, steps, 1e-5)


@pytest.mark.slow
def test_two_hundred_steps(tmp_path: Path) -> None:
    kinds = ["TopK", "BatchTopK", "KANEncoder", "Matryoshka", "Gated"]
    launch(N, "tests.dealt_steps.child", str(tmp_path), kinds, 200, timeout=1200)
    same_as_one(tmp_path, kinds, 200, 1e-5)


@pytest.mark.slow
def test_sixty_steps_of_the_other_kinds(tmp_path: Path) -> None:
    """Of JumpReLU no more: on these rows, after 140, a rounding decides who jumps."""
    kinds = ["JumpReLU", "Standard", "MLPEncoder", "KANDirect", "FrozenDecoder", TRANSCODER]
    launch(N, "tests.dealt_steps.child", str(tmp_path), kinds, 60, timeout=1200)
    same_as_one(tmp_path, kinds, 60, 1e-5)


@pytest.mark.slow
def test_four_then_two_then_one_go_on(tmp_path: Path) -> None:
    """From checkpoints that hold the whole head and what its optimizer knows."""
    kinds, steps = ["TopK", "KANEncoder", "Gated"], 36
    for n, begin in ((4, 0), (2, 12)):
        args = (str(tmp_path), kinds, steps, begin, begin + 12)
        launch(n, "tests.dealt_steps.part_child", *args, timeout=600)
    for kind in kinds:
        found = train(kind, steps, None, Part(24, steps, f"{tmp_path}/{kind}.ckpt"))
        one = train(kind, steps, None)
        one["losses"][:24] = 0
        apart = off(found, one)
        assert all(error <= 1e-5 for error in apart.values()), (kind, apart)


@pytest.mark.slow
def test_what_is_not_added_up_shows(tmp_path: Path) -> None:
    """The control of the tests above."""
    launch(N, "tests.dealt_steps.broken_child", str(tmp_path), ["TopK", "KANEncoder"], 12)
    for kind in ("TopK", "KANEncoder"):
        found, one = torch.load(tmp_path / f"{kind}-0.pt"), train(kind, 12, None)
        assert max(off(found, one).values()) > 1e-3


@pytest.mark.slow
def test_what_is_sent_is_what_the_formula_says(tmp_path: Path) -> None:
    kinds = [*KINDS, TRANSCODER]
    launch(N, "tests.dealt_steps.counting_child", str(tmp_path), kinds)
    for kind in kinds:
        said = json.loads((tmp_path / f"{kind}.json").read_text())
        assert said["seen"] == said["formula"], kind


# ------------------------------------------------------- whole runs through the command line


@pytest.mark.slow
def test_a_run_ends_alike_on_four_two_and_one_process(
    tiny_lm_dir: Path, whole_rows: Path, tmp_path: Path
) -> None:
    """60 steps: by one process; and by four, then two, then one that go on from checkpoints.

    Without a buffer, and with rows that count equally many tokens, each step has the same rows.
    """
    config = side_by_side_config(tmp_path, FIVE, d_sae=48)
    batch = 4 * (CTX - 1)
    common = {
        **ALONE, "lm.name": tiny_lm_dir, "data.train": whole_rows, "data.append_eos": "false",
        "model.sae_batch_tokens": batch, "model.tokens": 60 * batch,
        "model.start_tokens": 8 * batch, "model.buffer.capacity_tokens": 0,
        "data.val_fraction": 0.1, "data.val_tokens": 12 * CTX, "data.lm_batch_seqs": 1,
        "model.optimizer.lr": 0.002, "trainer.val_check_interval": 15,
    }  # fmt: skip
    dealt = common | {"model.deal_latents": "true"}
    one, parts = tmp_path / "one", tmp_path / "parts"
    first = run_ranks.train(parts, 4, config, **dealt, trainer__max_steps=20)
    assert first.wait(500) == 0
    held = torch.load(next((parts / "checkpoints").glob("*.ckpt")), weights_only=True)
    go_on = dealt | {"ckpt_path": parts}
    assert run_ranks.train(parts, 2, config, **go_on, trainer__max_steps=40).wait(500) == 0
    assert run_ranks.train_alone(parts, config, **go_on) == 0
    assert run_ranks.train_alone(one, config, **common) == 0
    for name in FIVE:
        got, want = (SAEHead.load(run / name / "head").state_dict() for run in (parts, one))
        apart = off({"state": got, "losses": ZERO}, {"state": want, "losses": ZERO})
        assert all(error <= 1e-5 for error in apart.values()), (name, apart)
        known, found = (json.loads((r / name / "summary.json").read_text()) for r in (one, parts))
        assert found["val/fvu"] == pytest.approx(known["val/fvu"], rel=1e-4)
        assert found["val/l0"] == pytest.approx(known["val/l0"], rel=1e-3)
    alone = torch.load(next((one / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert shapes(held) == shapes(alone)


def shapes(held: dict[str, Any]) -> list[Any]:
    """Names and shapes of what a checkpoint holds of heads and optimizer."""
    states = held["optimizer_states"][0]["state"]
    return [
        *sorted((name, tuple(value.shape)) for name, value in held["state_dict"].items()),
        *((i, k, tuple(v.shape)) for i in sorted(states) for k, v in sorted(states[i].items())),
    ]


@pytest.mark.slow
def test_a_head_that_cannot_be_dealt_out_ends_the_command(
    tiny_lm_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    common = {"lm.name": tiny_lm_dir, "data.train": text_file, "model.head": "CurvedDictionary"}
    args = run_ranks.command(tmp_path / "run", 2, **common, model__deal_latents="true")
    done = subprocess.run(
        [sys.executable, "train.py", *args], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    assert "model.deal_latents=true: the LatentCurves of CurvedDictionary" in done.stderr
