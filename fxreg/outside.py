"""What functions read from outside: global variables, what they import, and attributes of the classes, modules and
objects that these name.

A graph holds the values as they were when it was captured. What is compared later is what code mentions by name; what
an installed package keeps in containers and objects of its own is taken for constant.
"""

import logging
import operator
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .enclosed import defaults, enclosed
from .freezing import frozen, objects_in
from .naming import names_in_code, names_in_text, names_mentioned
from .packages import is_foreign, is_installed, is_library, is_own
from .structure import PLAIN

_Pick: TypeAlias = Callable[[Collection[str]], Collection[str]]
_MISSING = object()
_NEVER = (Tensor, nn.Module, logging.Logger, types.GenericAlias)
_TAKEN = (Collection, partial, operator.attrgetter, operator.itemgetter, operator.methodcaller)
"""Of a library's objects, those that are what the user put in."""


class Place(NamedTuple):
    """What a name in some code leads to.

    Attributes:
        module: the name of the module that has the variable.
        path: the variable's name, and that of an attribute of it, and of one of that.
        value: what is there.
    """

    module: str
    path: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class Outside:
    """A global variable, or an attribute of one.

    Attributes:
        module, path: its place.
        value: what was there, frozen.
    """

    module: str
    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return ".".join((self.module, *self.path))

    def now(self) -> Any:
        """What is there now."""
        found: Any = sys.modules.get(self.module)
        for part in self.path:
            found = _found_in(found, part)
        return found


def read_outside(
    codes: Collection[tuple[types.CodeType, Mapping[str, Any]]],
    kept: Collection[Any] = (),
    asked: Callable[[types.CodeType, Collection[str]], Collection[str]] = lambda code, names: (),
) -> tuple[Outside, ...]:
    """What code may read, with its global variables, and what it finds in the classes of some values; each once.

    Args:
        kept: the values of attributes that it read.
        asked: those of some names for which it asks by a value.
    """
    got = _got_by({id(one): one for one in kept})

    def found() -> Iterator[Place]:
        for code, space in codes:
            is_there = space is vars(sys.modules.get(space.get("__name__", ""), types))  # not made by `exec`, nor gone
            yield from places(code, space if is_there else {}, partial(_among, got, asked, code))
        names = got.union(*(names_mentioned(code) for code, _ in codes))
        for kind in {type(one) for value in kept if is_own(type(value).__module__) for one in objects_in(value)}:
            path = tuple(kind.__qualname__.split("."))
            if is_own(kind.__module__) and "<locals>" not in path:
                yield from _leading_on(Place(kind.__module__, path, kind), names.intersection, set())

    for _ in range(2):  # among what is found may be getters, which ask for more
        each = [*found()]
        more = _got_by({id(place.value): place.value for place in each}) - got
        if not more:
            break
        got |= more
    return tuple({one[:2]: outside for one in each if (outside := _outside(one))}.values())


def _among(
    got: Collection[str],
    asked: Callable[[types.CodeType, Collection[str]], Collection[str]],
    code: types.CodeType,
    names: Collection[str],
) -> set[str]:
    return {name for name in names if name in got}.union(asked(code, names))


def places(
    code: types.CodeType,
    space: Mapping[str, Any],
    also: Callable[[Collection[str]], Collection[str]] = lambda names: (),
) -> Iterator[Place]:
    """What the names in code lead to that runs with some global variables: these, what it imports, and attributes that
    it mentions of the modules and classes among them, and of the classes of objects.

    Args:
        also: which others of some names of attributes it may mean.
    """
    names, attributes = names_in_code(code), names_mentioned(code)
    met: set[int] = set()

    def pick(present: Collection[str]) -> Collection[str]:
        return attributes.intersection(present).union(also(present))

    for name in names.read:
        if name in space:
            yield from _leading_on(Place(space.get("__name__", ""), (name,), space[name]), pick, met)
    for name in _imported(names.imported, space.get("__package__") or ""):
        if isinstance(module := sys.modules.get(name), types.ModuleType):
            yield from _leading_on(Place(name, (), module), pick, met)


def _imported(modules: Iterable[tuple[str, int]], package: str) -> Iterator[str]:
    """The full names of what is imported inside of functions, and of what is around that."""
    for name, dots in modules:
        around = package.rsplit(".", dots - 1)[0] if dots else ""
        parts = f"{around}.{name}".strip(".").split(".")
        yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _leading_on(place: Place, pick: _Pick, met: set[int]) -> Iterator[Place]:
    """A place, and those to which names lead from there."""
    yield place
    if id(place.value) not in met:
        met.add(id(place.value))
        space = _space(place.value)
        for name in pick(space.keys()):
            yield from _leading_on(Place(place.module, (*place.path, name), space[name]), pick, met)


def _space(value: Any) -> dict[str, Any]:
    """The attributes of a module, a class, or an object's class; of an installed package's, only plain values, those of
    the object itself included."""
    if type(value) in PLAIN or isinstance(value, Tensor | nn.Module | types.FunctionType):
        return {}
    kind = value if isinstance(value, type) else type(value)
    is_module = isinstance(value, types.ModuleType)
    home = value.__name__ if is_module else kind.__module__
    if is_foreign(home):
        return {}
    found: dict[str, Any] = {}
    for base in () if is_module else reversed(kind.__mro__):
        found |= {} if is_foreign(base.__module__) else vars(base)
    if is_module or not (is_own(home) or value is kind):
        found |= getattr(value, "__dict__", {})
    if not is_own(home):
        return {name: one for name, one in found.items() if type(one) in PLAIN}
    if issubclass(kind, nn.Module):  # whose methods are compared where it is called
        return {name: one for name, one in found.items() if not isinstance(one, types.FunctionType)}
    return found


def _found_in(owner: Any, name: str) -> Any:
    """What a module or an object has under a name, or its class."""
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, _MISSING)
    if name == "__code__":
        return getattr(owner, name, _MISSING)
    own = {} if isinstance(owner, type) else getattr(owner, "__dict__", {})
    kind = owner if isinstance(owner, type) else type(owner)
    return next((space[name] for space in (own, *map(vars, kind.__mro__)) if name in space), _MISSING)


def _outside(place: Place) -> Outside | None:
    """What to compare later of what is at a place, if anything."""
    module, path, value = place
    if not path or isinstance(value, _NEVER):
        return None
    if isinstance(value, types.FunctionType):
        if is_library(value.__module__) or is_own(value.__module__):
            return Outside(module, path, frozen(value))
        return Outside(module, (*path, "__code__"), frozen(value.__code__))
    is_named = isinstance(value, type | types.ModuleType | types.BuiltinFunctionType)
    is_opaque = is_library(type(value).__module__) and not isinstance(value, _TAKEN)
    if type(value) in PLAIN or is_named or not (is_installed(module) or is_opaque):
        return Outside(module, path, frozen(value))
    return None


def _got_by(values: Mapping[int, Any]) -> set[str]:
    """The attributes that getters among some values are for, in functions and containers as well."""
    names, met, waiting = set[str](), set[int](), [*values.values()]
    while waiting:
        value = waiting.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        match value:
            case operator.attrgetter():
                names.update(*map(names_in_text, value.__reduce__()[1]))
            case types.FunctionType():
                waiting += (*enclosed(value), *defaults(value))
            case partial():
                waiting += (value.func, *value.args, *value.keywords.values())
            case list() | tuple():
                waiting += value
            case dict():
                waiting += dict.values(value)
    return names
