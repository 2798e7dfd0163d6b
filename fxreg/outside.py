"""What functions read from outside: global variables, what they import, and attributes of the classes, modules and
objects that these name.

A graph holds the values as they were when it was captured. What is compared later is what code mentions by name; what
an installed package keeps in containers and objects of its own is taken for constant.
"""

import logging
import operator
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from .enclosed import HOLDERS, dictionary_of, inside
from .freezing import frozen, objects_in
from .naming import names_in_code, names_in_text, names_mentioned
from .packages import is_foreign, is_installed, is_library, is_own
from .structure import PLAIN

_Pick: TypeAlias = Callable[[Collection[str]], Collection[str]]
_MISSING = object()
_SPECIAL = {
    "__bool__", "__call__", "__contains__", "__eq__", "__float__", "__get__", "__getattr__", "__getattribute__",
    "__getitem__", "__init__", "__int__", "__iter__", "__len__", "__new__", "__next__", "__post_init__",
}  # fmt: skip
"""Methods that nobody calls by name."""
_NEVER = (Tensor, nn.Module, logging.Logger, types.GenericAlias)
_TAKEN = (
    *HOLDERS, Collection, operator.attrgetter, operator.itemgetter, operator.methodcaller, property, staticmethod,
    classmethod, cached_property, weakref.ref,
)  # fmt: skip
"""Of a library's objects, those that are what the user put in."""


class Unnamed:
    """What no name leads to: a class that was made in a function, or the global variables of functions of no module. A
    pickle does not have it."""

    def __init__(self, what: type | Mapping[str, Any] | None = None) -> None:
        self.what = what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unnamed) and self.what is other.what

    def __hash__(self) -> int:
        return id(self.what)

    def __str__(self) -> str:
        return f"{self.what.__module__}.{self.what.__qualname__}" if isinstance(self.what, type) else "globals()"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unnamed":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Unnamed, ()


class Place(NamedTuple):
    """What a name in some code leads to.

    Attributes:
        module: the name of the module that has the variable; or a class, or variables, that none has.
        path: the variable's name, and that of an attribute of it, and of one of that.
        value: what is there.
    """

    module: str | Unnamed
    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return ".".join((str(self.module), *self.path))


@dataclass(frozen=True)
class Outside:
    """A global variable, or an attribute of one.

    Attributes:
        module, path: its place.
        value: what was there, frozen.
    """

    module: str | Unnamed
    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return ".".join((str(self.module), *self.path))

    @property
    def is_gone(self) -> bool:
        """Whether nobody can tell what is there, in a pickle's copy."""
        return isinstance(self.module, Unnamed) and self.module.what is None

    def now(self) -> Any:
        """What is there now."""
        at = self.module.what if isinstance(self.module, Unnamed) else sys.modules.get(self.module)
        if isinstance(at, Mapping):
            return _at(at.get(self.path[0], _MISSING), self.path[1:])
        return _at(at, self.path)


def read_outside(
    codes: Collection[tuple[types.CodeType, Mapping[str, Any]]],
    kept: Collection[Any] = (),
    asked: Callable[[types.CodeType, Collection[str]], Collection[str]] = lambda code, names: (),
) -> tuple[Outside, ...]:
    """What code may read, with its global variables, and what it finds in the classes of some values; each once.

    Args:
        kept: the values of attributes that it read.
        asked: those of some names for which it asks by a value, and which need not be there.
    """
    names, absent = _got_by(kept), set[str]()
    for code, space in codes:
        if is_own(space.get("__name__")):
            names |= names_mentioned(code)
            absent |= {*asked(code, names_mentioned(code))}

    def found() -> Iterator[Place]:
        for code, space in codes:
            module = space.get("__name__", "")
            picks = partial(_picked, names if is_own(module) else names_mentioned(code), absent, partial(asked, code))
            yield from places(code, space, picks)
            for name in names_in_code(code).read if is_own(module) else ():
                if name not in space:
                    yield Place(_home(space), (name,), _MISSING)
        picks = partial(_picked, names, absent, lambda present: ())
        for home in _homes(values):
            yield from _leading_on(home, picks, set())

    values, each = [*kept], list[Place]()
    for _ in range(2):  # in what is found may be classes and modules, and getters, which ask for more
        each = [*found()]
        values = [*kept, *(place.value for place in each)]
        names |= _got_by([place.value for place in each])
    return tuple({one[:2]: outside for one in each if (outside := _outside(one))}.values())


def _homes(values: Iterable[Any]) -> Iterator[Place]:
    """Where to look for the classes and modules of the user's that are in some values, those of objects included; not
    for classes of `nn.Module`, which are compared where they are called."""
    met: dict[int, Any] = {}
    for value in values:
        if is_own(type(value).__module__) or isinstance(value, (*HOLDERS, type, types.ModuleType)):
            for one in objects_in(value):
                home = one if isinstance(one, type | types.ModuleType) else type(one)
                met[id(home)] = home
    for home in met.values():
        if isinstance(home, types.ModuleType):
            yield Place(home.__name__, (), home)
        elif is_own(home.__module__) and not issubclass(home, nn.Module):
            path = tuple(home.__qualname__.split("."))
            is_there = _at(sys.modules.get(home.__module__), path) is home
            yield Place(home.__module__, path, home) if is_there else Place(Unnamed(home), (), home)


