"""SAEs that the peers made, and what their own code made of activations, without the peers.

`recorded/` was written by `benchmarks/exchange_parity.py --record tests/exchange/recorded`: of each
class a folder as its project saves it, and in `seen.safetensors` activations (ordinary and extreme
ones) with the peer's latents, in the units they have here, and reconstructions.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kanllama_lightning.exchange import dictionary_learning, saelens, sparsify
from kanllama_lightning.exchange.agreement import agreement
from kanllama_lightning.exchange.formats import format_of, read_foreign
from kanllama_lightning.exchange.origin import Origin
from kanllama_lightning.heads import SAEHead

RECORDED = Path(__file__).parent / "recorded"
FOLDERS = sorted(path.name for path in RECORDED.iterdir())


def tensors(folder: Path) -> dict[str, torch.Size]:
    """Shapes by name of what a folder holds."""
    if (folder / "ae.pt").is_file():
        held = torch.load(folder / "ae.pt", weights_only=True)
    else:
        held = load_file(next(folder.glob("sae*.safetensors")))
    return {name: one.shape for name, one in held.items()}


def test_every_class_that_is_read_was_recorded() -> None:
    kinds = {f"saelens_{name}" for name in saelens.READERS}
    kinds |= {f"dictionary_learning_{name}" for name in dictionary_learning.READERS}
    kinds |= {f"sparsify_{name}" for name in ("topk", "transcoder", "skip_transcoder")}
    assert set(FOLDERS) == kinds
    size = sum(path.stat().st_size for path in RECORDED.rglob("*") if path.is_file())
    assert size < 300_000


@pytest.mark.parametrize("name", FOLDERS)
def test_a_peer_s_sae_is_what_it_is_there(name: str, tmp_path: Path) -> None:
    """Read here, and written again: the same latents and reconstructions, to 1e-5."""
    seen = load_file(RECORDED / name / "seen.safetensors")
    head, _ = read_foreign(RECORDED / name)
    kind = format_of(RECORDED / name)
    assert kind in (saelens, sparsify, dictionary_learning)
    kind.write(head, Origin(), tmp_path / "again")
    again, _ = read_foreign(tmp_path / "again")
    head.save(tmp_path / "ours")  # as one of ours, which it is
    for one in (head, again, SAEHead.load(tmp_path / "ours")):
        found = agreement(one, lambda _: seen["z"], lambda _: seen["x_hat"], seen["x"])
        assert found.holds, found
        assert found.tokens == 32
        assert found.l0 > 3


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_has_their_names_and_shapes(name: str, tmp_path: Path) -> None:
    """As `load_state_dict` there is strict; but AutoEncoder and Matryoshka become their kin."""
    head, _ = read_foreign(RECORDED / name)
    kind = format_of(RECORDED / name)
    assert kind is not None
    kind.write(head, Origin(), tmp_path / "again")
    wanted = tensors(RECORDED / name)
    kin = {"AutoEncoder": "AutoEncoderNew", "MatryoshkaBatchTopKSAE": "JumpReluAutoEncoder",
           "BatchTopKSAE": "JumpReluAutoEncoder"}  # fmt: skip
    project, _, own = name.rpartition("_")
    if own in kin:
        wanted = tensors(RECORDED / f"{project}_{kin[own]}")
    assert tensors(tmp_path / "again") == wanted
