"""Every annotation of the project is checked in the tests, in whatever is imported later.

A call whose arguments or result are not as annotated raises jaxtyping.TypeCheckError. Axes bind
within one call. What jaxtyping leaves alone: what `async` functions are given, and an annotation
that names the class it stands in.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch

PACKAGES = ("kanllama_lightning", "train", "evaluate")
# ints are floats; of a list the first item is looked at, the same one in every run
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))"


@contextmanager
def unchecked() -> Iterator[None]:
    """As where no annotation is checked, which is everywhere but in these tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _fields_too(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """The decorator that the hook puts everywhere, which does not know the fields of tuples.

    Functions are decorated when they are first called, as that takes milliseconds each.
    """

    def decorator(*, typechecker: Any) -> Callable[[Any], Any]:
        decorate = jaxtyped(typechecker=typechecker)

        def decorated(given: Any) -> Any:
            if isinstance(given, type) and "_fields" in vars(given):
                given.__new__ = _at_first_call(decorate, given.__new__)
            return _at_first_call(decorate, given) if inspect.isfunction(given) else decorate(given)

        return decorated

    return decorator


def _at_first_call(
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]], function: Callable[..., Any]
) -> Callable[..., Any]:
    checked = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        nonlocal checked
        if checked is None:
            checked = decorate(function)
        return checked(*args, **kwargs)

    return call


def _compiles_unchecked(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """Checks are no part of what is compiled: they would fix every size."""

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = compile_(function, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with unchecked():
                return compiled(*args, **kwargs)

        return call

    return compiler


def check_annotations() -> None:
    """Let every annotation be checked, in whatever is imported later."""
    assert not set(PACKAGES) & set(sys.modules), "imported before its annotations could be checked"
    jaxtyping.install_import_hook(PACKAGES, CHECKER)
    jaxtyping.jaxtyped = _fields_too(jaxtyping.jaxtyped)
    torch.compile = _compiles_unchecked(torch.compile)


check_annotations()
