"""One training step of every implementation compared by head_step_peers.py.

Each takes the rows `x`, the number of latents and k, and has: `step()`, its project's own training
step; `l0()`, latents that fire per token; `biases`, what `settle` shifts; `parameters` and
`optimizer`. Penalties and the rest are each project's defaults. Nothing is dead, so nobody runs
AuxK; the learning rate is next to nothing for all, so that L0 stays where it is.
"""

from typing import Any

import torch
from torch import Tensor

from kanllama_lightning import heads
from kanllama_lightning.heads.penalties import Penalised
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule

LR = 1e-7
LATE = 10_000
"""Step that dictionary_learning is told it is at: past its warm-ups and its first threshold."""
STEPS = 100_000


class Ours:
    """As the module steps: forward, losses, statistics, backward, projection, clipping, Adam."""

    kinds = ("TopK", "BatchTopK", "Standard", "Gated", "JumpReLU")

    def __init__(self, kind: str, x: Tensor, d_sae: int, k: int) -> None:
        self.head: Any = getattr(heads, kind)(d_model=x.shape[1], d_sae=d_sae, target_l0=k)
        self.head.start_(x)
        self.x, self.parameters = x, list(self.head.parameters())
        schedule = Schedule(300_000_000, len(x))
        self.trainee = HeadTrainer("", self.head, schedule, clip_ratio=5.0)
        self.optimizer = Adam(self.parameters, lr=LR, fused=True)
        self.biases = [self.head.encoder.b_enc]
        if kind == "Gated":
            self.biases.append(self.head.selection.b_mag)

    def step(self) -> None:
        """One step, without Lightning around it."""
        self.optimizer.zero_grad()
        losses, out = self.trainee.step(self.x, step=1, progress=0.5)
        loss = torch.stack(list(losses.values())).sum()
        del out, losses
        loss.backward()
        self.head.project_grad_()
        self.trainee.clip_(None, "norm")
        self.optimizer.step()
        self.head.project_()

    @torch.no_grad()
    def l0(self) -> float:
        """Latents per token of a training forward pass."""
        return float(self.head(self.x).codes.l0().float().mean())


class SAELens:
    """SAETrainer.step: training_forward_pass, statistics, backward, clipping at 1, Adam."""

    kinds = ("topk", "batchtopk", "standard", "gated", "jumprelu")

    def __init__(self, kind: str, x: Tensor, d_sae: int, k: int) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer

        training_class, config_class = get_sae_training_class(kind)
        sparsity = {"topk": {"k": k}, "batchtopk": {"k": float(k)}}.get(kind, {})
        self.x = x
        self.sae = training_class(config_class(d_in=x.shape[1], d_sae=d_sae, **sparsity))
        settings = SAETrainerConfig(STEPS * len(x), len(x), lr=LR, lr_end=LR)
        self.trainer = SAETrainer(settings, self.sae, iter(()))
        self.parameters = list(self.sae.parameters())
        self.optimizer = self.trainer.optimizer
        gated = kind == "gated"
        self.biases = [self.sae.b_gate, self.sae.b_mag] if gated else [self.sae.b_enc]

    def step(self) -> None:
        """One step."""
        self.trainer.step(self.x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def l0(self) -> float:
        """Latents per token of a training forward pass."""
        acts, _ = self.sae.encode_with_hidden_pre(self.x)
        return float((acts != 0).float().sum(1).mean())


class DictionaryLearning:
    """trainer.update of the trainer of each kind; loss.item() included, as it is there."""

    kinds = ("TopK", "BatchTopK", "Standard", "GatedSAE", "JumpRelu")

    def __init__(self, kind: str, x: Tensor, d_sae: int, k: int) -> None:
        from dictionary_learning import trainers

        trainer = getattr(trainers, f"{kind}Trainer")
        sparsity = {"k": k} if "TopK" in kind else {}
        sparsity |= {"target_l0": float(k)} if kind == "JumpRelu" else {}
        self.x = x
        shape = {"steps": STEPS, "activation_dim": x.shape[1], "dict_size": d_sae}
        where = {"layer": 1, "lm_name": "none", "device": "cpu"}
        self.trainer = trainer(**shape, **sparsity, **where, lr=LR)
        self.kind, self.dictionary = kind, self.trainer.ae
        self.trainer.update(0, x)  # sets b_dec where it is set from data
        self.parameters = list(self.dictionary.parameters())
        self.optimizer = self.trainer.optimizer
        if kind == "GatedSAE":
            self.biases = [self.dictionary.gate_bias, self.dictionary.mag_bias]
        else:
            has_linear = hasattr(self.dictionary, "encoder")
            self.biases = [self.dictionary.encoder.bias if has_linear else self.dictionary.b_enc]

    def step(self) -> None:
        """One step."""
        self.trainer.update(LATE, self.x)

    @torch.no_grad()
    def l0(self) -> float:
        """Latents per token as in training."""
        how = {"use_threshold": False} if "TopK" in self.kind else {}
        return float((self.dictionary.encode(self.x, **how) != 0).float().sum(1).mean())


class Sparsify:
    """What sparsify's Trainer.fit does with one batch of activations and Adam, in its order."""

    kinds = ("topk",)

    def __init__(self, kind: str, x: Tensor, d_sae: int, k: int) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        self.x = x
        config = SparseCoderConfig(num_latents=d_sae, k=k)
        self.coder = SparseCoder(x.shape[1], config, device=x.device)
        self.coder.b_dec.data = x.mean(0)
        self.parameters = list(self.coder.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR)
        self.silent_tokens = torch.zeros(d_sae, dtype=torch.long, device=x.device)
        self.fired = torch.zeros(d_sae, dtype=torch.bool, device=x.device)
        self.biases = [self.coder.encoder.bias]

    def step(self) -> None:
        """One step."""
        kept = torch.ones(len(self.x), dtype=torch.bool, device=self.x.device)
        x = self.x[kept]  # the trainer copies the batch as well when it masks tokens
        self.coder.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        out = self.coder(x=x, y=x, dead_mask=None, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.silent_tokens += len(x)
        self.silent_tokens[self.fired] = 0
        self.fired.zero_()

    @torch.no_grad()
    def l0(self) -> float:
        """Latents per token."""
        return float((self.coder.encode(self.x).top_acts != 0).float().sum(1).mean())


Contestant = Ours | SAELens | DictionaryLearning | Sparsify

KINDS: dict[str, dict[str, tuple[type[Contestant], str]]] = {
    ours: {
        "ours": (Ours, ours),
        "sae_lens": (SAELens, theirs),
        "dictionary_learning": (DictionaryLearning, its),
        **({"sparsify": (Sparsify, "topk")} if ours == "TopK" else {}),
    }
    for ours, theirs, its in zip(Ours.kinds, SAELens.kinds, DictionaryLearning.kinds, strict=True)
}
"""For every kind of head: who has it, and under which name."""


def is_penalised(kind: str) -> bool:
    """Whether a penalty, not a selection, makes this kind sparse."""
    small = getattr(heads, kind)(d_model=2, d_sae=4, target_l0=1)
    return isinstance(small.selection, Penalised)


@torch.no_grad()
def settle(contestant: Contestant, k: int) -> None:
    """Shift the encoder's biases, all by the same, so that k latents per token fire.

    What a penalty would have done by the end of training; found by bisection.
    """
    start = [bias.detach().clone() for bias in contestant.biases]
    low, high = -1e2, 1e2
    for _ in range(24):
        middle = (low + high) / 2
        for bias, value in zip(contestant.biases, start, strict=True):
            bias.copy_(value + middle)
        low, high = (middle, high) if contestant.l0() < k else (low, middle)
