"""What a value is, as plain data that can be kept, pickled, and compared later."""

import enum
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Mapping, Set
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn

from .enclosed import enclosed, entries, slotted
from .kinds import qualified
from .packages import is_library

SCALARS = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)
NAMED = (type, types.ModuleType, types.BuiltinFunctionType, types.BuiltinMethodType, types.MethodDescriptorType)
_DEEP = 8


def frozen(value: Any) -> Any:
    """A value as plain data. Tensors are read live, and modules are compared by themselves: of these, only the type.

    Functions are their code, what they close over and their defaults; objects are their type and attributes.
    """
    return _frozen(value, ())


def _frozen(value: Any, around: tuple[int, ...]) -> Any:
    kind = type(value)
    if kind in SCALARS:
        return value
    if id(value) in around or len(around) > _DEEP:
        return ("...",)
    if isinstance(value, NAMED):
        return _by_name(value)
    if isinstance(value, Tensor | nn.Module | fx.Graph):
        return ("a", qualified(kind))
    around = (*around, id(value))

    def each(values: Any) -> tuple[Any, ...]:
        return tuple(_frozen(one, around) for one in values)

    numpy = sys.modules.get("numpy")
    match value:
        case enum.Enum():
            return (qualified(kind), value.name)
        case types.FunctionType() if is_library(value.__module__) and _is_in_its_module(value):
            return _by_name(value)
        case types.FunctionType():
            carried = (value.__code__, enclosed(value), value.__defaults__ or (), value.__kwdefaults__ or {})
            return ("function", value.__module__, *each(carried))
        case types.CodeType():
            return ("code", value.co_qualname, value.co_code, value.co_names, each(value.co_consts))
        case types.MethodType():
            return ("method", *each((value.__func__, value.__self__)))
        case functools.partial():
            return ("partial", *each((value.func, value.args, value.keywords)))
        case ContextVar():
            return (qualified(kind), each((value.get(None),)))
        case weakref.ref():
            return ("weakref", each((value(),)))
        case list() | tuple() | deque():
            parts: Any = each(value)
        case Mapping():
            inside = entries(value) if isinstance(value, dict) else value
            parts = tuple((_frozen(key, around), _frozen(one, around)) for key, one in inside.items())
        case Set():
            parts = tuple(sorted(each(value), key=repr))
        case _ if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            return (qualified(kind), str(value.dtype), value.shape, value.tobytes())
        case _:
            parts = ()
    own = getattr(value, "__dict__", None)
    kept = {**slotted(value), **(own if type(own) is dict else {})}
    attributes = tuple((name, _frozen(one, around)) for name, one in kept.items())
    return (qualified(kind), parts, attributes) if attributes or not parts else (qualified(kind), parts)


def _by_name(value: Any) -> tuple[str | None, ...]:
    return ("named", *(getattr(value, name, None) for name in ("__module__", "__qualname__", "__name__")))


def _is_in_its_module(function: types.FunctionType) -> bool:
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function
