"""The half of `exchange_parity.py` that runs among the peers; its docstring says what it is for.

Their interpreter has no Lightning. What it needs of this project is the heads and the formats.
"""

import argparse
import json
import sys
import types
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SMALL_D, SMALL_M = 16, 32
FAR = 1024.0
"""An activation beside which b_dec is small."""
D_SAE, L0, STEPS, BATCH = 256, 8, 300, 512
"""Of the SAEs that the peers' trainers make."""
FIGURES, LOSSES = "figures.json", "losses.safetensors"
PUBLISHED = ("batchtopk", "kanencoder")
"""Heads of the run on the embedded model that are read from a hub."""
Coder = Callable[[Tensor], Tensor]


class Loaded(NamedTuple):
    """An SAE in the hands of its own code."""

    encode: Coder
    decode: Coder
    base: Coder | None = None
    """What a transcoder's skip adds to a reconstruction."""


def there(work: Path, record: Path | None) -> int:
    """Compare heads with their exports, make SAEs and their figures; how many differ."""
    from kanllama_lightning.exchange.agreement import agreement, made_rows
    from kanllama_lightning.exchange.formats import FORMATS, read_foreign
    from kanllama_lightning.heads import SAEHead

    torch.set_num_threads(1)
    wrong = 0

    def tell(name: str, head: Any, other: Loaded, x: Tensor, exactly: bool) -> None:
        nonlocal wrong
        found = agreement(head, other.encode, other.decode, x, other.base)
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
                    tell(f"{run.name} {member.name} in {name}", head, other, x, whole)
                    if (member / FIGURES).is_file() and name == "saelens":
                        wrong += not evaluated(f"{run.name} {member.name}", work / run.name, member)
    x = load_file(work / "embedded" / "x.safetensors")["x"]
    for name in PUBLISHED:
        head = SAEHead.load(work / "out" / "embedded" / name / "head")
        other = of_saelens(from_hub(name))
        tell(f"{name} from a hub in saelens", head, other, x, name == "kanencoder")
    for name, save, factor in made_by_peers():
        folder = (record or work / "in") / name
        other, rows = save(folder)
        head, _ = read_foreign(folder)
        x = torch.cat([rows[:500], made_rows(head, 5000)])
        scaled = Loaded(lambda x, o=other, f=factor: o.encode(x) * f(o),
                        lambda z, o=other, f=factor: o.decode(z / f(o)), other.base)  # fmt: skip
        tell(f"{name}, made there and read here", head, scaled, x, False)
        if record is not None:
            with torch.no_grad():
                x = torch.cat([rows[:16], made_rows(head, 16)])
                z = scaled.encode(x)
                x_hat = scaled.decode(z) + (0 if other.base is None else other.base(x))
                save_file({"x": x, "z": z, "x_hat": x_hat}, folder / "seen.safetensors")
    for train in (train_saelens, train_dictionary_learning, train_sparsify):
        train(work / "embedded", work / "trained")
    return wrong


# ------------------------------------------------------------------------------------------ loading


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

    return of_saelens(SAE.load_from_disk(folder))


def from_hub(name: str) -> Any:
    """What was published, by SAELens' own client, as the model card says."""
    from sae_lens import SAE

    import kanllama_lightning.exchange.saelens_plugin  # noqa: F401

    return SAE.from_pretrained(f"me/{name}", "saelens")


def of_saelens(sae: Any) -> Loaded:
    """An SAE; or a transcoder, given what it reads and, beside it, what it is to write."""
    if not sae.cfg.metadata.hook_name_out:
        return Loaded(sae.encode, sae.decode)
    d = sae.cfg.d_in
    if hasattr(sae, "head"):  # by our plug-in
        return Loaded(lambda x: sae.encode(x[:, :d]), sae.decode, lambda x: sae.beside(x[:, :d]))
    return Loaded(
        lambda x: sae.encode(x[:, :d]),
        sae.decode,
        lambda x: sae(x[:, :d]) - sae.decode(sae.encode(x[:, :d])),
    )


