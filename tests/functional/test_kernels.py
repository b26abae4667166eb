"""Our kernels: right in Triton's interpreter, compiled for sm_90, and left off where they are not.

Those that need Triton skip where it is missing (`pip install -e ".[kernels]"`).
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kanllama_lightning.functional import kernels, row_step, splines
from kanllama_lightning.functional.splines import kan_linear, kan_planes
from kanllama_lightning.heads import BatchTopK, FrozenDecoder, SoftlyFrozenDecoder, Standard
from kanllama_lightning.training.head_trainer import HeadTrainer
from kanllama_lightning.training.optim import Adam
from kanllama_lightning.training.schedule import Schedule
from tests.conftest import Fit, rest_slow

WORK = Path(__file__).resolve().parents[1] / "triton_work.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason='Triton is not installed (pip install -e ".[kernels]")',
)


def work(*words: str) -> Any:
    """What a process of its own found; of several lines a list."""
    env = os.environ | {"TRITON_INTERPRET": str(int(words[0] != "compile"))}
    done = subprocess.run(
        [sys.executable, str(WORK), *words], capture_output=True, text=True, check=False, env=env
    )
    assert not done.returncode, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return found if len(found) > 1 else found[0]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    found: dict[str, Any] = work("interpret")
    return found


@needs_triton
def test_kernels_are_right_in_the_interpreter(interpreted: dict[str, Any]) -> None:
    """Against fp64: 1e-6 in fp32, 5e-3 in bf16; the self-checks, of both, are passed."""
    assert set(interpreted["over_tolerance"]) == {"kan_planes", "row_step"}
    assert max(interpreted["over_tolerance"].values()) <= 1
    assert max(interpreted["rows"].values()) <= 1e-6
    for name, errors in interpreted["layers"].items():
        tolerance = 1e-6 if "float32" in name else 5e-3
        assert max(errors.values()) <= tolerance, (name, errors)


BROKEN = [
    (("fill_planes", "basis += 0.5 * above", "basis += 0.4 * above"), "kan_planes"),
    (("pull_planes", "gate * (1 + at", "gate * (2 + at"), "kan_planes"),
    (("square_rows", "g -= tl.sum(g * w, axis=0) * w", "g -= 0.0"), "row_step"),
    (("step_rows", "1 - BETA2", "1 - BETA1"), "row_step"),
    (("step_rows", "tl.sqrt", "tl.no_such_function"), "row_step"),
]
"""What is changed in which source, and which kernels are then wrong."""


@pytest.fixture(scope="module")
def starts() -> list[dict[str, Any]]:
    """What runs would find at their start: as things are, then with each of BROKEN."""
    found: list[dict[str, Any]] = work("start", json.dumps([[], *(change for change, _ in BROKEN)]))
    return found


@needs_triton
def test_the_start_says_which_kernels_are_on(starts: list[dict[str, Any]]) -> None:
    assert starts[0]["said"] == ["kernels on cpu: kan_planes, row_step"]
    assert 0 < starts[0]["after"] <= 1e-6, "no kernel made it, or a wrong one"


@needs_triton
@pytest.mark.parametrize("i", range(len(BROKEN)), ids=[f"{c[0]} {c[2]}" for c, _ in BROKEN])
def test_a_broken_kernel_is_left_off(i: int, starts: list[dict[str, Any]]) -> None:
    """It is found out, said, and the eager form goes on."""
    change, off = BROKEN[i]
    warning, line = starts[i + 1]["said"]
    assert warning.startswith(f"kernel {off} is off on cpu, which is slower: ")
    assert ("self-check" in warning) != ("no_such_function" in str(change))
    (left,) = {"kan_planes", "row_step"} - {off}
    assert line == f"kernels on cpu: {left}"
    assert starts[i + 1]["same"] == (off == "kan_planes")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    sizes = work("compile")
    assert len(sizes) == 15
    assert min(sizes.values()) > 1000


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The CPU, as a device on which kernels are checked and used."""
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    monkeypatch.setattr(kernels, "_found", {})
    return torch.device("cpu")


