"""Heads in SAELens, sparsify and dictionary_learning themselves, and their SAEs here.

    .venv/bin/python benchmarks/exchange_parity.py [--tokens 5000] [--record FOLDER]

Makes the peers' environment (`benchmarks/peers.py`), trains every kind of head briefly and side by
side on the embedded model (and on stories260K where it lies in `../shared/data`), exports them, and
has the peers load each folder and compute latents and reconstructions of held-out activations, a
tenth of them extreme. The other way about, SAEs that the peers' classes were trained as are
saved by their own code and read here. Prints a line for each; exit code 1 if one differs by more
than 1e-5 or a latent flips that is not a matter of rounding, or if a head through the plug-in is
not bit-equal. `--record` writes the small folders that `tests/exchange/` compares with.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STORIES = ROOT.parent / "shared" / "data"
HEADS = ("Standard", "Gated", "JumpReLU", "TopK", "BatchTopK", "Matryoshka", "WideBatchTopK",
         "FrozenDecoder", "FrozenEncoder", "SoftlyFrozenDecoder", "KANEncoder", "KANDirect",
         "SplineHidden", "SplineInput", "SplineLatent", "CurvedDictionary", "OnlyKAN",
         "KANReLUDense", "MLPEncoder")  # fmt: skip
D_SAE, L0, SMALL_D, SMALL_M = 256, 8, 16, 32
FAR = 1024.0
"""An activation beside which b_dec is small."""
Coder = Callable[[Tensor], Tensor]


class Loaded(NamedTuple):
    """An SAE in the hands of its own code."""

    encode: Coder
    decode: Coder


# ----------------------------------------------------------------------------- here, with Lightning


def texts() -> dict[str, list[str]]:
    """What to train on: options of `train.py`, by name."""
    found = {"embedded": ["--config", "configs/embedded.yaml"]}
    lm, text = STORIES / "stories260K-hf", STORIES / "tinystories_sample.jsonl"
    if lm.is_dir() and text.is_file():
        found["stories260K"] = [
            *("--config", "configs/embedded.yaml", "--lm.name", str(lm)),
            *("--lm.hook_point", "model.layers.2.mlp", "--data.train", str(text)),
            *("--data.val", "null", "--data.val_fraction", "0.1", "--data.ctx_len", "256"),
        ]
    return found


def trained(name: str, options: list[str], work: Path) -> Path:
    """A run of all heads side by side; its folder."""
    size = {"d_sae": D_SAE, "target_l0": L0}
    heads = {one.lower(): {"class_path": one, "init_args": size} for one in HEADS}
    config = work / f"{name}.yaml"
    config.write_text(
        json.dumps({"model": {"head": {"class_path": "SideBySide", "init_args": {"heads": heads}}}})
    )
    run = work / name
    command = [sys.executable, "train.py", "fit", "--config", str(config), *options,
               "--model.tokens", "30000", "--model.start_tokens", "4096",
               "--data.val_tokens", "4096", "--trainer.logger", "false",
               "--run", str(run)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: training failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return run


def exported(run: Path, work: Path, tokens: int) -> list[str]:
    """Export every head of a run in every format that takes it; lines about those that do not."""
    from kanllama_lightning.cli.export_command import activations, origin_of
    from kanllama_lightning.exchange.formats import FORMATS
    from kanllama_lightning.reports.evaluation import EvalSettings
    from kanllama_lightning.reports.saved_head import read_subject
    from kanllama_lightning.runs.folder import HEAD, members
    from kanllama_lightning.types import InputError

    refused, x = [], None
    for member in members(run):
        subject = read_subject(member)
        if x is None:
            x, _ = activations(subject, EvalSettings(), tokens)
            save_file({"x": x}, run / "x.safetensors")
        for name, kind in FORMATS.items():
            out = work / "out" / run.name / member.name / name
            try:
                kind.write(subject.head, origin_of(subject), out)
            except InputError as e:
                refused.append(f"{run.name} {e}")
                continue
            (out.parent / "head").unlink(missing_ok=True)
            (out.parent / "head").symlink_to((member / HEAD).resolve())
    return refused


# --------------------------------------------------------------------------- there, with the peers


def there(work: Path, record: Path | None) -> int:
    """Compare in the peers' environment; returns how many differ."""
    from kanllama_lightning.exchange.agreement import agreement, made_rows
    from kanllama_lightning.exchange.formats import FORMATS, read_foreign
    from kanllama_lightning.heads import SAEHead

    torch.set_num_threads(1)
    wrong = 0

    def tell(name: str, head: Any, other: Loaded, x: Tensor, exactly: bool) -> None:
        nonlocal wrong
        found = agreement(head, other.encode, other.decode, x)
        fits = found.holds and (not exactly or found[2:] == (0, 0, 0.0, 0.0))
        wrong += not fits
        sys.stdout.write(f"{'ok   ' if fits else 'WRONG'} {name}: {found}\n")
        sys.stdout.flush()

    for run in sorted((work / "out").glob("*")):
        x = load_file(work / run.name / "x.safetensors")["x"]
        for member in sorted(run.iterdir()):
            head = SAEHead.load(member / "head")
            for name in FORMATS:
                if (member / name).is_dir():
                    card = next((member / name).glob("*.json")).read_text()
                    whole = '"kanllama"' in card
                    other = LOADERS[name](member / name)
                    tell(f"{run.name} {type(head).__name__} in {name}", head, other, x, whole)
    for name, save, factor in made_by_peers():
        folder = (record or work / "in") / name
        other, rows = save(folder)
        head, _ = read_foreign(folder)
        x = torch.cat([rows[:500], made_rows(head, 5000)])
        scaled = Loaded(lambda x, o=other, f=factor: o.encode(x) * f(o),
                        lambda z, o=other, f=factor: o.decode(z / f(o)))  # fmt: skip
        tell(f"{name}, made there and read here", head, scaled, x, False)
        if record is not None:
            with torch.no_grad():
                x = torch.cat([rows[:16], made_rows(head, 16)])
                z = scaled.encode(x)
                save_file({"x": x, "z": z, "x_hat": scaled.decode(z)}, folder / "seen.safetensors")
    return wrong


