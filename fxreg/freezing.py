"""What a value is, as plain data that can be kept, pickled, and compared later."""

import copyreg
import enum
import functools
import random
import sys
import types
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Set, ValuesView
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx, nn

from .enclosed import bound_to, dictionary_of, enclosed, entries, slotted
from .kinds import qualified
from .packages import is_library

SCALARS = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.Size)
NAMED = (
    type, types.ModuleType, types.BuiltinFunctionType, types.MethodWrapperType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
"""What is known by its name, unless it is bound to an object."""
_SHOWN = (torch.layout, torch.memory_format, torch.qscheme, torch.finfo, torch.iinfo)
"""What says all that it is, and cannot always be pickled."""
_BASES: tuple[Any, ...] = (int, float, complex, str, bytes)
_PLAIN = {kind: qualified(kind) for kind in (list, tuple, dict)}
_CONTAINERS = (list, dict, set, deque)
_CARRIERS = (
    enum.Enum, types.FunctionType, types.CodeType, types.MethodType, types.BuiltinMethodType, types.MethodWrapperType,
    staticmethod, classmethod, property, functools.partial, ContextVar, weakref.ref,
)  # fmt: skip
_MOVING = (torch.Generator, random.Random)
_DEEP = 100


def frozen(value: Any) -> Any:
    """A value as plain data. Tensors are read live, and modules are compared by themselves: of these, only the type; of
    random generators as well, whose state moves.

    Functions are their code, what they close over, their defaults and attributes; objects are their type, attributes,
    and what they would be pickled by where a type written in C has more. What was met before, and could be changed, is
    the number of what it is.
    """
    return _Freezing().of(value)


def objects_in(value: Any) -> list[Any]:
    """A value, and all that is in it and is more than a number: of classes and modules, which are known by their names,
    those themselves."""
    freezing = _Freezing()
    freezing.of(value)
    return [*freezing.alive, *freezing.named]


class _Freezing:
    """One pass over what a value leads to."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self.alive: list[Any] = []  # all that was met, so that nothing else gets its id
        self.named: list[Any] = []
        self._depth = 0

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind not in _PLAIN:  # to ask the class is quick: an object may have a `__getattribute__` of its own
            if issubclass(kind, _SHOWN):
                return (qualified(kind), repr(value))
            if issubclass(kind, NAMED) and bound_to(value) is None:
                self.named += [value] if issubclass(kind, type | types.ModuleType) else []
                return _by_name(value)
            if issubclass(kind, Tensor | nn.Module | fx.Graph):
                return ("a", qualified(kind))
        if id(value) in self._numbers:
            return ("...", self._numbers[id(value)])
        if self._depth > _DEEP:
            return ("...",)
        self._numbers[id(value)] = len(self.alive)
        self.alive.append(value)
        self._depth += 1
        try:
            return self._carrier(kind, value) if issubclass(kind, _CARRIERS) else self._object(kind, value)
        finally:
            self._depth -= 1
            if issubclass(kind, _CARRIERS) or not (issubclass(kind, _CONTAINERS) or dictionary_of(value)):
                del self._numbers[id(value)]  # whether it is one or two, no one can tell

    def _each(self, values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple([self.of(one) for one in values])

    def _carrier(self, kind: type, value: Any) -> Any:
        """What is nothing but what it carries."""
        match value:
            case enum.Enum():
                own = [(name, self.of(one)) for name, one in dictionary_of(value).items() if not name.startswith("_")]
                return (qualified(kind), value.name, self.of(value._value_), *own)
            case types.FunctionType():
                return self._function(value)
            case types.CodeType():
                return ("code", value.co_qualname, value.co_code, value.co_names, self._each(value.co_consts))
            case types.MethodType():
                return ("method", *self._each((value.__func__, value.__self__)))
            case types.BuiltinMethodType() | types.MethodWrapperType():
                return ("method", value.__name__, self.of(value.__self__))
            case staticmethod() | classmethod():
                return (qualified(kind), self.of(value.__func__))
            case property():
                return ("property", *self._each((value.fget, value.fset, value.fdel)))
            case functools.partial():
                return ("partial", *self._each((value.func, value.args, value.keywords)))
            case ContextVar():
                return (qualified(kind), self.of(value.get(None)))
        return ("weakref", self.of(value()))

    def _function(self, function: types.FunctionType) -> Any:
        if is_library(function.__module__) and _is_in_its_module(function):
            return _by_name(function)
        carried = self._each(
            (function.__code__, enclosed(function), function.__defaults__ or (), function.__kwdefaults__ or {})
        )
        own = {name: one for name, one in vars(function).items() if name != "__wrapped__" and "torchdynamo" not in name}
        return ("function", function.__module__, *carried, *self._each([own] if own else []))

    def _object(self, kind: type, value: Any) -> Any:
        """What is in a value, if it is a container, and its attributes."""
        inside = self._inside(kind, value)
        if kind in _PLAIN:
            return (_PLAIN[kind], inside) if inside else (_PLAIN[kind], (), ())
        kept = {**slotted(value), **dictionary_of(value)}
        attributes = tuple([(name, self.of(one)) for name, one in kept.items()])
        return (qualified(kind), inside, attributes) if attributes or not inside else (qualified(kind), inside)

    def _inside(self, kind: type, value: Any) -> tuple[Any, ...]:
        if issubclass(kind, list | tuple | ValuesView):
            return self._each(value)
        if issubclass(kind, deque):
            return (value.maxlen, *self._each(value))
        if issubclass(kind, Mapping):
            inside = entries(value) if issubclass(kind, dict) else value
            pairs = tuple([(self.of(key), self.of(one)) for key, one in inside.items()])
            return (*pairs, self.of(value.default_factory)) if issubclass(kind, defaultdict) else pairs
        if issubclass(kind, Set):
            return tuple(sorted(self._each(value), key=repr))
        numpy = sys.modules.get("numpy")
        if numpy is not None and issubclass(kind, numpy.ndarray | numpy.generic):
            content = value.tolist() if value.dtype.hasobject else value.tobytes()
            return (str(value.dtype), value.shape, self.of(content))
        if hasattr(kind, "__members__"):  # an enumeration of C++
            return (getattr(value, "name", None),)
        if base := next((base for base in _BASES if issubclass(kind, base)), None):
            return tuple(base.__getnewargs__(value))
        if kind is memoryview:
            return (value.format, value.shape, value.tobytes())
        return self._each(_reduced(kind, value))


def _reduced(kind: type, value: Any) -> Iterable[Any]:
    """What a value of a type written in C would be pickled by; nothing if its attributes are all there is to it."""
    reduce = copyreg.dispatch_table.get(kind)
    if (
        not (reduce or _is_reduced_in_c(kind))
        or issubclass(kind, _MOVING)
        or kind.__module__.startswith("numpy.random")
    ):
        return ()
    try:
        found = reduce(value) if reduce else value.__reduce_ex__(4)
    except Exception:
        return ()
    return found if isinstance(found, tuple) else (found,)


@functools.lru_cache(maxsize=4096)
def _is_reduced_in_c(kind: type) -> bool:
    own = [vars(base).get(name) for base in kind.__mro__[:-1] for name in ("__reduce__", "__reduce_ex__")]
    return any(own) and not any(isinstance(one, types.FunctionType) for one in own)


def _by_name(value: Any) -> tuple[str | None, ...]:
    return ("named", *(getattr(value, name, None) for name in ("__module__", "__qualname__", "__name__")))


def _is_in_its_module(function: types.FunctionType) -> bool:
    return getattr(sys.modules.get(function.__module__), function.__name__, None) is function