def _at(module: Any, path: Iterable[str]) -> Any:
    """What is in a module at the end of some names."""
    for part in path:
        module = found_in(module, part)
    return module


def _picked(
    names: Collection[str],
    absent: Collection[str],
    asked: Callable[[Collection[str]], Collection[str]],
    present: Collection[str],
) -> set[str]:
    """Which attributes to follow: those that are mentioned, and those that are asked for and are not there."""
    return {*names}.intersection(present).union(asked(present), absent)


def places(code: types.CodeType, space: Mapping[str, Any], picks: _Pick | None = None) -> Iterator[Place]:
    """What the names in code lead to that runs with some global variables: these, what it imports, and attributes that
    it mentions of the modules and classes among them, and of the classes of objects.

    Args:
        picks: which attributes to follow, of those that something has; by default those that the code mentions.
    """
    names, met = names_in_code(code), set[int]()
    picks = picks or names_mentioned(code).intersection
    for name in names.read:
        if name in space:
            yield from _leading_on(Place(_home(space), (name,), space[name]), picks, met)
    for name in _imported(names.imported, space.get("__package__") or ""):
        if isinstance(module := sys.modules.get(name), types.ModuleType):
            yield from _leading_on(Place(name, (), module), picks, met)


def _home(space: Mapping[str, Any]) -> str | Unnamed:
    """Whose global variables some are: a module's that can be found, or else nobody's."""
    name = space.get("__name__", "")
    return name if space is vars(sys.modules.get(name, types)) else Unnamed(space)


def _imported(modules: Iterable[tuple[str, int]], package: str) -> Iterator[str]:
    """The full names of what is imported inside of functions, and of what is around that."""
    for name, dots in modules:
        around = package.rsplit(".", dots - 1)[0] if dots else ""
        parts = f"{around}.{name}".strip(".").split(".")
        yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _leading_on(place: Place, picks: _Pick, met: set[int]) -> Iterator[Place]:
    """A place, and those to which names lead from there; and to which none need to lead: special methods."""
    yield place
    if id(place.value) not in met and (space := attributes_of(place.value)) is not None:
        met.add(id(place.value))
        for name in {*picks(space.keys())}.union(filter(is_special, space)):
            yield from _leading_on(Place(place.module, (*place.path, name), space.get(name, _MISSING)), picks, met)


def is_special(name: str) -> bool:
    return name in _SPECIAL


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of a module, a class, or an object's class; of an installed package's, only plain values, those of
    the object itself included. None if nobody follows them: what a library has, or what has none."""
    if type(value) in PLAIN or isinstance(value, Tensor | nn.Module | types.FunctionType):
        return None
    kind = value if isinstance(value, type) else type(value)
    is_module = isinstance(value, types.ModuleType)
    home = value.__name__ if is_module else kind.__module__
    if is_foreign(home):
        return None
    found: dict[str, Any] = {}
    for base in () if is_module else _bases(kind)[::-1]:
        found |= {} if is_foreign(base.__module__) else vars(base)
    if is_module or not (is_own(home) or value is kind):
        found |= dictionary_of(value)
    if not is_own(home):
        return {name: one for name, one in found.items() if type(one) in PLAIN}
    if issubclass(kind, nn.Module):  # whose methods are compared where it is called
        return {name: one for name, one in found.items() if not isinstance(one, types.FunctionType)}
    return found


def found_in(owner: Any, name: str) -> Any:
    """What a module or an object has under a name, or its class."""
    if isinstance(owner, types.ModuleType):
        return vars(owner).get(name, _MISSING)
    if name == "__code__":
        return owner.__code__ if isinstance(owner, types.FunctionType) else _MISSING
    own = {} if isinstance(owner, type) else dictionary_of(owner)
    kind = owner if isinstance(owner, type) else type(owner)
    spaces: tuple[Mapping[str, Any], ...] = (own, *map(vars, _bases(kind)))
    return next((space[name] for space in spaces if name in space), _MISSING)


def _bases(kind: type) -> tuple[type, ...]:
    """Where attributes of a class are looked up: in its bases, and those of its class."""
    metaclass: type = type(kind)
    return (*kind.__mro__, *metaclass.__mro__)


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
    if (
        type(value) in PLAIN
        or value is _MISSING
        or is_named
        or not (is_opaque or (isinstance(module, str) and is_installed(module)))
    ):
        return Outside(module, path, frozen(value))
    return None


def _got_by(values: Iterable[Any]) -> set[str]:
    """The attributes that getters among some values are for, in functions and containers as well."""
    names, met, waiting = set[str](), set[int](), [*values]
    while waiting:
        value = waiting.pop()
        if id(value) not in met:
            met.add(id(value))
            if isinstance(value, operator.attrgetter):
                names.update(*map(names_in_text, value.__reduce__()[1]))
            waiting += inside(value) if isinstance(value, HOLDERS) else ()
    return names