def stub_nnsight() -> None:
    """dictionary_learning imports it for its activation buffers alone."""
    try:
        import nnsight  # noqa: F401
    except Exception:  # whatever an old release does with new libraries
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel, stub.__spec__ = object, None
        sys.modules["nnsight"] = stub


def load_saelens(folder: Path) -> Loaded:
    """By SAELens, with our plug-in."""
    from sae_lens import SAE

    import kanllama_lightning.exchange.saelens_plugin  # noqa: F401

    sae = SAE.load_from_disk(folder)
    return Loaded(sae.encode, sae.decode)


def load_sparsify(folder: Path) -> Loaded:
    """By sparsify; its latents come as places and values."""
    from sparsify import SparseCoder

    return of_sparsify(SparseCoder.load_from_disk(folder))


def of_sparsify(sae: Any) -> Loaded:
    """Dense latents of a SparseCoder; it decodes those that are there."""

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        z = x.new_zeros(len(x), sae.num_latents)
        return z.scatter(1, found.top_indices, found.top_acts)

    def decode(z: Tensor) -> Tensor:
        values, places = z.topk(sae.cfg.k, dim=1)
        return sae.decode(values, places)

    return Loaded(encode, decode)


def load_dictionary_learning(folder: Path) -> Loaded:
    """By dictionary_learning."""
    stub_nnsight()
    from dictionary_learning.utils import load_dictionary

    found, _ = load_dictionary(str(folder), "cpu")
    return Loaded(found.encode, found.decode)


LOADERS = {"saelens": load_saelens, "sparsify": load_sparsify,
           "dictionary_learning": load_dictionary_learning}  # fmt: skip


