"""Trains heads of real sizes for a few steps on the fake device, and prints what that asked of it.

    python -m tests.fake_cuda.step HEAD D_SAE N_DEAD [HEAD D_SAE N_DEAD ...]

One line of JSON for each head; HEAD+FAULT plants a fault of `planted` in its encoder. What runs is
`SAEModule` itself: start, buffer, steps with AuxK, clipping and the optimizer, calibration and a
validation step, called as Lightning calls them. The LM is a Llama of one block. No number is
computed: the device holds shapes alone.
"""

# ruff: noqa: E402, T201 (the device comes before torch)
from tests.fake_cuda import device

device.load()

import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from kanllama_lightning import heads
from kanllama_lightning.functional import spline_activation
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.lm.hook_points import parse_hook_point
from kanllama_lightning.training.clock import StepClock
from kanllama_lightning.training.head_trainer import NEVER
from kanllama_lightning.training.module import SAEModule
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.types import TokenBatch
from tests.fake_cuda.planted import planted
from tests.fake_cuda.recorder import Counts, Place, Recorder, pretend

DEVICE = torch.device("cuda:0")
D_MODEL, BATCH, K = 2048, 4096, 64
SEQS, LENGTH = 8, 512
WARM, LOOKED_AT = (0, 10, 20), (21, 30)
"""Steps that come first (start, and two looks for dead latents), and those that are counted: one
like most, and one that looks for dead latents. None of the latter logs."""
GIB = 2**30


