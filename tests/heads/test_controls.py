"""What makes each control a control, after training through the command line."""

import json
from pathlib import Path

import pytest
import torch

from kanllama_lightning.cli.evaluate_command import main as evaluate
from kanllama_lightning.heads import (
    BatchTopK,
    FrozenDecoder,
    FrozenEncoder,
    SAEHead,
    SoftlyFrozenDecoder,
)
from kanllama_lightning.types import InputError
from tests.conftest import Fit, only_run, read_rows
from tests.heads.test_heads import D, K, M, rows, started, train_


def trained(fit: Fit, tmp_path: Path, kind: type[SAEHead]) -> tuple[SAEHead, SAEHead]:
    """A head after 40 steps at a rate that moves what is trained far, and as it started."""
    assert fit(**{"model.head": kind.__name__, "model.optimizer.lr": "0.1"}) == 0
    run = only_run(tmp_path)
    before, after = (SAEHead.load(run / name) for name in ("baselines/untrained", "head"))
    assert type(after) is kind
    return before, after


def test_a_frozen_decoder_stays_as_it_was_drawn(fit: Fit, tmp_path: Path) -> None:
    before, after = trained(fit, tmp_path, FrozenDecoder)
    assert torch.equal(after.decoder.W_dec, before.decoder.W_dec)
    assert "decoder.W_dec" not in dict(after.named_parameters())
    assert (after.encoder.W_enc - before.encoder.W_enc).norm(dim=0).min() > 0.01
    wanted = BatchTopK(d_model=16, d_sae=32, target_l0=4).n_parameters() - 32 * 16
    assert after.n_parameters() == wanted


def test_a_softly_frozen_decoder_turns_no_further_than_it_may(fit: Fit, tmp_path: Path) -> None:
    before, after = trained(fit, tmp_path, SoftlyFrozenDecoder)
    cosine = (after.decoder.W_dec * before.decoder.W_dec).sum(1) / after.decoder.W_dec.norm(dim=1)
    assert (cosine >= 0.8).all()
    assert (cosine < 0.801).sum() > 10, "the bound was reached"
    torch.testing.assert_close(after.decoder.W_dec.norm(dim=1), torch.ones(32))


def test_a_frozen_encoder_stays_as_it_started(fit: Fit, tmp_path: Path) -> None:
    before, after = trained(fit, tmp_path, FrozenEncoder)
    assert torch.equal(after.scale, before.scale)
    for name in ("W_enc", "b_enc", "centre"):
        assert torch.equal(getattr(after.encoder, name), getattr(before.encoder, name)), name
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after.pre_acts(x), before.pre_acts(x))
    assert {name for name, _ in after.named_parameters()} == {"decoder.W_dec", "b_dec"}
    assert not torch.equal(after.b_dec, before.b_dec)
    assert (after.decoder.W_dec * before.decoder.W_dec).sum(1).min() < 0.8


def test_directions_are_turned_back_by_the_shortest_way() -> None:
    head = started(SoftlyFrozenDecoder, min_cosine=0.9)
    start = head.decoder.W_dec.detach().clone()
    side = torch.roll(start, 1, 1)
    side = side - (side * start).sum(1, keepdim=True) * start
    side /= side.norm(dim=1, keepdim=True)
    with torch.no_grad():
        head.decoder.W_dec.copy_(3 * (0.5 * start + 0.75**0.5 * side))
        head.decoder.W_dec[0] = -2 * start[0]
        head.decoder.W_dec[1] = 2 * start[1] + 0.1 * side[1]
    head.project_()
    turned = 0.9 * start + (1 - 0.9**2) ** 0.5 * side
    torch.testing.assert_close(head.decoder.W_dec[2:], turned[2:], atol=1e-5, rtol=0)
    assert torch.equal(head.decoder.W_dec[0], start[0])
    assert (head.decoder.W_dec[1] * start[1]).sum().item() == pytest.approx(2 / 4.01**0.5)


@pytest.mark.parametrize("cosine", [-0.1, 1.0, float("nan")])
def test_a_cosine_that_cannot_be_held_is_refused(cosine: float) -> None:
    with pytest.raises(InputError, match=r"head\.min_cosine="):
        SoftlyFrozenDecoder(d_model=D, d_sae=M, target_l0=K, min_cosine=cosine)


def test_a_saved_soft_control_goes_on_from_the_same_start(tmp_path: Path) -> None:
    head = started(SoftlyFrozenDecoder, seed=3)
    train_(head, rows(), 3)
    head.save(tmp_path)
    loaded = SAEHead.load(tmp_path)
    assert isinstance(loaded, SoftlyFrozenDecoder)
    assert torch.equal(loaded.decoder.W_start, head.decoder.W_start)
    assert "W_start" not in loaded.state_dict()


def test_a_head_saved_as_random_dictionary_still_loads(tmp_path: Path) -> None:
    head = started(FrozenDecoder)
    head.save(tmp_path)
    card = tmp_path / "head.json"
    card.write_text(card.read_text().replace('"FrozenDecoder"', '"RandomDictionary"'))
    loaded = SAEHead.load(tmp_path)
    assert isinstance(loaded, FrozenDecoder)
    assert torch.equal(loaded.encode(rows()), head.encode(rows()))
    assert loaded.title == "frozen decoder (control)"


@pytest.mark.slow
def test_record_and_comparison_name_controls_for_what_they_are(fit: Fit, tmp_path: Path) -> None:
    for kind in (FrozenEncoder, BatchTopK):
        folder = tmp_path / kind.__name__
        given = {"model.head": kind.__name__, "trainer.logger": "false"}
        assert fit(run=str(folder), model__tokens="640", **given) == 0
    folders = [str(tmp_path / kind.__name__) for kind in (FrozenEncoder, BatchTopK)]
    out = tmp_path / "comparison"
    given = ["--documents", "10", "--wandb", "false", "--lm.untrained", "true"]
    assert evaluate(["compare", *folders, "--out", str(out), *given]) == 0
    named = [row["head"] for row in read_rows(out / "comparison.csv")][:2]
    assert named == ["frozen encoder (control)", "BatchTopK"]
    for row in read_rows(out / "comparison.csv")[:2]:
        card = json.loads((Path(row["folder"]) / "head/head.json").read_text())["provenance"]
        assert row["train_commit"] == (card["commit"] or "")
        assert float(row["train_passes"]) == card["passes"] > 0
        assert int(float(row["dead_tokens"])) == int(row["n_tokens"])
    summary = json.loads((tmp_path / "FrozenEncoder" / "summary.json").read_text())
    assert summary["head"] == "frozen encoder (control)"
