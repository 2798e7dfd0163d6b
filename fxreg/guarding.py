"""Comparing a value with what it was when it was frozen, in code that Dynamo traces: what is compared is guarded."""

import enum
import functools
import types
from collections import deque
from typing import Any

from .enclosed import enclosed
from .structure import PLAIN

_DEEP = 6


def is_as_frozen(now: Any, then: Any, depth: int = _DEEP) -> bool:
    """Whether a value is as `freezing.frozen` found it, some levels down.

    Of arrays, and of what is not plain in sets, only the type is compared; of tensors and modules nothing.
    """
    if isinstance(then, PLAIN):
        return type(now) is type(then) and bool(now == then)
    if depth == 0 or not isinstance(then, tuple):
        return True
    tag = then[0]
    if tag in ("a", "..."):
        return True
    if tag == "named":
        names = (getattr(now, "__module__", None), getattr(now, "__qualname__", None), getattr(now, "__name__", None))
        return names == then[1:]
    if tag == "function":
        if not isinstance(now, types.FunctionType) or now.__module__ != then[1]:
            return False
        carried = [now.__code__, enclosed(now), tuple(now.__defaults__ or ()), now.__kwdefaults__ or {}]
        return _are(carried, then[2:], depth)
    if tag == "code":
        if not isinstance(now, types.CodeType):
            return False
        return now.co_qualname == then[1] and now.co_code == then[2] and _are(now.co_consts, then[4], depth)
    if tag == "method":
        return isinstance(now, types.MethodType) and _are([now.__func__, now.__self__], then[1:], depth)
    if tag == "partial":
        return isinstance(now, functools.partial) and _are([now.func, now.args, now.keywords], then[1:], depth)
    if f"{type(now).__module__}.{type(now).__qualname__}" != tag:
        return False
    if isinstance(now, enum.Enum):
        return bool(now.name == then[1])
    return _holds(now, then, depth)


def _holds(now: Any, then: Any, depth: int) -> bool:
    """Whether the same is in a container, and in an object's attributes."""
    if isinstance(now, list | tuple | deque):
        if not _are(now, then[1], depth):
            return False
    elif isinstance(now, set | frozenset):
        if len(now) != len(then[1]):
            return False
        for before in then[1]:
            if isinstance(before, PLAIN) and before not in now:
                return False
    elif isinstance(now, dict):
        if len(now) != len(then[1]):
            return False
        for key, (then_key, before) in zip(now, then[1], strict=True):
            if isinstance(then_key, PLAIN) and (key != then_key or not is_as_frozen(now[key], before, depth - 1)):
                return False
    for name, before in then[2] if len(then) == 3 else ():
        if not is_as_frozen(getattr(now, name, ...), before, depth - 1):
            return False
    return True


def _are(now: Any, then: Any, depth: int) -> bool:
    if len(now) != len(then):
        return False
    for one, before in zip(now, then, strict=True):  # noqa: SIM110  Dynamo breaks its graph in a generator expression
        if not is_as_frozen(one, before, depth - 1):
            return False
    return True