class Case:
    """A head, and how many entries are found in what depends on values.

    Args:
        head: Its class.
        d_sae: Latents.
        n_dead: Dead ones.
    """

    def __init__(self, head: str, d_sae: int, n_dead: int) -> None:
        self.head, self.d_sae, self.n_dead = head, d_sae, n_dead

    def size(self, at: Place, mask: Tensor) -> int:
        """Entries of a mask: k a token of activations, half of what is asked for its sign alone."""
        n = mask.numel()
        if "dead" in at.text:
            return self.n_dead
        if n == SEQS * LENGTH:
            return SEQS * (LENGTH - 1)  # all but BOS
        if "== cutoff" in at.text:
            return 1
        if "> 0)" in at.text and n > BATCH * K:
            return n // 2
        if at.where.startswith("heads/decoders.py") and self.n_dead:
            return BATCH * min(self.n_dead, D_MODEL // 2)
        return min(n, BATCH * K)

    def value(self, at: Place, number: Tensor) -> Any:
        """What reading a number gives: all is finite, nothing is dropped, no loss is off."""
        if number.dtype == torch.bool:
            return True
        if number.dtype.is_floating_point:
            return 1.0
        if "smallest(found)" in at.text:
            return 0 if number.storage_offset() else NEVER
        if "n_kept" in at.text:
            return SEQS * (LENGTH - 1)
        return self.n_dead if "dead" in at.text else 0


class Run:
    """What `SAEModule` asks Lightning's trainer for, of a run on one GPU."""

    precision, log_every_n_steps = "bf16-mixed", 50
    world_size, global_rank, is_global_zero, global_step = 1, 0, True, 0
    gradient_clip_val: float | None = None
    default_root_dir = "."

    def __init__(self) -> None:
        self.callbacks: list[Any] = []
        self.optimizers: list[torch.optim.Optimizer] = []
        self.strategy = SimpleNamespace(root_device=DEVICE, barrier=lambda: None)
        self.datamodule = SimpleNamespace(lm_batch_seqs=SEQS, ctx_len=LENGTH, val_names=["text"])


def onto_device_(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """What `module.to(DEVICE)` would do with tensors that hold numbers, weights in `dtype`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                moved = weight.detach().to(DEVICE, dtype)
                part._parameters[name] = nn.Parameter(moved, weight.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = tensor.to(DEVICE)


def one_block() -> FrozenLM:
    """A Llama of Llama 3.2 1B's width with one block, read behind it."""
    lm = FrozenLM("embedded", "model.layers.0", dtype="bfloat16")
    lm.config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=4 * D_MODEL,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
        pad_token_id=0,
    )
    lm.hook = parse_hook_point("model.layers.0", 1)
    lm.config._attn_implementation = "sdpa"
    lm._model = LlamaForCausalLM(lm.config).requires_grad_(False).eval()
    onto_device_(lm._model, torch.bfloat16)
    return lm


def batches() -> Iterator[tuple[TokenBatch, int, int]]:
    """Token ids without end, as Lightning hands them over."""
    while True:
        ids = torch.zeros(SEQS, LENGTH, dtype=torch.int64)
        keep = torch.ones(SEQS, LENGTH, dtype=torch.bool)
        yield TokenBatch(ids, keep, ids, torch.zeros(3, dtype=torch.int64)), 0, 0


class NoGenerator:
    """Of numbers that are not drawn."""

    def __init__(self, device: Any = None) -> None: ...

    def manual_seed(self, _: int) -> None: ...


def module_of(case: Case, run: Run) -> SAEModule:
    """The module on the device, its buffer allocated, as Lightning has it after `setup`."""
    head = getattr(heads, case.head)(d_model=D_MODEL, d_sae=case.d_sae, target_l0=K)
    module = SAEModule(
        one_block(),
        head,
        partial(Adam, lr=2e-4, fused=True),
        tokens=300_000_000,
        sae_batch_tokens=BATCH,
        start_tokens=8192,
    )
    module.buffer.capacity_tokens, module.buffer.dtype = 8192, torch.bfloat16
    onto_device_(module)
    module._device = DEVICE
    module._trainer = run  # type: ignore[assignment]
    module.log_dict = lambda *_, **__: None  # type: ignore[assignment,method-assign]
    module.clock = StepClock(cuda=True)
    generator, torch.Generator = torch.Generator, NoGenerator  # type: ignore[misc,assignment]
    try:
        module._allocate_buffer()
    finally:
        torch.Generator = generator  # type: ignore[misc]
    return module


def held(module: SAEModule, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that is there whether a step runs or not."""
    lm = module.lm.model
    tensors = [*module.parameters(), *module.buffers(), *lm.parameters(), *lm.buffers()]
    tensors += [module.buffer.held, module.buffer.queue]
    for state in optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, Tensor) and t.is_cuda]
    return tensors


def one_step(module: SAEModule, optimizer: Any, scheduler: Any, text: Any) -> None:
    """The calls of one step, in Lightning's order: gradients are freed behind the forward pass."""

    def closure() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = module.training_step(text)
        optimizer.zero_grad()
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        module.configure_gradient_clipping(optimizer, None, None)
        return loss

    module.optimizer_step(0, 0, optimizer, closure)
    module.on_train_batch_end(None, None, 0)
    scheduler.step()


def summed(counts: Counts) -> dict[str, Any]:
    """What is written of a step."""
    return {
        "syncs": sum(counts.syncs.values()),
        "copies": sum(counts.copies.values()),
        "launches": sum(counts.launches.values()),
        "traffic_gb": round(sum(counts.traffic.values()) / 1e9, 2),
        "lm_launches": counts.lm_launches,
        "where_syncs": dict(counts.syncs),
        "where_copies": dict(counts.copies),
        "where_launches": dict(counts.launches),
        "where_traffic": {k: round(v / 1e9, 2) for k, v in counts.traffic.most_common(30)},
    }


def counted(case: Case, recorder: Recorder) -> dict[str, Any]:
    """Everything that a head asks of the device, from its start to a validation step."""
    recorder.sizes, recorder.values = case.size, case.value
    run, found = Run(), {"head": case.head, "d_sae": case.d_sae, "dead": case.n_dead}
    began = time.perf_counter()
    module = module_of(case, run)
    (optimizer,), (schedule,) = module.configure_optimizers()
    run.optimizers = [optimizer]
    text = batches()
    steps = []
    for run.global_step in (*WARM, *LOOKED_AT):
        recorder.step = run.global_step
        if run.global_step == LOOKED_AT[0]:
            gc.collect()
            recorder.is_state(held(module, optimizer))
        recorder.tracking = run.global_step >= WARM[-1]
        recorder.counts = Counts()
        recorder.restart_peak()
        one_step(module, optimizer, schedule["scheduler"], text)
        if run.global_step in LOOKED_AT:
            steps.append(summed(recorder.counts) | {"peak_gib": round(recorder.peak / GIB, 3)})
            steps[-1]["at_peak"] = [f"{n / 2**20:.0f} MiB {what}" for n, what in recorder.at_peak]
    recorder.tracking = False
    for key in ("syncs", "copies", "launches", "traffic_gb", "peak_gib"):
        found[key] = max(step[key] for step in steps)
    found["launches"] = steps[0]["launches"]  # of a step like most
    found["traffic_gb"] = steps[0]["traffic_gb"]
    state = sum(p.numel() for p in module.parameters()) * 12
    found["state_gib"] = round(state / GIB, 3)
    module.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        module.on_validation_start()
        module.validation_step(next(text)[0].to(DEVICE), 0)
    found["steps"], found["seconds"] = steps, round(time.perf_counter() - began, 1)
    return found


def main(asked: list[str]) -> None:
    """Run the cases and print their lines."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(lambda *_: 0, lambda *_: 0)
    pretend(recorder)
    spline_activation._jit = recorder.compiled  # type: ignore[assignment]
    for head, d_sae, n_dead in zip(asked[::3], asked[1::3], asked[2::3], strict=True):
        head, _, fault = head.partition("+")
        case = Case(head, int(d_sae), int(n_dead))
        try:
            with mode, recorder, planted(fault):
                found = counted(case, recorder)
        except Exception as e:
            found = {"head": head, "d_sae": case.d_sae, "dead": case.n_dead}
            found |= {"error": f"{type(e).__name__}: {str(e)[:600]}"}
            found["trace"] = traceback.format_exc()[-3000:]
        gc.collect()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    import os

    os._exit(0)  # the device's threads do not end by themselves
