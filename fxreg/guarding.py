"""Comparing a value with what it was when it was frozen, in code that Dynamo traces: what is compared is guarded."""

import enum
import functools
import types
import weakref
from collections import deque
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .enclosed import enclosed
from .structure import PLAIN

_DEEP = 6
_CONTAINERS = (list, tuple, deque, set, frozenset, dict)


def is_as_frozen(now: Any, then: Any, depth: int = _DEEP) -> bool:
    """Whether a value is as `freezing.frozen` found it, some levels down.

    Of tensors and modules nothing is compared. What is in NumPy's arrays and scalars is a graph's input to Dynamo: no
    guard can see it, so the graph itself asserts that it is the same.
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
    if tag == "weakref":
        return isinstance(now, weakref.ref) and _are([now()], then[1], depth)
    if isinstance(now, ContextVar):
        return _are([now.get(None)], then[1], depth)
    if len(then) == 4:
        return hasattr(now, "dtype") and _is_array(now, then)
    if f"{type(now).__module__}.{type(now).__qualname__}" != tag:
        return False
    if isinstance(now, enum.Enum):
        return bool(now.name == then[1])
    return _holds(now, then, depth)


def _is_array(now: Any, then: tuple[Any, ...]) -> bool:
    """Whether an array has the shape that it had; that it has the values, too, is left to the graph to assert."""
    before = _bytes(then)
    array = torch.as_tensor(now)
    if tuple(array.shape) != then[2] or str(array.dtype) != f"torch.{then[1]}":  # Dynamo's scalars have other types
        return False
    values = array.reshape(-1).view(torch.uint8)
    torch._assert_async(
        (values == before).all(),
        "the model changed since it was captured: there are other values in a NumPy array, and the graph does not "
        "know. Transform the model again.",
    )
    return True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _bytes(then: tuple[Any, ...]) -> Tensor:
    """What was in an array."""
    return torch.tensor([*then[3]], dtype=torch.uint8)


def _holds(now: Any, then: Any, depth: int) -> bool:
    """Whether the same is in a container, and in an object's attributes."""
    if isinstance(now, list | tuple | deque):
        if not _are(now, then[1], depth):
            return False
    elif isinstance(now, set | frozenset):
        if len(now) != len(then[1]):
            return False
        for one in now:
            if not _is_among(one, then[1], depth - 1):
                return False
    elif isinstance(now, dict):
        if len(now) != len(then[1]):
            return False
        for key, (then_key, before) in zip(now, then[1], strict=True):
            if not is_as_frozen(key, then_key, depth - 1) or not is_as_frozen(now[key], before, depth - 1):
                return False
    attributes = then[2] if len(then) == 3 else ()
    for name, before in attributes:
        if not is_as_frozen(getattr(now, name, ...), before, depth - 1):
            return False
    if isinstance(now, _CONTAINERS):
        return True
    names = [name for name, _ in attributes]
    # Dynamo guards the names where they are walked through, and not where they are counted.
    for name in now.__dict__ if hasattr(now, "__dict__") else ():  # noqa: SIM110
        if name not in names:
            return False
    return True


def _is_among(one: Any, before: Any, depth: int) -> bool:
    for each in before:  # noqa: SIM110  Dynamo breaks its graph in a generator expression
        if is_as_frozen(one, each, depth):
            return True
    return False


def _are(now: Any, then: Any, depth: int) -> bool:
    if len(now) != len(then):
        return False
    for one, before in zip(now, then, strict=True):  # noqa: SIM110  Dynamo breaks its graph in a generator expression
        if not is_as_frozen(one, before, depth - 1):
            return False
    return True
