"""Which cases of a test are among the quick ones, and which of very many are run."""

import os
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def slow_but(quick: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, of which only the quick ones are not slow; a tuple is a case of several arguments."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in quick else pytest.mark.slow)
        for case in cases
    ]


def some(cases: Sequence[Any], every: int = 6) -> Sequence[Any]:
    """One in so many cases; with EVERY_CASE=1 all of them, as after a change of what they are about."""
    return cases if os.environ.get("EVERY_CASE") else cases[::every]


def in_turn(cases: Sequence[tuple[Any, Any]]) -> Sequence[tuple[Any, Any]]:
    """Of cases of two arguments, one for each first one, with the second ones in turn; or all, as above."""
    seconds: dict[Any, list[Any]] = {}
    for first, second in cases:
        seconds.setdefault(first, []).append(second)
    chosen = [(first, found[k % len(found)]) for k, (first, found) in enumerate(seconds.items())]
    return cases if os.environ.get("EVERY_CASE") else chosen
