"""What code may run when something runs: everything that is named on the way, or kept where a name leads.

That is more than will run, and never less, but for what is found by computed names. It goes as far as the user's own
program: installed packages name so much that all of it would be reached from anywhere.
"""

import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from .enclosed import defaults, dictionary_of, enclosed, entries, slotted
from .naming import names_in, names_mentioned
from .packages import is_foreign, is_installed

_LEAVES = (bool, int, float, complex, str, bytes, type(None), Tensor, fx.Graph)
_BORN = ("__new__", "__init__", "__post_init__")


def reach(values: Iterable[Any]) -> tuple[types.FunctionType, ...]:
    """The user's functions that running some functions, methods, objects or modules may reach."""
    found: dict[types.FunctionType, None] = {}
    names, spaces = {"forward"}, list[Mapping[str, Any]]()
    met: dict[int, Any] = {}
    waiting = [*values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _LEAVES) or id(value) in met:
            continue
        met[id(value)] = value
        if isinstance(value, types.FunctionType):
            if _is_elsewhere(value.__module__):
                continue
            found[value] = None
            waiting += (*enclosed(value), *defaults(value), getattr(value, "__wrapped__", None), *_outside(value))
            new = names_mentioned(value.__code__) - names
            names |= new
            waiting += [space[name] for space in spaces for name in new & space.keys()]
        elif isinstance(value, type | types.ModuleType):
            for space in _spaces(value):
                spaces.append(space)
                special = {name for name in space if name.startswith("__") and name not in _BORN}
                waiting += [space[name] for name in (names | special) & space.keys()]
        else:
            waiting += _inside(value)
    return tuple(found)


def _outside(function: types.FunctionType) -> Iterator[Any]:
    """What a function may read as a global variable, or import; a class it may make an instance of."""
    space = function.__globals__
    package = space.get("__package__")
    for name in names_in(function.__code__):
        value = space.get(name)
        yield value
        yield sys.modules.get(name)
        yield sys.modules.get(f"{package}.{name}")
        if isinstance(value, type) and not _is_elsewhere(value.__module__):
            yield from (vars(base).get(born) for base in value.__mro__ for born in _BORN)


def _spaces(value: type | types.ModuleType) -> Iterator[Mapping[str, Any]]:
    """Where the names in a class, or a module, are."""
    if isinstance(value, types.ModuleType):
        if not _is_elsewhere(value.__name__):
            yield vars(value)
    else:
        yield from (vars(base) for base in value.__mro__ if not _is_elsewhere(base.__module__))


def _inside(value: Any) -> Iterator[Any]:
    match value:
        case staticmethod() | classmethod():
            yield value.__func__
        case types.MethodType():
            yield from (value.__func__, value.__self__)
        case property():
            yield from (value.fget, value.fset, value.fdel)
        case functools.cached_property():
            yield value.func
        case functools.partial():
            yield from (value.func, *value.args, *value.keywords.values())
        case list() | tuple() | set() | frozenset() | deque():
            yield from value
        case dict():
            yield from entries(value).values()
    kind = type(value)
    if isinstance(value, nn.Module) or not _is_elsewhere(kind.__module__):
        yield kind
        yield from slotted(value).values()
        yield from dictionary_of(value).values()


def _is_elsewhere(module: str | None) -> bool:
    return is_foreign(module) or is_installed(module)
