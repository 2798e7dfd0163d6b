"""Seeing quickly that a value is as it was: what it is made of is compared by identity, which takes next to no time."""

import functools
import operator
import types
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from .enclosed import bound_to, dictionary_of, entries, slots
from .freezing import NAMED, SCALARS, frozen
from .structure import alike

_LEAVES = (*NAMED, Tensor, nn.Module, fx.Graph, types.CodeType, range)
_CONTAINERS = (list, tuple, set, frozenset, deque)


class Witness:
    """Who saw some values as they were. It is not copied, nor pickled: a copy has to look for itself.

    >>> witness, config = Witness(), {"sizes": [1, 2]}
    >>> then = frozen(config)
    >>> witness.agrees("config", config, then)
    True
    >>> config["sizes"][0] = 2
    >>> witness.agrees("config", config, then)
    False
    """

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._seen: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {}
        self._unseen: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Witness, ())

    def knows(self, name: str, found: Any) -> bool:
        """Whether what a class has under a name is what was met there, with the code that it had."""
        known, function, code = self._functions.get(name, (self, None, None))
        return known is found and getattr(function, "__code__", None) is code

    def meets(self, name: str, found: Any, function: types.FunctionType | None) -> None:
        """What a class has under a name was compared, and agrees; behind it is a function."""
        self._functions[name] = found, function, getattr(function, "__code__", None)

    def agrees(self, name: str, now: Any, then: Any) -> bool:
        """Whether the value under a name is as it was frozen."""
        seen = self._seen.get(name)
        if seen is not None and seen[0] is now and all(map(_is_same, seen[1])):
            return True
        if not alike(frozen(now), then):
            return False
        parts = _parts(now)
        if parts is not None:
            self._seen[name] = (now, parts)
        (self._unseen.add if parts is None else self._unseen.discard)(name)
        return True

    def may_hold(self, thing: Any) -> bool:
        """Whether something may be among what the values are made of."""
        parts = (part for _, parts in self._seen.values() for part in parts)
        return bool(self._unseen) or any(thing is one or thing is own for one, _, _, own, _ in parts)


def _parts(value: Any) -> list[tuple[Any, ...]] | None:
    """Everything in a value that can change, each with its type, its own dictionary and what is in it; None if that is
    not all."""
    found: list[tuple[Any, ...]] = []
    met: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        kind: type = type(one)
        if kind in SCALARS or id(one) in met:
            continue
        met[id(one)] = one
        if isinstance(one, _LEAVES):
            waiting.append(bound_to(one))
            continue
        own = dictionary_of(one) if kind.__dictoffset__ else None
        match one:
            case dict() if not isinstance(one, defaultdict):
                inside: Any = entries(one)
                waiting += inside.values()
            case _ if isinstance(one, _CONTAINERS):
                inside = [*one]
                waiting += inside
            case types.FunctionType() if not (one.__closure__ or one.__defaults__ or one.__kwdefaults__ or own):
                found.append((one, kind, (one.__code__, None, None), None, None))
                continue
            case types.MethodType():
                waiting += (one.__func__, one.__self__)
                continue
            case functools.partial():
                waiting += (one.func, one.args, one.keywords)
                continue
            case object() if type(own) is dict and _is_all_in_its_dict(kind):
                inside = None
            case _:
                return None
        kept = dict(own) if own is not None else None
        if kept is not None:
            waiting += kept.values()
        found.append((one, kind, inside, own, kept))
    return found


@functools.lru_cache(maxsize=4096)
def _is_all_in_its_dict(kind: type) -> bool:
    """Whether instances have nothing but their attributes: no slots, and nothing in C below their class."""
    return kind.__basicsize__ <= _Empty.__basicsize__ and not kind.__itemsize__ and not slots(kind)


class _Empty:
    """An object with attributes."""


def _is_same(part: tuple[Any, ...]) -> bool:
    one, kind, inside, own, kept = part
    if kind is types.FunctionType:
        return _are((one.__code__, one.__defaults__, one.__kwdefaults__), inside)
    if type(one) is not kind or (inside is not None and not _holds(one, inside)):
        return False
    return own is None or (one.__dict__ is own and _holds(own, kept))


def _holds(now: Any, then: Any) -> bool:
    if len(now) != len(then):
        return False
    if isinstance(then, dict):
        now = entries(now)
        return _are(now, then) and _are(now.values(), then.values())
    return _are(now, then)


def _are(now: Iterable[Any], then: Iterable[Any]) -> bool:
    return all(map(operator.is_, now, then))
