"""Every annotation of the project is checked in the tests, in whatever is imported later.

A call whose arguments or result are not as annotated raises beartype's BeartypeCallHintViolation.
Axes bind within one call; of generators and `async` functions every annotation stands alone. In
every test the first calls of each function are checked: training steps are all alike.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import beartype
import jaxtyping
import torch
from jaxtyping._storage import pop_shape_memo, push_shape_memo

PACKAGES = ("kanllama_lightning", "train", "evaluate")
# ints are floats; of a list the first item is looked at, the same one in every run
CHECK = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_random=False))

CALLS, INNER_CALLS = 16, 2
"""Calls that are checked in every test, of a function, and of one defined inside another."""


@contextmanager
def unchecked() -> Iterator[None]:
    """As where no annotation is checked, which is everywhere but in these tests."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _checked(**_: Any) -> Callable[[Any], Any]:
    """What the hook puts on every function and class, in the place of `jaxtyping.jaxtyped`.

    That one checks arguments twice, before a call and with its result, and binds them by name each
    time, which makes short calls three times as long. Functions are decorated when they are first
    called, as that takes milliseconds each.
    """

    def decorate(given: Any) -> Any:
        if isinstance(given, type):
            if "_fields" in vars(given):  # of named tuples, which have no constructor of their own
                given.__new__ = decorate(given.__new__)
            return given
        if isinstance(given, classmethod | staticmethod):
            return type(given)(decorate(given.__func__))
        if isinstance(given, property):
            parts = (given.fget, given.fset, given.fdel)
            return property(*(part and decorate(part) for part in parts))
        return _at_first_call(given) if inspect.isfunction(given) else given

    return decorate


class _Calls:
    """Calls of a function that are still to be checked in this test."""

    def __init__(self, at_most: int) -> None:
        self.at_most, self.left, self.test = at_most, 0, -1

    def counts(self) -> bool:
        """Whether this call is one of them."""
        if self.test != _tests.begun:
            self.test, self.left = _tests.begun, self.at_most
        self.left -= 1
        return self.left >= 0


class _Tests:
    begun = 0


_tests = _Tests()
_inner: dict[Any, _Calls] = {}
"""Of functions that are made anew again and again, by their code."""


def next_test() -> None:
    """From here on calls are checked again."""
    _tests.begun += 1


def _at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    checked: Callable[..., Any] | None = None
    calls = _Calls(CALLS)
    if "<locals>" in function.__qualname__:
        calls = _inner.setdefault(function.__code__, _Calls(INNER_CALLS))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable or not calls.counts():
            return function(*args, **kwargs)
        nonlocal checked
        if checked is None:
            checked = CHECK(function)
        push_shape_memo({})  # axes are bound from here on
        try:
            return checked(*args, **kwargs)
        finally:
            pop_shape_memo()

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
    jaxtyping.install_import_hook(PACKAGES, "beartype.beartype")
    jaxtyping.jaxtyped = _checked
    torch.compile = _compiles_unchecked(torch.compile)


check_annotations()
