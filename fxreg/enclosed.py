"""What functions, objects and dicts carry with them, past what their classes make of it."""

import collections
import contextlib
import functools
import io
import queue
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, ValuesView
from typing import Any

import torch

from .packages import is_foreign

_METHODS = (types.BuiltinMethodType, types.MethodWrapperType)
HOLDERS = (
    dict, types.MappingProxyType, ValuesView, list, tuple, set, frozenset, collections.deque, functools.partial,
    types.FunctionType, types.MethodType, *_METHODS,
)  # fmt: skip
"""What is there for what is inside: containers, and functions with what they carry."""


def enclosed(function: Callable[..., Any]) -> list[Any]:
    """The values that a function closes over; names that are not bound yet are left out."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found


def defaults(function: Callable[..., Any]) -> list[Any]:
    """The defaults of a function's arguments, positional and keyword."""
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def holds_iterator(value: Any, depth: int = 3) -> bool:
    """Whether what a name stands for is an iterator, or has one in it: in a container, a closure, or an attribute of an
    object or a class of the user's. A file is none: to read on in it is nothing that a forward does."""
    if hasattr(type(value), "__next__") or isinstance(value, queue.SimpleQueue):
        return not isinstance(value, io.IOBase)
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = entries(value).values()
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        inner = value
    elif isinstance(value, types.FunctionType):
        inner = enclosed(value)
    elif isinstance(value, type):
        inner = () if is_foreign(value.__module__) or issubclass(value, torch.nn.Module) else [*vars(value).values()]
    elif not isinstance(value, types.ModuleType | torch.nn.Module) and not is_foreign(type(value).__module__):
        inner = [*dictionary_of(value).values()]
    return depth > 0 and any(holds_iterator(one, depth - 1) for one in inner)


def bound_to(value: Any) -> Any:
    """The object that a method written in C is bound to; None for what is none, or is a function."""
    owner = getattr(value, "__self__", None) if isinstance(value, _METHODS) else None
    return None if isinstance(owner, types.ModuleType | type) else owner


def inside(value: Any) -> Iterator[Any]:
    """What a value refers to, and could be reached through it."""
    match value:
        case dict():
            yield from entries(value).values()
        case types.MappingProxyType():
            yield from value.values()
        case list() | tuple() | set() | frozenset() | collections.deque() | ValuesView():
            yield from value
        case functools.partial():
            yield from (value.func, *value.args, *value.keywords.values())
        case types.MethodType():
            yield from (value.__self__, value.__func__)
        case types.FunctionType():
            yield from (*enclosed(value), *defaults(value))
        case staticmethod() | classmethod():
            yield value.__func__
        case weakref.ref():
            yield value()
        case types.BuiltinMethodType() | types.MethodWrapperType():
            yield bound_to(value)
    yield from attributes(value).values()


def attributes(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps, in slots as well; none of a class's or a module's, which are everybody's."""
    if isinstance(value, types.MethodType | types.ModuleType | type):
        return {}
    return {**slotted(value), **dictionary_of(value)}


def dictionary_of(value: Any) -> dict[str, Any]:
    """The dictionary of an object; an empty one if it has none. It is not asked itself: its `__getattr__` may say or
    raise anything."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """What is in a dict, in its order, however its class would look it up."""
    if type(value) is dict:
        return value.copy()
    kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return dict(kind.items(value))


def slotted(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps in slots."""
    found = {}
    for name in slots(type(value)):
        with contextlib.suppress(AttributeError):  # nothing was put there
            found[name] = object.__getattribute__(value, name)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def slots(kind: type) -> tuple[str, ...]:
    """The names of a class's slots, as they are spelled outside of it."""
    found = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))
