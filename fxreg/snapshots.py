"""Remembering the Python state around a model's modules, to notice and undo what running a forward did to it."""

import collections
import operator
import random
import types
from collections.abc import Iterable, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import nn

_PLAIN = (
    bool, int, float, complex, str, bytes, types.NoneType, type, types.ModuleType, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, torch.Tensor, torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_CONTAINERS = (dict, list, set, collections.deque)


class Snapshot:
    """Every list, dict, set, deque, random generator and plain object reachable from the modules' attributes.

    Tensors' values are not remembered: a tracer runs nothing that changes them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._held: list[tuple[str, Any, Any]] = []
        waiting: list[tuple[str, Any]] = []
        seen: set[int] = set()
        for module in modules:
            for name, value in self._hold(type(module).__name__, vars(module)):
                waiting.append((name, value))
        while waiting:
            name, value = waiting.pop()
            if id(value) in seen or isinstance(value, _PLAIN):
                continue
            seen.add(id(value))
            if isinstance(value, random.Random):
                self._held.append((name, value, value.getstate()))
            elif isinstance(value, _CONTAINERS):
                waiting += self._hold(name, value)
            elif isinstance(value, tuple | frozenset):
                waiting += [(name, one) for one in value]
            elif not isinstance(value, nn.Module) and isinstance(getattr(value, "__dict__", None), dict):
                waiting += self._hold(name, vars(value))

    def _hold(self, name: str, container: Any) -> list[tuple[str, Any]]:
        if isinstance(container, dict):
            self._held.append((name, container, dict(container)))
            return [(f"{name}.{key}", value) for key, value in container.items()]
        self._held.append((name, container, list(container)))
        return [(name, value) for value in container]

    def changed(self) -> str | None:
        """Where something is no longer as it was, if anywhere."""
        return next((name for name, now, before in self._held if not _same(now, before)), None)

    def restore(self) -> None:
        """Put everything back."""
        for _, now, before in self._held:
            if not _same(now, before):
                _put_back(now, before)


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, random.Random):
        return bool(now.getstate() == before)
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(map(operator.is_, now, before)) and all(map(operator.is_, now.values(), before.values()))
    return all(map(operator.is_, now, before))


def _put_back(now: Any, before: Any) -> None:
    match now:
        case random.Random():
            now.setstate(before)
        case MutableMapping():
            dict.clear(now)
            dict.update(now, before)
        case MutableSet():
            now.clear()
            now |= before if isinstance(before, set) else set(before)
        case MutableSequence() | collections.deque():
            now.clear()
            now.extend(before)
