"""Twelve checks of a GPU's results, and what of them a CPU can show of itself.

    .venv/bin/python -m pytest -m gpu tests/gpu    # where a GPU is: under three minutes
    .venv/bin/python -m pytest tests/gpu           # anywhere: the CPU's part

Each check holds a device against the CPU in fp64: the same code, in which what says fp32 is fp64
(`exact`). Errors are relative, ||found - exact|| / ||exact||, and NaN fails. Where a check is one
of precision, the CPU in fp32 or bf16 is held against fp64 too; what only a GPU has (its waits,
launches and memory) is skipped without one.
"""

import copy
import gc
import json
import math
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from kanllama_lightning import heads
from kanllama_lightning.functional import kernels
from kanllama_lightning.functional.losses import fvu
from kanllama_lightning.functional.sparse import Pattern, largest_positive
from kanllama_lightning.functional.spline_activation import spline_activation
from kanllama_lightning.functional.splines import kan_linear
from kanllama_lightning.heads.selections import Selecting, TokenTopK
from kanllama_lightning.lm.frozen import FrozenLM
from kanllama_lightning.runs.checkpoints import buffer_file, checkpoints, seal
from kanllama_lightning.runs.seals import written
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule
from tests.conftest import Finished, Fit, only_run, terminate_at, word_tokenizer
from tests.shapes import unchecked
from train import main

MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
)
GPU = pytest.param("cuda", marks=MARKS)
on_both = pytest.mark.parametrize("device", ["cpu", GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
FORMS = [pytest.param("cuda", form, marks=MARKS) for form in ("eager", "kernel", "compiled")]
TRAINED = [name for name in heads.__all__ if name not in ("PCA", "SAEHead", "LinearMap")]
D, SAE, K, ROWS = 32, 256, 8, 256
"""Width, latents, latents per token and rows of the checks of heads."""
LAUNCHES = {"TopK": 150, "BatchTopK": 150, "KANEncoder": 250, "Gated": 400}
"""Most kernels that a step of a head may launch."""
WAITS = 0
"""Most times that a step may wait for the device."""


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; infinite where anything found is not finite."""
    found, exact = found.detach().cpu().double(), exact.detach().cpu().double()
    off = (found - exact).norm()
    size = exact.norm()
    if not off.isfinite():
        return math.inf
    return float(off / size) if size > 0 else float(off > 0)


@contextmanager
def exact() -> Iterator[None]:
    """Within it, code that makes fp32 makes fp64."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, unchecked():
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def data(rows: int = ROWS, seed: int = 0) -> Tensor:
    """Rows with a few strong directions, away from the origin."""
    generator = torch.Generator().manual_seed(seed)
    fp32 = {"generator": generator, "dtype": torch.float32}  # the same numbers within `exact`
    sources = torch.randn(rows, 12, **fp32).relu()
    noise = torch.randn(rows, D, **fp32)
    generator.manual_seed(99)
    return sources @ torch.randn(12, D, **fp32) + 0.1 * noise + 1


def started(kind: str) -> heads.SAEHead:
    """A head of this kind, started, and then moved so that none of its parts is zero."""
    torch.manual_seed(0)
    head: heads.SAEHead = getattr(heads, kind)(d_model=D, d_sae=SAE, target_l0=K)
    head.start_(data(2048))
    with torch.no_grad():
        for p in head.parameters():
            p += 0.02 * p.std().nan_to_num(0).clamp_min(0.1) * torch.randn_like(p)
    head.project_()
    return head


class Chosen:
    """A selection that is made once and then kept, on whatever device."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def on(self, head: Any) -> None:
        """Let a head select what was selected first."""
        if not isinstance(getattr(head, "selection", None), Selecting):
            return
        select = head.selection.select

        def fixed(pre_acts: Tensor) -> Tensor:
            if self.flat is None:
                self.flat = select(pre_acts)
            return self.flat.to(pre_acts.device)

        head.selection.select = fixed


def one_step(head: Any, x: Tensor, chosen: Chosen, mixed: bool = False) -> dict[str, Tensor]:
    """x_hat, losses and gradients of a step in which eight latents are dead."""
    head = copy.deepcopy(head)
    chosen.on(head)
    trainee = HeadTrainer("", head, Schedule.of(10**6, len(x)), 5.0).to(x.device).train()
    trainee.dead_mask[:8] = True
    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
        losses, out = trainee.step(x, 1, 0.5)
        loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    found = {"x_hat": out.x_hat} | {f"loss {name}": value for name, value in losses.items()}
    return found | {
        f"gradient of {n}": p.grad for n, p in head.named_parameters() if p.requires_grad
    }


def compare(found: dict[str, Tensor], reference: dict[str, Tensor], tolerance: Callable) -> None:
    assert found.keys() == reference.keys()
    off = {name: relative(found[name], value) for name, value in reference.items()}
    wrong = {name: error for name, error in off.items() if not error <= tolerance(name)}
    assert not wrong, wrong


# ------------------------------------------------------------------------- the checks


@on_both
@pytest.mark.parametrize("kind", TRAINED)
def test_01_a_step_in_fp32(kind: str, device: str) -> None:
    """x_hat, losses and every gradient, the selection that of fp64: 1e-5."""
    head, x, chosen = started(kind), data(), Chosen()
    with exact():
        reference = one_step(copy.deepcopy(head).double(), x.double(), chosen)
    found = one_step(head.to(device), x.to(device), chosen)
    compare(found, reference, lambda _: 1e-5)
    assert any(relative(found[n], v) > 0 for n, v in reference.items()), "compared with itself"


@on_both
@pytest.mark.parametrize("shape", [(64, 300), (512, 400)])
def test_02_selections_with_planted_ties(shape: tuple[int, int], device: str) -> None:
    """Equal sets of positions on equal fp32 values, of which hundreds are at the cut-off."""
    generator = torch.Generator().manual_seed(shape[0])
    values = torch.randint(-40, 40, shape, generator=generator) / 8
    flat = values.reshape(-1)
    count = 8 * shape[0]
    ranked = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))[:count]
    assert flat[ranked[-1]] == flat.sort(descending=True).values[count], "no tie at the cut-off"
    there = values.to(device)
    found, cutoff = largest_positive(there, count)
    assert sorted(ranked) == found.tolist()
    assert float(cutoff) == float(flat[ranked[-1]])
    few = largest_positive(there - 4.8, count)[0].cpu()
    few = few[flat[few] > 4.8]  # a GPU may fill up with others, of no value
    assert 0 < len(few) < count
    assert few.tolist() == (flat > 4.8).nonzero().squeeze(1).tolist()
    kept = TokenTopK(8).select(there)  # of equal ones any
    assert (kept.diff() > 0).all()
    assert torch.equal(there.reshape(-1)[kept].cpu().view(-1, 8).sort(1).values,
                       values.topk(8).values.sort(1).values)  # fmt: skip


@on_both
@pytest.mark.parametrize("kind", TRAINED)
def test_03_a_step_in_bf16(kind: str, device: str) -> None:
    """bf16-mixed against fp32 on the same device, the selection that of fp32: 5e-3, gradients 1e-2.

    Nobody fixes which hidden units are on, nor which latents of penalised and of dense heads:
    where rounding turns p of them on or off, their gradients are off by sqrt(p).
    """
    head, x, chosen = started(kind).to(device), data().to(device), Chosen()
    reference = one_step(head, x, chosen)
    found = one_step(head, x, chosen, mixed=True)
    loose = 2 if kind in ("Gated", "JumpReLU", "Standard") or kind.startswith("Dense") else 1

    def tolerance(name: str) -> float:
        if "gradient of encoder.units" in name or "gradient of encoder.kan_in" in name:
            return 0.1
        return loose * (1e-2 if "gradient" in name else 5e-3)

    compare(found, reference, tolerance)
    assert relative(found["x_hat"], reference["x_hat"]) > 1e-6, "nothing was in bf16"


@on_both
@pytest.mark.parametrize("case", ["some", "one latent on all rows", "nothing"])
def test_04_bags_of_rows(case: str, device: str) -> None:
    """Against dense products in fp64, with empty rows and empty latents: 1e-6."""
    generator = torch.Generator().manual_seed(4)
    rows, latents = 300, 90
    mask = torch.rand(rows, latents, generator=generator) < 0.05
    mask[10:20], mask[:, 5:9] = False, False
    if case == "one latent on all rows":
        mask[:, 7] = True
    if case == "nothing":
        mask[:] = False
    dense = torch.randn(rows, latents, generator=generator) * mask
    flat = mask.reshape(-1).nonzero().squeeze(1)
    pattern = Pattern(flat.to(device), rows, latents)
    values = dense.reshape(-1)[flat].to(device)
    for sums, table, matrix in (
        (pattern.sum_latents, torch.randn(latents, 40, generator=generator), dense),
        (pattern.sum_rows, torch.randn(rows, 40, generator=generator), dense.T),
    ):
        found = sums(values, table.to(device))
        assert relative(found, matrix.double() @ table.double()) <= 1e-6
        empty = (matrix != 0).sum(1) == 0
        assert empty.any() or case == "one latent on all rows"
        assert (found.cpu()[empty] == 0).all()


PLACES = {"inside": (-2.9, 2.9), "everywhere": (-9.0, 9.0), "far outside": (20.0, 900.0)}


@pytest.mark.parametrize(
    ("device", "form"),
    [("cpu", "eager"), *FORMS],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [3, 1])
def test_05_the_kan_layer(
    form: str, dtype: torch.dtype, order: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """y and both gradients, with points on knots and far outside: 1e-5 in fp32, 5e-3 in bf16."""
    if form == "kernel":
        assert kernels.on("kan_planes", torch.device(device)), "no kernel to check"
    else:
        monkeypatch.setattr(kernels, "DEVICES", set())
    generator = torch.Generator().manual_seed(5)
    for lo, hi in PLACES.values():
        x = lo + (hi - lo) * torch.rand(200, 70, generator=generator)
        if order > 1:  # between the two slopes that order 1 has on a knot, rounding would choose
            x[:6] = torch.linspace(-3, 3, 6)[:, None]
        weight = torch.randn(24, 6 + order, 70, generator=generator)
        to_y = torch.randn(200, 24, generator=generator)
        # what goes in is rounded for both
        given = [t.to(dtype).double() for t in (weight, to_y)]
        results = []
        for kind, where in ((torch.float64, "cpu"), (dtype, device)):
            point = x.to(where, torch.float64 if kind == torch.float64 else torch.float32)
            point.requires_grad_()
            w, to = (t.detach().to(where, kind).clone() for t in given)
            w.requires_grad_()
            compiled = form == "compiled" and where != "cpu"
            y = kan_linear(point, w, -3, 3, 5, order, linear_tails=True, compiled=compiled)
            y.backward(to)
            results.append((y, point.grad, w.grad))
        for found, right in zip(results[1], results[0], strict=True):
            assert relative(found, right) <= (1e-5 if dtype == torch.float32 else 5e-3), (lo, hi)


@on_both
def test_06_spline_activations(device: str) -> None:
    """Values and gradients against fp64, compiled on a GPU; the last batch is short: 1e-5."""
    generator = torch.Generator().manual_seed(6)
    coef = torch.randn(8, 50, generator=generator)
    for rows in (300, 300, 17):
        x = 3 * torch.randn(rows, 50, generator=generator)
        to_y = torch.randn(rows, 50, generator=generator)
        results = []
        for kind, where, compiled in (
            (torch.float64, "cpu", False),
            (torch.float32, device, False),
            *[(torch.float32, device, True)] * (device == "cuda"),
        ):
            points, c = (t.to(where, kind).clone().requires_grad_() for t in (x, coef))
            y = spline_activation(points, c, -3, 3, 5, linear_tails=True, compiled=compiled)
            y.backward(to_y.to(where, kind))
            results.append((y, points.grad, c.grad))
        for made in results[1:]:
            for found, right in zip(made, results[0], strict=True):
                assert relative(found, right) <= 1e-5


def trained(head: Any, device: str, steps: int, adam: bool) -> tuple[Any, float]:
    """A head after so many steps on ever new rows, and its FVU of others."""
    x_all = data(64 * steps + 512, seed=7).to(device, head.b_dec.dtype)
    trainee = HeadTrainer("", head, Schedule.of(10**6, 64), 5.0).to(device).train()
    parameters = list(head.parameters())
    optimizer = Adam(parameters, lr=3e-3) if adam else torch.optim.SGD(parameters, lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        losses, _ = trainee.step(x_all[64 * step : 64 * step + 64], step, step / steps)
        torch.stack(list(losses.values())).sum().backward()
        head.project_grad_()
        trainee.clip_(None, "norm")
        optimizer.step()
        head.project_()
    with torch.no_grad():
        return head, float(fvu(x_all[-512:], head(x_all[-512:]).x_hat))


@on_both
@pytest.mark.parametrize("kind", ["BatchTopK", "KANEncoder", "Gated"])
def test_07_training_goes_the_same_way(kind: str, device: str) -> None:
    """20 steps of gradient descent: parameters to 1e-3; 300 steps of Adam: FVU to 1 %."""
    made = started(kind)
    with exact():
        reference, _ = trained(copy.deepcopy(made).double(), "cpu", 20, adam=False)
        _, best = trained(copy.deepcopy(made).double(), "cpu", 300, adam=True)
    found, _ = trained(copy.deepcopy(made).to(device), device, 20, adam=False)
    moved = False
    for (name, p), q, first in zip(
        reference.named_parameters(), found.parameters(), made.parameters(), strict=True
    ):
        assert relative(q, p) <= 1e-3, name
        moved |= relative(first, p) > 1e-2
    assert moved, "nothing was learned"
    _, reached = trained(copy.deepcopy(made).to(device), device, 300, adam=True)
    assert reached == pytest.approx(best, rel=0.01)
    assert best < 0.5


@pytest.fixture(scope="module")
def deep_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of ten blocks."""
    folder = tmp_path_factory.mktemp("deep_lm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=10,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@on_both
@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_08_the_lm_in_bf16(block: int, backend: SDPBackend, device: str, deep_lm: Path) -> None:
    """Activations after one block against the CPU in fp32: 1e-2; after nine and ten blocks 2e-2."""
    ids = torch.randint(3, 64, (4, 48), generator=torch.Generator().manual_seed(8))
    results = []
    for dtype, where in (("float32", "cpu"), ("bfloat16", device)):
        lm = FrozenLM(str(deep_lm), f"model.layers.{block}", untrained=True, dtype=dtype)
        lm.load_(where)
        with sdpa_kernel(backend) if dtype == "bfloat16" else nullcontext():
            prefix = lm.prefix(ids.to(where))
            results.append((prefix.acts, lm.resume(prefix, prefix.acts)))
    for found, right, tolerance in zip(
        results[1], results[0], (2e-2 if block else 1e-2, 2e-2), strict=True
    ):
        assert 0 < relative(found, right) <= tolerance


@on_both
def test_09_fused_adam(device: str) -> None:
    """Parameters that are stored transposed, and both moments, against fp64: 1e-6."""
    generator = torch.Generator().manual_seed(9)
    first = torch.randn(40, 30, generator=generator)
    grads = [torch.randn(40, 30, generator=generator) for _ in range(5)]
    results = []
    for kind, where in ((torch.float64, "cpu"), (torch.float32, device)):
        weight = torch.nn.Parameter(first.to(where, kind).T)
        optimizer = Adam([weight], lr=1e-2, fused=True)
        for grad in grads:
            weight.grad = grad.to(where, kind).T
            optimizer.step()
        state = optimizer.state[weight]
        results.append((weight, state["exp_avg"], state["exp_avg_sq"]))
    for found, right in zip(results[1], results[0], strict=True):
        assert relative(found, right) <= 1e-6


# --------------------------------------------------------------------------- whole runs


def parts(folder: Path) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint."""
    state = torch.load(checkpoints(folder)[-1], map_location="cpu", weights_only=True)
    return {n: v for n, v in state["state_dict"].items() if v.is_floating_point()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_10_a_checkpoint_goes_on_on_its_gpu(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches are drawn: an undisturbed run's weights to 1e-4."""
    given = {"trainer.accelerator": "gpu", "trainer.logger": "false"}
    assert fit(**given, run=str(tmp_path / "calm")) == 0
    terminate_at(monkeypatch, 17)
    assert fit(**given) == 128 + signal.SIGTERM
    assert fit("--ckpt_path=last", **given) == 0
    stopped = parts(only_run(tmp_path))
    for name, weight in parts(tmp_path / "calm").items():
        assert relative(stopped[name], weight) <= 1e-4, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_10_from_a_gpu_to_a_cpu_and_back(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminate_at(monkeypatch, 13, 26)
    given: dict[str, Any] = {"trainer.logger": "false"}
    stopped = 128 + signal.SIGTERM
    assert fit(**given, trainer__accelerator="gpu") == stopped
    assert fit("--ckpt_path=last", **given, trainer__accelerator="cpu") == stopped
    assert fit("--ckpt_path=last", **given, trainer__accelerator="gpu") == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["finished"]
    assert summary["val/fvu"] < 1


def test_10_a_checkpoint_as_a_gpu_writes_it_goes_on_on_a_cpu(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Draws of a GPU, 16 bytes, mean nothing to a CPU; text, rows and weights go on."""
    terminate_at(monkeypatch, 13)
    given: dict[str, Any] = {"trainer.logger": "false"}
    assert fit(**given) == 128 + signal.SIGTERM
    (path,) = checkpoints(only_run(tmp_path))
    held = buffer_file(path, 0)
    state = load_file(held)
    save_file(state | {"generator": torch.zeros(16, dtype=torch.uint8)}, held)
    seal(path, [written(path), written(held)])
    config = only_run(tmp_path) / "config.yaml"  # which names the GPU
    config.write_text(config.read_text().replace("accelerator: cpu", "accelerator: gpu"))
    assert fit("--ckpt_path=last", **given) == 0
    assert "made on another kind of device than cpu" in caplog.text
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert summary["finished"]
    assert summary["tokens"] == 2560


def validated(folder: Path, runs: Path, *options: str) -> dict[str, float]:
    """Figures of a validation of a run."""
    given = [f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder}", f"--runs_dir={runs}"]
    assert main(["validate", *given, *options]) == 0
    (made,) = runs.glob("*validate")
    found: dict[str, float] = json.loads((made / "summary.json").read_text())
    return found


@on_both
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 1e-2)])
def test_11_figures_of_a_validation(
    precision: str, tolerance: float, device: str, finished: Finished, tmp_path: Path
) -> None:
    """L0, FVU and what CE rises by, of a saved head: 1e-4 in fp32, 1e-2 in bf16."""
    reference = json.loads((finished.folder / "summary.json").read_text())
    accelerator = "gpu" if device == "cuda" else "cpu"
    options = f"--trainer.precision={precision}", f"--trainer.accelerator={accelerator}"
    found = validated(finished.folder, tmp_path / "runs", *options)
    for name in ("val/l0", "val/fvu"):
        assert found[name] == pytest.approx(reference[name], rel=tolerance), name
    # nats: a difference of two losses, each as exact as the tolerance
    assert found["val/delta_ce"] == pytest.approx(reference["val/delta_ce"], abs=tolerance)


class Steps:
    """Steps of a head as the module makes them, on rows that are there."""

    def __init__(self, kind: str, device: str) -> None:
        self.head = started(kind).to(device)
        self.trainee = HeadTrainer("", self.head, Schedule.of(10**6, ROWS), 5.0).to(device).train()
        self.optimizer = Adam([{"params": list(self.head.parameters())}], fused=True)
        self.trainee.hand_rows_to(self.optimizer)
        self.x, self.device, self.done = data().to(device), device, 0

    def __call__(self) -> None:
        self.done += 1  # the list of dead latents is made anew in every tenth
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            losses, _ = self.trainee.step(self.x, 1 + 10 * self.done, 0.5)
            loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        self.head.project_grad_()
        self.trainee.clip_(None, "norm")
        self.optimizer.step()
        self.head.project_()


@on_gpu
@pytest.mark.parametrize("kind", LAUNCHES)
def test_12_waits_launches_and_memory(kind: str, device: str) -> None:
    """How often a step waits, what it launches, and that its peak stays where it was."""
    step = Steps(kind, device)
    for _ in range(5):
        step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    said = [str(w.message) for w in waits if "synchroniz" in str(w.message)]
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    launches = sum(e.device_type == on_device for e in profile.events())
    peaks = []
    for _ in range(50):
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[-1] <= 1.01 * peaks[0]
    assert launches <= LAUNCHES[kind], launches
    assert len(said) <= WAITS, said


@pytest.mark.parametrize("kind", ["TopK", "KANEncoder"])
def test_12_nothing_is_left_behind_by_a_step(kind: str) -> None:
    """Tensors that are alive after 2 and after 52 steps."""
    step = Steps(kind, "cpu")

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    step()
    step()
    before = alive()
    for _ in range(50):
        step()
    assert alive() <= before


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
def test_12_two_gpus_are_one(fit: Fit, tmp_path: Path) -> None:
    """The weights of two ranks (NCCL) and of one: 1e-4."""
    given = {"trainer.accelerator": "gpu", "trainer.logger": "false"}
    assert fit(**given, run=str(tmp_path / "one")) == 0
    assert fit(**given, run=str(tmp_path / "two"), trainer__devices="2") == 0
    two = parts(tmp_path / "two")
    for name, weight in parts(tmp_path / "one").items():
        assert relative(two[name], weight) <= 1e-4, name