def test_where_nothing_can_launch_kernels_they_are_off(
    here: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.randn(4, 8), torch.randn(3, 9, 8)
    with caplog.at_level(logging.INFO):
        kernels.switch_on(here)
        y = kan_linear(x, weight, -3, 3, 5)
    *warnings, line = [record.getMessage() for record in caplog.records]
    assert line == "kernels on cpu: none"
    assert {w.split(" is off")[0] for w in warnings} == {"kernel kan_planes", "kernel row_step"}
    kernels.DEVICES.clear()
    assert torch.equal(y, kan_linear(x, weight, -3, 3, 5))


@pytest.mark.parametrize("error", [1.5, float("inf"), float("nan")])
def test_a_check_that_is_not_passed(
    error: float, here: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kernels.CHECKS, "kan_planes", lambda _: error)
    assert not kernels.on("kan_planes", here)
    monkeypatch.setitem(kernels.CHECKS, "row_step", lambda _: 1.0)
    assert kernels.on("row_step", here)


class Traffic(TorchDispatchMode):
    """Bytes of the operands of what runs over the features: all but products and views."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.bytes = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in (
            "mm",
            "device",
            "detach",
            "empty",
            "new_empty",
            "empty_like",
        ):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            kept = {id(t): t for t in tensors if t.dim() > 1 and len(t) == self.rows}
            self.bytes += sum(t.numel() * t.element_size() for t in kept.values())
        return out


def traffic(*names: str, only_planes: bool = False) -> float:
    """GB moved over the features of a KAN layer of KANEncoder's size, forward and backward."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), kernels.assumed(*names):
        x = torch.empty(4096, 2048, requires_grad=True)
        weight = torch.empty(2048, 9, 2048, requires_grad=True)
        mode = Traffic(4096)
        big = 1 << 40  # all rows at once, as where memory allows
        with mode:
            if only_planes:
                kan_planes(x, -3, 3, 5, linear_tails=True)
            else:
                y = kan_linear(x, weight, -3, 3, 5, linear_tails=True, block_bytes=big)
                y.sum().backward()
    return mode.bytes / 1e9


def test_features_move_at_most_a_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 2,048, batch 4,096, bf16: planes twice written, once read, x and its gradient."""
    monkeypatch.setattr(splines, "_CPU_FILL_BYTES", 1 << 40)  # as on a GPU
    assert 0.5 < traffic("kan_planes") < 1.0
    assert traffic("kan_planes", only_planes=True) < 0.4
    assert traffic() > 10, "the eager form, which the kernels are for, was not seen"


# ------------------------------------------------------------------ rows of norm 1


def trained(one_pass: bool, kind: Any = BatchTopK, steps: int = 20) -> tuple[Any, list[float]]:
    """A head after some steps, as the module makes them, with the norms of its gradients."""
    torch.manual_seed(0)
    x = torch.randn(128, 16) * torch.linspace(0.2, 2, 16)
    head = kind(d_model=16, d_sae=48, target_l0=4)
    head.start_(x)
    trainee = HeadTrainer("", head, Schedule.of(100_000, 128), 1.01)
    optimizer = Adam([{"params": list(head.parameters())}], lr=1e-2, fused=True)
    with kernels.assumed(*[row_step.NAME] * one_pass):
        trainee.hand_rows_to(optimizer)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        losses, _ = trainee.step(x[torch.randperm(128)[:64]], step, 0.5)
        (torch.stack(list(losses.values())).sum() * (1 + 9 * (step == 7))).backward()
        head.project_grad_()
        norms.append(float(trainee.clip_(None, "norm")["train/grad_norm"]))
        optimizer.step()
        head.project_()
    return head, norms


def test_one_pass_over_the_rows_is_the_four_it_replaces() -> None:
    (one, norms), (four, others) = trained(True), trained(False)
    assert norms == pytest.approx(others, rel=1e-5)
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.decoder.W_dec, four.decoder.W_dec), "both went the same way"
    assert one.decoder.first().norm(dim=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", [Standard, FrozenDecoder, SoftlyFrozenDecoder])
def test_rows_that_are_not_of_norm_1_or_not_only_are_stepped_as_before(kind: Any) -> None:
    """Free norms, no steps at all, and a bound on the angle."""
    (one, _), (four, _) = trained(True, kind, 3), trained(False, kind, 3)
    assert one.unit_rows is None
    assert all(map(torch.equal, one.parameters(), four.parameters()))


def test_only_plain_adam_takes_rows() -> None:
    weight = torch.nn.Parameter(torch.eye(3))
    with kernels.assumed(row_step.NAME):
        assert Adam([weight]).hand_over(weight) is not None
        assert Adam([weight], weight_decay=0.1).hand_over(weight) is None
        assert Adam([weight], amsgrad=True).hand_over(weight) is None
        assert Adam([weight], betas=(0.0, 0.9)).hand_over(weight) is None
        double = torch.nn.Parameter(torch.eye(3).double())
        assert Adam([double]).hand_over(double) is None
    assert Adam([weight]).hand_over(weight) is None, "nothing says that a kernel is right here"


def test_a_shadow_is_the_rows_in_another_format() -> None:
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = Adam([weight], lr=0.1)
    with kernels.assumed(row_step.NAME):
        handed = optimizer.hand_over(weight)
    assert handed is not None
    handed.shadow = torch.zeros(3, 3, dtype=torch.bfloat16)
    weight.grad = torch.randn(3, 3)
    optimizer.step()
    assert not torch.equal(weight, torch.eye(3))
    assert torch.equal(handed.shadow, weight.bfloat16())


@pytest.mark.parametrize("clip", rest_slow([None, "1.0"], [None]))
def test_a_run_hands_its_dictionary_over(clip: str | None, fit: Fit, tmp_path: Path) -> None:
    """Not where gradients are clipped at a fixed limit. Validation is that of a run without."""
    found = []
    for one_pass in (True, False):
        given: dict[str, Any] = {"trainer.gradient_clip_val": clip, "model.tokens": "1280"}
        run = tmp_path / "runs" / str(one_pass)
        with kernels.assumed(*[row_step.NAME] * one_pass):
            assert fit(**given, run=str(run)) == 0
        found.append(torch.load(next(run.glob("checkpoints/*.ckpt")), weights_only=True))
    ours, theirs = (f["state_dict"]["trainees.0.head.decoder.W_dec"] for f in found)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours, theirs) == (clip is not None)
    states = [f["optimizer_states"][0]["state"] for f in found]
    for one, other in zip(states[0].values(), states[1].values(), strict=True):
        assert float(one["step"]) == float(other["step"]) == 20
