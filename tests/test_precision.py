"""bf16-mixed: products in bf16, everything that adds up, compares or decides in fp32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kanllama_lightning import heads
from kanllama_lightning.heads import SAEHead
from kanllama_lightning.types import StepContext
from tests.conftest import ALONE, Fit, side_by_side_config

KINDS = {
    "batch_topk": "BatchTopK",
    "topk": "TopK",
    "kan": "KANEncoder",
    "kan_direct": "KANDirect",
    "spline_latent": "SplineLatent",
    "curved": "CurvedDictionary",
    "standard": "Standard",
    "gated": "Gated",
    "jump_relu": "JumpReLU",
}


def trained(fit: Fit, folder: Path, precision: str) -> dict[str, dict[str, Any]]:
    members = {name: {"class_path": kind} for name, kind in KINDS.items()}
    config = side_by_side_config(folder, members, d_sae=48, target_l0=6)
    run = folder / precision
    changed: dict[str, Any] = {
        "model.tokens": 6400, "model.optimizer.lr": 0.003, "trainer.val_check_interval": 200,
        "trainer.precision": precision, "trainer.logger": "false", "run": run,
    }  # fmt: skip
    assert fit(config, **(ALONE | changed)) == 0
    return {name: json.loads((run / name / "summary.json").read_text()) for name in KINDS}


@pytest.mark.slow
def test_a_short_run_drifts_little_from_fp32(fit: Fit, tmp_path: Path) -> None:
    """100 steps; the weights that come out are fp32 too."""
    exact, mixed = (trained(fit, tmp_path, p) for p in ("32-true", "bf16-mixed"))
    for name in KINDS:
        # bf16 has 8 bits: products are off by 0.4 %, and selections near the cut-off differ
        assert mixed[name]["val/fvu"] == pytest.approx(exact[name]["val/fvu"], rel=0.05), name
        assert mixed[name]["val/l0"] == pytest.approx(exact[name]["val/l0"], rel=0.05), name
        assert mixed[name]["val/fvu"] != exact[name]["val/fvu"], "nothing was in bf16"
        saved = SAEHead.load(tmp_path / "bf16-mixed" / name / "head").state_dict()
        assert all(v.dtype == torch.float32 for v in saved.values() if v.is_floating_point())


@pytest.mark.parametrize("kind", KINDS.values())
def test_what_decides_stays_in_fp32(kind: str) -> None:
    """Reconstructions, codes, losses and gradients under autocast, for every kind of head."""
    torch.manual_seed(0)
    head = getattr(heads, kind)(d_model=16, d_sae=48, target_l0=4)
    x = torch.randn(64, 16)
    head.start_(x)
    ctx = StepContext(torch.arange(3), 0.5, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x)
        losses = head.losses(x, out, ctx)
        head.observe_(out, ctx)
    torch.stack(list(losses.values())).sum().backward()
    assert out.x_hat.dtype == torch.float32
    assert out.codes.sparse().values.dtype == torch.float32
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {p.grad.dtype for p in head.parameters() if p.grad is not None} == {torch.float32}
    assert all(v.dtype == torch.float32 for v in head.buffers() if v.is_floating_point())