def rows_of_features() -> Tensor:
    """Sparse sums of a few directions, about a mean: what a small SAE can learn."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(SMALL_M, SMALL_D, generator=generator)
    on = torch.rand(4096, SMALL_M, generator=generator) < 0.08
    sizes = torch.rand(4096, SMALL_M, generator=generator) + 0.5
    return (on * sizes) @ atoms + 0.5


def fitted(module: Any, run: Callable[[Tensor], Tensor]) -> Any:
    """A peer's module after 300 steps on its own reconstruction error."""
    rows, generator = rows_of_features(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 3e-3)
    for _ in range(300):
        x = rows[torch.randint(len(rows), (256,), generator=generator)]
        loss = (run(x) - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


def ones(_: Loaded) -> Tensor:
    """Latents are in the units they have there."""
    return torch.ones(SMALL_M)


def norms(other: Loaded) -> Tensor:
    """Latents are z ||w|| here: what one of them alone adds."""
    with torch.no_grad():
        some = other.decode(FAR * torch.eye(SMALL_M)) - other.decode(torch.zeros(1, SMALL_M))
    return some.norm(dim=1) / FAR


Save = Callable[[Path], tuple[Loaded, Tensor]]


def made_by_peers() -> Iterator[tuple[str, Save, Callable[[Loaded], Tensor]]]:
    """SAEs of the peers: a name, what saves one and hands it over, and units of its latents."""
    for kind in ("standard", "gated", "topk", "jumprelu"):
        yield (
            f"saelens_{kind}",
            lambda folder, kind=kind: save_saelens(kind, folder),
            (ones if kind == "topk" else norms),
        )
    yield "sparsify_topk", save_sparsify, ones
    for kind in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK",
                 "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):  # fmt: skip
        yield (
            f"dictionary_learning_{kind}",
            (lambda folder, kind=kind: save_dictionary(kind, folder)),
            (ones if kind == "AutoEncoderTopK" else norms),
        )


def save_saelens(kind: str, folder: Path) -> tuple[Loaded, Tensor]:
    """An SAE of SAELens."""
    from sae_lens import SAE

    torch.manual_seed(0)
    said = {"architecture": kind, "d_in": SMALL_D, "d_sae": SMALL_M, "dtype": "float32",
            "device": "cpu", "metadata": {"model_name": "none/such",
                                          "hook_name": "blocks.1.hook_mlp_out"}}  # fmt: skip
    sae = SAE.from_dict(said | ({"k": 4} if kind == "topk" else {}))
    if kind == "jumprelu":
        sae.threshold.data.uniform_(0.01, 0.2)
    fitted(sae, sae)
    sae.save_model(folder)
    sae = SAE.load_from_disk(folder)
    return Loaded(sae.encode, sae.decode), rows_of_features()


def save_sparsify(folder: Path) -> tuple[Loaded, Tensor]:
    """A SparseCoder."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    torch.manual_seed(0)
    sae = SparseCoder(SMALL_D, SparseCoderConfig(num_latents=SMALL_M, k=4))
    fitted(sae, lambda x: sae(x).sae_out)
    sae.save_to_disk(folder)
    return of_sparsify(SparseCoder.load_from_disk(folder)), rows_of_features()


def save_dictionary(kind: str, folder: Path) -> tuple[Loaded, Tensor]:
    """A dictionary of dictionary_learning."""
    stub_nnsight()
    import dictionary_learning.dictionary as plain
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
    from dictionary_learning.utils import load_dictionary

    torch.manual_seed(0)
    more: dict[str, tuple[Any, ...]] = {"AutoEncoderTopK": (4,), "BatchTopKSAE": (4,),
            "MatryoshkaBatchTopKSAE": (4, [SMALL_M // 4, SMALL_M - SMALL_M // 4])}  # fmt: skip
    places = (plain, top_k, batch_top_k, matryoshka_batch_top_k)
    made = next(getattr(p, kind) for p in places if hasattr(p, kind))
    sae = made(SMALL_D, SMALL_M, *more.get(kind, ()))
    if kind.endswith("BatchTopKSAE"):
        sae.threshold.fill_(0.3)
    fitted(sae, sae)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(sae.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": kind, "lm_name": "none/such", "layer": 1, "k": 4,
               "submodule_name": "mlp_out_layer_1"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    if kind == "AutoEncoder":  # its loader moves norms first
        sae.normalize_decoder()
    else:
        sae, _ = load_dictionary(str(folder), "cpu")
    return Loaded(sae.encode, sae.decode), rows_of_features()


def main() -> int:
    """Run both halves; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--there", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.there is not None:
        return min(1, there(given.there, given.record))
    from peers import ensure

    peers = ensure()
    sys.stdout.write(f"{json.dumps(peers.versions)}\n")
    if peers.python is None or len(peers.versions) < 4:
        sys.stderr.write(f"peers are missing: {'; '.join(peers.notes)}\n")
        return 1
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for text, options in texts().items():
            for line in exported(trained(text, options, work), work, given.tokens):
                sys.stdout.write(f"refused {line}\n")
        sys.stdout.flush()
        command = [peers.python, __file__, "--there", str(work)]
        command += ["--record", str(given.record)] if given.record else []
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
