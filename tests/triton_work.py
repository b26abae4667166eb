"""What tests do with Triton, in a process of its own, as Triton decides at import how to run.

    TRITON_INTERPRET=1 python tests/triton_work.py interpret
    TRITON_INTERPRET=1 python tests/triton_work.py start '[[], ["KERNEL", "OLD", "NEW"]]'
    python tests/triton_work.py compile

`interpret` runs the kernels on the CPU: self-checks, and further shapes against fp64. `start` does
what a run does on a CUDA device, once for each item of the list; three words first put NEW in the
place of OLD in the sources of one kernel. `compile` makes code for sm_90, without a GPU. Each
prints JSON, `start` a line for each item.
"""

import importlib.util
import inspect
import json
import logging
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SOURCES = "kanllama_lightning.functional.triton_kernels"
CPU = torch.device("cpu")


def break_(kernel: str, old: str, new: str) -> None:
    """Let the package find sources in which one kernel is wrong."""
    text = (ROOT / SOURCES.replace(".", "/")).with_suffix(".py").read_text()
    before, name, after = text.partition(f"def {kernel}(")
    assert old in after, f"{kernel} has no {old!r}"
    path = Path(tempfile.mkdtemp()) / "broken.py"
    path.write_text(before + name + after.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(SOURCES, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import kanllama_lightning.functional as room

    sys.modules[SOURCES] = room.triton_kernels = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def layer(dtype: torch.dtype, base: Any, order: int, tails: bool, n: int) -> dict[str, float]:
    """Errors of a KAN layer and of both its gradients, made by kernels, against fp64."""
    from kanllama_lightning.functional import kernels
    from kanllama_lightning.functional.splines import kan_linear

    generator = torch.Generator().manual_seed(n)
    x, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((9, n), (6, 6 + order, n))
    )
    x *= 2
    to_y = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    if dtype == torch.bfloat16:  # what goes in is rounded for both
        x, weight, to_y = (t.to(dtype).double() for t in (x, weight, to_y))
    results = []
    for kind, names in ((torch.float64, ()), (dtype, ("kan_planes",))):
        a, w = (t.detach().to(kind).clone().requires_grad_() for t in (x, weight))
        with kernels.assumed(*names):
            y = kan_linear(a, w, -3, 3, 5, order, base, linear_tails=tails)
            y.backward(to_y.to(kind))
        results.append((y.detach(), a.grad, w.grad))
    names = ("y", "grad_x", "grad_weight")
    return {name: relative(f, e) for name, e, f in zip(names, *results, strict=True)}


def rows(n: int, dtype: torch.dtype) -> float:
    """Largest error of a step of rows of n numbers, against fp64."""
    from kanllama_lightning.functional import kernels, row_step

    generator = torch.Generator().manual_seed(n)
    weight, grad, first = (torch.randn(4, n, generator=generator).double() for _ in range(3))
    weight /= weight.norm(dim=1, keepdim=True)
    second = torch.rand(4, n, generator=generator).double()
    steps, factor = torch.tensor(7.0), torch.tensor(0.3)
    exact, shadow = [weight, first, second], torch.empty(4, n, dtype=dtype)
    found = [t.float() for t in exact]
    settings = steps, factor, 0.01, (0.8, 0.99), 1e-8
    logs = math.log(0.8), math.log(0.99)
    kernels.step_rows(
        found[0], grad.float(), *found[1:], shadow, steps, factor, 0.01, 0.8, 0.99, *logs, 1e-8
    )
    row_step._by_torch_(exact[0], grad, *exact[1:], *settings, None)
    errors = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    return max([*errors, relative(shadow, exact[0]) if dtype == torch.float32 else 0.0])


def interpret() -> dict[str, Any]:
    """Everything that can be run."""
    from kanllama_lightning.functional import kernels, row_step, splines

    assert {splines.NAME, row_step.NAME} == set(kernels.CHECKS)
    found: dict[str, Any] = {"over_tolerance": {n: c(CPU) for n, c in kernels.CHECKS.items()}}
    found["layers"] = {
        f"{dtype} {base} order {order} tails {tails} width {n}": layer(
            dtype, getattr(F, base, getattr(torch, base, None)), order, tails, n
        )
        for dtype in (torch.float32, torch.bfloat16)
        for base, order, tails, n in (
            ("silu", 3, True, 1025),
            ("silu", 3, False, 7),
            ("relu", 1, True, 33),
            ("zeros_like", 1, False, 1),
        )
    }
    found["rows"] = {n: rows(n, torch.float32) for n in (1, 64, 2048)}
    return found


def start() -> dict[str, Any]:
    """Kernels are checked, and used or not."""
    from kanllama_lightning.functional import kernels, row_step
    from kanllama_lightning.functional.splines import kan_linear

    assert row_step.NAME in kernels.CHECKS
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    kernels.log.addHandler(handler)
    kernels.log.setLevel(logging.INFO)
    kernels.DEVICES.add("cpu")
    kernels.switch_on(CPU)
    x, weight = torch.randn(4, 8), torch.randn(3, 9, 8)
    y = kan_linear(x, weight, -3, 3, 5, linear_tails=True)
    kernels.DEVICES.remove("cpu")
    eager = kan_linear(x, weight, -3, 3, 5, linear_tails=True)
    return {"said": said, "after": relative(y, eager), "same": torch.equal(y, eager)}


def compiled() -> dict[str, int]:
    """Bytes of the sm_90 code of every kernel, in each of its forms."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sources = importlib.import_module(SOURCES)
    words = {"lo": "fp32", "cell": "fp32", "lr": "fp32", "n": "i32", "n_in": "i32"}
    found = {}
    for name, types, constants in forms():
        kernel = getattr(sources, name)
        arguments = list(inspect.signature(kernel.fn).parameters)
        signature = {a: types.get(a, words.get(a, "*fp32")) for a in arguments}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        found[f"{name} {types} {constants}"] = len(made.asm["cubin"])
    return found


def forms() -> Any:
    """Kernels with the types of their tensors and their constants, as they are launched."""
    from kanllama_lightning.functional.kernels import PLANE_BLOCK

    for order, tails, base in ((3, True, "silu"), (3, False, "identity"), (1, True, "relu")):
        grid = {"SIZE": 5, "ORDER": order, "TAILS": tails, "BASE": base, "BLOCK": PLANE_BLOCK}
        for dtype in ("*fp32", "*bf16"):
            yield "fill_planes", {"planes": dtype}, grid
            yield "pull_planes", {"grad_planes": dtype}, grid
    yield "square_rows", {}, {"BLOCK": 2048}
    adam = {"BETA1": 0.9, "BETA2": 0.999, "LOG1": -0.1053605, "LOG2": -0.0010005, "EPS": 1e-12}
    for shadow in ("*fp32", "*bf16"):
        constants = adam | {"SHADOW": shadow == "*bf16", "BLOCK": 2048}
        yield "step_rows", {"shadow": shadow}, constants


def each_start(cases: list[list[str]]) -> int:
    """Every case in a process of its own, forked when all is imported."""
    import triton.language  # noqa: F401

    import kanllama_lightning.functional.row_step  # noqa: F401

    for case in cases:
        sys.stdout.flush()
        if not (pid := os.fork()):
            if case:
                break_(*case)
            sys.stdout.write(json.dumps(start()) + "\n")
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "start":
        sys.exit(each_start(json.loads(sys.argv[2])))
    work = {"interpret": interpret, "compile": compiled}[sys.argv[1]]
    sys.stdout.write(json.dumps(work()) + "\n")