def load_sparsify(folder: Path) -> Loaded:
    """By sparsify; its latents come as places and values."""
    from sparsify import SparseCoder

    return of_sparsify(SparseCoder.load_from_disk(folder))


def of_sparsify(sae: Any) -> Loaded:
    """Dense latents of a SparseCoder; it decodes those that are there."""
    d = sae.d_in

    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x[:, :d])
        z = x.new_zeros(len(x), sae.num_latents)
        return z.scatter(1, found.top_indices, found.top_acts)

    def decode(z: Tensor) -> Tensor:
        values, places = z.topk(sae.cfg.k, dim=1)
        return sae.decode(values, places)

    def base(x: Tensor) -> Tensor:
        return x[:, :d] @ sae.W_skip.mT

    return Loaded(encode, decode, None if sae.W_skip is None else base)


def load_dictionary_learning(folder: Path) -> Loaded:
    """By dictionary_learning."""
    stub_nnsight()
    from dictionary_learning.utils import load_dictionary

    found, _ = load_dictionary(str(folder), "cpu")
    return Loaded(found.encode, found.decode)


LOADERS = {"saelens": load_saelens, "sparsify": load_sparsify,
           "dictionary_learning": load_dictionary_learning}  # fmt: skip


# --------------------------------------------------------------------- evaluation by SAELens itself


class Tokens:
    """The part of an ActivationsStore that SAELens' evaluation asks for, with these rows."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.context_size, self.store_batch_size_prompts = ids, ids.shape[1], len(ids)

    def get_batch_tokens(self, n: int) -> Tensor:
        """All of them, each time."""
        return self.ids[:n]

    def reset_input_dataset(self) -> None:
        """They begin anew by themselves."""


def saelens_figures(folder: Path, run: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """SAELens' own evaluation of an SAE, and the loss at every position where we count it.

    Args:
        folder: The SAE.
        run: The folder with the tokens, and which of them count.
    """
    from sae_lens import SAE, SAETransformerBridge
    from sae_lens.evals import get_eval_everything_config, get_recons_loss, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    import kanllama_lightning.exchange.saelens_plugin  # noqa: F401

    seen, sae = load_file(run / "tokens.safetensors"), SAE.load_from_disk(folder)
    lm = SAETransformerBridge.boot_transformers((run / "lm.txt").read_text(), device="cpu")
    ids, special = seen["ids"], sorted(set(seen["ids"][seen["keep"] == 0].tolist()))
    row, pos = seen["row"], seen["pos"]
    if sae.cfg.metadata.hook_name_out:
        clean, spliced = transcoded(sae, lm, ids)
        return {}, {"ce_clean": clean[row, pos], "ce_recon": spliced[row, pos]}
    # an alias reaches no hook there, and then the evaluation is of the untouched LM
    sae.cfg.metadata.hook_name = lm._resolve_hook_name(sae.cfg.metadata.hook_name)
    how = get_eval_everything_config(len(ids), 1, 1)
    how.compute_featurewise_weight_based_metrics = False  # a curved dictionary has no W_dec
    scaler: Any = ActivationScaler()
    every, _ = run_evals(sae, Tokens(ids), lm, scaler, how, exclude_special_tokens=special)
    found = {k: v for group in every.values() for k, v in group.items()}
    each = get_recons_loss(sae, lm, scaler, ids, False, True, special)
    names = {"ce_clean": "ce_loss_without_sae", "ce_recon": "ce_loss_with_sae",
             "ce_zero": "ce_loss_with_ablation"}  # fmt: skip
    losses = {ours: each[theirs][row, pos] for ours, theirs in names.items()}
    return {k: v for k, v in found.items() if isinstance(v, float)}, losses


@torch.no_grad()
def transcoded(sae: Any, lm: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the LM, untouched and with a transcoder in the place of the MLP.

    SAELens' evaluation would write what a transcoder reads, and its `run_with_saes` leaves out a
    skip connection; so its hooks and the transcoder's own forward pass are put together here.
    """
    read: list[Tensor] = []
    names = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out
    hooks = [
        (lm._resolve_hook_name(names[0]), lambda acts, hook: read.append(acts)),  # noqa: ARG005
        (lm._resolve_hook_name(names[1]), lambda acts, hook: sae(read.pop())),  # noqa: ARG005
    ]
    how = {"return_type": "loss", "loss_per_token": True}
    return lm(ids, **how), lm.run_with_hooks(ids, fwd_hooks=hooks, **how)


