"""Twenty CPU steps of every head, losses and validation, against numbers kept in `golden/`.

Rewritten with `pytest --update-golden` only; a commit that does so says why they moved.
Processors round differently (sums of eight or of sixteen numbers at once), and twenty steps of
some heads multiply that a thousandfold: on another kind than the files were made on, the first
steps must agree as closely as at home, the later ones and the validation roughly.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import rest_slow
from train import main

GOLDEN = Path(__file__).parent / "golden"
OTHERS = {"base", "embedded", "multi_gpu", "smollm2", "side_by_side", "kan_and_batch_topk"}
HEADS = sorted(
    p.stem for p in (Path(__file__).parents[1] / "configs").glob("*.yaml") if p.stem not in OTHERS
)
FAST = ("kan", "jump_relu", "only_kan")
"""A KAN encoder, a penalised head and a KAN decoder; the others are in the slow suite."""
MADE_ON = "AVX512"
"""What files were made with (`torch.backends.cpu.get_cpu_capability()`) that do not say."""
HERE = torch.backends.cpu.get_cpu_capability()
CLOSE, FIRST_STEPS = 1e-4, 3
NEAR = 1e-3
"""Of the first steps on another kind of CPU: one activation at a threshold may fall on its other
side there."""
ROUGHLY = 0.1
KEPT = ("l0", "fvu", "mse", "cosine", "bias", "ce_clean", "ce_recon", "ce_zero", "kl_recon")


@pytest.mark.parametrize("head", rest_slow(HEADS, FAST))
def test_same_numbers_as_ever(
    head: str, tiny_lm_dir: Path, text_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    losses: list[float] = []
    values = run(head, tiny_lm_dir, text_file, tmp_path, losses)
    got: dict[str, Any] = {"train/loss": losses, **values}
    path = GOLDEN / f"{head}.json"
    if request.config.getoption("--update-golden"):
        path.write_text(json.dumps({"made_on": HERE} | got, indent=1) + "\n")
    want = json.loads(path.read_text())
    made_on = want.pop("made_on", MADE_ON)
    assert got.keys() == want.keys()
    first = slice(FIRST_STEPS)
    near = CLOSE if made_on == HERE else NEAR
    assert got["train/loss"][first] == pytest.approx(want["train/loss"][first], rel=near)
    rel = CLOSE if made_on == HERE else ROUGHLY
    assert got["train/loss"] == pytest.approx(want["train/loss"], rel=rel)
    for name in values:
        assert got[name] == pytest.approx(want[name], rel=rel), name


def run(head: str, lm: Path, text: Path, folder: Path, losses: list[float]) -> dict[str, float]:
    """Trains through the command line; `losses` receives the loss of each step."""
    from kanllama_lightning.training.module import SAEModule

    original = SAEModule.training_step

    def recorded(self: SAEModule, dataloader_iter: Any) -> torch.Tensor:
        loss = original(self, dataloader_iter)
        losses.append(float(loss.detach()))
        return loss

    root = Path(__file__).resolve().parents[1]
    args = {
        "config": root / "configs" / f"{head}.yaml",
        "lm.name": lm,
        "lm.revision": "null",
        "lm.hook_point": "model.layers.1.mlp",
        "lm.dtype": "float32",
        "lm.untrained": "true",
        "model.head.d_sae": 48,
        "model.head.target_l0": 4,
        "model.tokens": 1280,
        "model.sae_batch_tokens": 64,
        "model.start_tokens": 256,
        "model.buffer.capacity_tokens": 512,
        "model.buffer.dtype": "float32",
        "model.optimizer.lr": 0.01,
        "data.train": text,
        "data.val": "null",
        "data.ctx_len": 32,
        "data.lm_batch_seqs": 4,
        "data.val_tokens": 512,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "run": folder / "run",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAEModule, "training_step", recorded)
        assert main(["fit", *(f"--{k}={v}" for k, v in args.items())]) == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return {f"val/{name}": summary[f"val/{name}"] for name in KEPT}
