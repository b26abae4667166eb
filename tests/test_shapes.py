"""That annotations are checked in these tests, of every module, and not outside of them."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from kanllama_lightning.functional.curves import line_residual
from kanllama_lightning.functional.sparse import SparseCodes
from tests.shapes import PACKAGES, unchecked


def test_shapes_of_arguments_are_checked_and_bind_within_a_call():
    x = torch.zeros(3, 2)
    line_residual(x, x)
    with pytest.raises(BeartypeCallHintViolation, match="parameter y="):
        line_residual(x, torch.zeros(4, 2))
    with unchecked(), pytest.raises(RuntimeError, match="size of tensor"):
        line_residual(x, torch.zeros(4, 2))


def test_fields_of_named_tuples_are_checked():
    two, three = torch.arange(2), torch.arange(3)
    SparseCodes(two.float(), two, two, 2, 2)
    with pytest.raises(BeartypeCallHintViolation, match="parameter latents="):
        SparseCodes(two.float(), two, three, 2, 2)


def test_every_module_is_checked():
    found = list(PACKAGES)
    for name in PACKAGES:
        path = getattr(importlib.import_module(name), "__path__", ())
        found += [module.name for module in pkgutil.walk_packages(path, f"{name}.")]
    assert len(found) > 100
    for name in found:
        loader = importlib.util.find_spec(name).loader  # a plug-in needs what it is plugged into
        assert "jaxtyping" in type(loader).__module__, name


def test_a_command_checks_nothing():
    code = "import sys, train, evaluate; sys.exit('beartype' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