def evaluated(name: str, run: Path, member: Path) -> bool:
    """Whether SAELens' evaluation of an export has our figures."""
    found, losses = saelens_figures(member / "saelens", run)
    ours = json.loads((member / FIGURES).read_text())
    return same(f"{name}, evaluated by SAELens", ours, found, load_file(member / LOSSES), losses)


def same(
    name: str,
    ours: dict[str, float],
    theirs: dict[str, float],
    our_losses: dict[str, Tensor],
    their_losses: dict[str, Tensor],
) -> bool:
    """Say whether figures that are defined alike agree, and which are not.

    Zero ablation is not: theirs has zeros at special tokens too. So is the mean loss: theirs counts
    the position before a special token, and before another document.
    """
    fits, said = True, []
    for key in ("l0", "explained_variance", "frac_variance_explained", "fvu"):
        if key in theirs:
            fits &= abs(ours[key] - theirs[key]) <= 2e-5 * max(1, abs(ours[key]))
            said.append(f"{key} {ours[key]:.6f} here, {theirs[key]:.6f} there")
    for key in ("ce_clean", "ce_recon"):
        if key in their_losses:
            apart = (our_losses[key].double() - their_losses[key].double()).abs()
            # an activation at its threshold fires in one of two runs of the LM, rounded otherwise,
            # and changes what comes after it in its row
            row = our_losses["row"]
            far, rows = row[apart > 5e-4].unique().numel(), row.unique().numel()
            fits &= far <= 0.1 * rows and float(apart.mean()) <= 1e-4
            mean = float(our_losses[key].double().mean())
            said.append(
                f"{key} {mean:.6f} here, {float(apart.mean()):.1e} apart at a token, "
                f"{float(apart.max()):.1e} at most, in {far} of {rows} rows over 5e-4"
            )
    if "ce_loss_with_sae" in theirs:
        said.append(
            f"[their own mean of it {theirs['ce_loss_with_sae']:.6f}; zeros: "
            f"{float(our_losses['ce_zero'].double().mean()):.4f} here, "
            f"{theirs['ce_loss_with_ablation']:.4f} there]"
        )
    sys.stdout.write(f"{'ok   ' if fits and said else 'WRONG'} {name}: {'; '.join(said)}\n")
    sys.stdout.flush()
    return fits and bool(said)


# ------------------------------------------------------------- small SAEs of every class, to record


def rows_of_features() -> Tensor:
    """Sparse sums of a few directions, about a mean: what a small SAE can learn."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(SMALL_M, SMALL_D, generator=generator)
    on = torch.rand(4096, SMALL_M, generator=generator) < 0.08
    sizes = torch.rand(4096, SMALL_M, generator=generator) + 0.5
    return (on * sizes) @ atoms + 0.5


def pairs_of_features() -> Tensor:
    """The same, and beside it what a bent map makes of it: for a transcoder."""
    read = rows_of_features()
    generator = torch.Generator().manual_seed(2)
    turn = torch.randn(SMALL_D, SMALL_D, generator=generator) / SMALL_D**0.5
    return torch.cat([read, (read @ turn).relu() - 0.3 * read], 1)


def fitted(module: Any, run: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Any:
    """A peer's module after 300 steps on its own reconstruction error."""
    rows = rows_of_features() if rows is None else rows
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 3e-3)
    for _ in range(300):
        x = rows[torch.randint(len(rows), (256,), generator=generator)]
        loss = (run(x[:, :SMALL_D]) - x[:, -SMALL_D:]).square().sum(1).mean()
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
    for kind in ("standard", "gated", "topk", "jumprelu", "transcoder", "skip_transcoder",
                 "jumprelu_transcoder", "jumprelu_skip_transcoder"):  # fmt: skip
        yield (
            f"saelens_{kind}",
            lambda folder, kind=kind: save_saelens(kind, folder),
            (ones if kind == "topk" else norms),
        )
    for kind in ("topk", "transcoder", "skip_transcoder"):
        yield (
            f"sparsify_{kind}",
            lambda folder, kind=kind: save_sparsify(kind, folder),
            ones,
        )
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
    transcoder = "transcoder" in kind
    metadata = {"model_name": "none/such", "hook_name": "blocks.1.hook_mlp_out"}
    if transcoder:
        metadata |= {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    said = {"architecture": kind, "d_in": SMALL_D, "d_sae": SMALL_M, "dtype": "float32",
            "device": "cpu", "metadata": metadata}  # fmt: skip
    more: dict[str, Any] = {"k": 4} if kind == "topk" else {}
    if transcoder:
        more = {"d_out": SMALL_D, "apply_b_dec_to_input": False}
    sae = SAE.from_dict(said | more)
    if "jumprelu" in kind:
        sae.threshold.data.uniform_(0.01, 0.2)
    rows = pairs_of_features() if transcoder else rows_of_features()
    fitted(sae, sae, rows)
    sae.save_model(folder)
    return of_saelens(SAE.load_from_disk(folder)), rows


def save_sparsify(kind: str, folder: Path) -> tuple[Loaded, Tensor]:
    """A SparseCoder."""
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    torch.manual_seed(0)
    transcoder = kind != "topk"
    said = SparseCoderConfig(
        num_latents=SMALL_M, k=4, transcode=transcoder, skip_connection=kind == "skip_transcoder"
    )
    sae = SparseCoder(SMALL_D, said)
    rows = pairs_of_features() if transcoder else rows_of_features()
    fitted(sae, lambda x: sae(x).sae_out, rows)
    sae.save_to_disk(folder)
    return of_sparsify(SparseCoder.load_from_disk(folder)), rows


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


# --------------------------------------------------------- SAEs by the peers' trainers, and figures


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Without end, shuffled once."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return cycle(rows[order].split(BATCH)[: len(rows) // BATCH])


def put_figures(
    folder: Path, figures: dict[str, float], losses: dict[str, Tensor] | None = None
) -> None:
    """What a project's own code makes of its SAE, beside it."""
    (folder / FIGURES).write_text(json.dumps(figures))
    save_file({k: v.contiguous() for k, v in (losses or {}).items()}, folder / LOSSES)


def train_saelens(run: Path, out: Path) -> None:
    """By SAELens' SAETrainer; figures of its evaluation."""
    from sae_lens import TrainingSAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    x = load_file(run / "plain.safetensors")["x"]
    more: dict[str, dict[str, Any]] = {
        "standard": {"l1_coefficient": 0.5},
        "gated": {"l1_coefficient": 0.5},
        "topk": {"k": L0},
        "jumprelu": {"l0_coefficient": 0.1, "jumprelu_bandwidth": 0.05},
        "batchtopk": {"k": L0},
        "matryoshka_batchtopk": {"k": L0, "matryoshka_widths": [D_SAE // 4, D_SAE]},
    }
    for kind, own in more.items():
        torch.manual_seed(0)
        said = {"architecture": kind, "d_in": x.shape[1], "d_sae": D_SAE, "dtype": "float32",
                "device": "cpu", "metadata": {"model_name": (run / "lm.txt").read_text(),
                                              "hook_name": "blocks.1.hook_mlp_out"}}  # fmt: skip
        sae = TrainingSAE.from_dict(said | own)
        how = SAETrainerConfig(STEPS * BATCH, BATCH, lr=3e-3, lr_end=3e-4)
        folder = out / f"saelens_{kind}"
        SAETrainer(how, sae, batches(x)).fit().save_inference_model(folder)
        put_figures(folder, *saelens_figures(folder, run))


def train_dictionary_learning(run: Path, out: Path) -> None:
    """By dictionary_learning's trainSAE; figures of its evaluate."""
    stub_nnsight()
    from dictionary_learning.evaluation import evaluate
    from dictionary_learning.trainers import (
        batch_top_k,
        gated_anneal,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        p_anneal,
        standard,
        top_k,
    )
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    x = load_file(run / "plain.safetensors")["x"]
    penalty = {"warmup_steps": 20, "sparsity_warmup_steps": 50}
    k = {"k": L0, "warmup_steps": 20, "threshold_start_step": 50}
    anneal = penalty | {"anneal_start": 100, "p_end": 0.2}
    kinds: list[tuple[Any, dict[str, Any]]] = [
        (standard.StandardTrainer, penalty),
        (standard.StandardTrainerAprilUpdate, penalty),
        (gdm.GatedSAETrainer, penalty | {"lr": 3e-3}),
        (p_anneal.PAnnealTrainer, anneal),
        (gated_anneal.GatedAnnealTrainer, anneal),
        (jumprelu.JumpReluTrainer, penalty | {"lr": 3e-3, "target_l0": L0}),
        (top_k.TopKTrainer, k),
        (batch_top_k.BatchTopKTrainer, k),
        (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, k | {"group_fractions": [0.25, 0.75]}),
    ]
    for trainer, own in kinds:
        said = {"trainer": trainer, "steps": STEPS, "activation_dim": x.shape[1],
                "dict_size": D_SAE, "layer": 1, "lm_name": "none/such", "seed": 0,
                "device": "cpu"} | own  # fmt: skip
        made = out / f"dictionary_learning_{trainer.__name__}"
        trainSAE(batches(x), [said], STEPS, save_dir=str(made), device="cpu")
        folder = made / "trainer_0"
        with torch.no_grad():
            found = evaluate(load_dictionary(str(folder), "cpu")[0], iter([x]))
        put_figures(folder, {key: float(value) for key, value in found.items()})


def train_sparsify(run: Path, out: Path) -> None:
    """By sparsify's Trainer: an SAE, and transcoders of the block's MLP; figures of its forward."""
    from datasets import Dataset
    from sparsify import SparseCoder, TrainConfig, Trainer
    from sparsify.config import SparseCoderConfig
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained((run / "lm.txt").read_text())
    seen = load_file(run / "tokens.safetensors")
    special = sorted(set(seen["ids"][seen["keep"] == 0].tolist()))
    data = Dataset.from_dict({"input_ids": seen["ids"].repeat(20, 1)}).with_format("torch")
    for name, own in (("sae", {}), ("transcoder", {"transcode": True}),
                      ("skip", {"transcode": True, "skip_connection": True})):  # fmt: skip
        said = TrainConfig(
            SparseCoderConfig(num_latents=D_SAE, k=L0, **own), batch_size=4, log_to_wandb=False,
            hookpoints=["layers.1.mlp"], exclude_tokens=special, save_dir=str(out),
            run_name=f"sparsify_{name}",
        )  # fmt: skip
        Trainer(said, data, lm).fit()
        folder = out / f"sparsify_{name}" / "layers.1.mlp"
        sae = SparseCoder.load_from_disk(folder)
        source = run if name == "sae" else run.parent / f"{run.name}_transcoder"
        x = load_file(source / "plain.safetensors")["x"]
        with torch.no_grad():
            found = sae(x[:, : sae.d_in], x[:, -sae.d_in :])
        l0 = float((found.latent_acts != 0).sum(1).float().mean())
        put_figures(folder, {"fvu": float(found.fvu), "l0": l0})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    sys.exit(min(1, there(given.work, given.record)))
