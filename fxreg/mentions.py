"""Where code mentions the name of an attribute: as it is, in a constant, or by a value that is a name."""

import dis
import functools
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .naming import codes_in, names_in_text
from .stacks import Stack, instructions_of
from .writes import ANY, Written, argument, pattern

_ASK = ("getattr", "hasattr")
_GETTERS = ("attrgetter", "methodcaller")
_ALL = ("vars", "__dict__", "dir", *_GETTERS, "astuple", "asdict")
_APART = {"copy": ("copy", "deepcopy"), "dataclasses": ("replace",), "pickle": ("dumps",)}
"""What looks at all attributes of an object: for its name alone, and for that and the name of its module."""
_CALLS = ("PRECALL", "CALL")
_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME")
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_NONE = "(?!)"


class _Saying(NamedTuple):
    """What an instruction mentions.

    Attributes:
        names: what it says.
        pattern: a regular expression for the name that it asks for, if it asks for one by value.
        name, owner: the positions of the last instructions for that value, and for whose attribute it is, if known.
        takes_all: whether it looks at all attributes at once.
    """

    names: frozenset[str]
    pattern: str = _NONE
    name: int | None = None
    owner: int | None = None
    takes_all: bool = False


def mentioned(frame: types.FrameType, watched: frozenset[str]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Those of some names that a frame's next instruction has to do with, each as it is watched and as it is, and whose
    attribute it is, if that can be told. Local variables are no attributes, and neither are a function's own keyword
    arguments.

    Args:
        watched: names; and patterns, of names that code asks for by a value.

    Where all attributes are looked at, "" is what a name is.
    """
    saying = sayings(frame.f_code).get(frame.f_lasti) if watched else None
    if saying is None:
        return
    stack = Stack(frame)
    for name in watched & saying.names:
        if not stack.is_key():
            yield name, name, stack.read()
    if saying.takes_all and not stack.is_module():
        yield from ((one, "", _taken(stack)) for one in watched)
    if saying.takes_all or saying.pattern == _NONE:
        return
    value, is_constant = stack.loaded(saying.name), saying.pattern.isidentifier()
    for one in watched:
        if isinstance(value, str):
            if one == value or (not (is_constant or one.isidentifier()) and _fit(one, value)):
                yield one, value, stack.asked(saying.owner)
        elif one.isidentifier() and _fit(saying.pattern, one):
            yield one, one, stack.asked(saying.owner)
        elif not one.isidentifier():
            yield one, one, ()


def _taken(stack: Stack) -> tuple[Any, ...]:
    """Whose attributes are all looked at; nothing if nobody knows."""
    name = stack.instructions[stack.position].argval
    return stack.read() if name == "__dict__" else stack.taken() if name not in _GETTERS else ()


@functools.lru_cache(maxsize=4096)
def may_mention(code: types.CodeType, watched: frozenset[str]) -> bool:
    """Whether any instruction of some code may have to do with any of some names and patterns."""
    return any(
        watched & saying.names or any(_may_ask(saying.pattern, one) for one in watched)
        for saying in sayings(code).values()
    )


def _may_ask(pattern: str, watched: str) -> bool:
    if pattern == _NONE:
        return False
    return _fit(pattern, watched) if watched.isidentifier() else not pattern.isidentifier()


def _fit(pattern: str, name: str) -> bool:
    return re.compile(pattern, re.DOTALL).fullmatch(name) is not None


def asked(codes: Iterable[types.CodeType]) -> Written:
    """The names by which code asks for attributes, which need not be there."""
    each = [one.pattern for code in codes for inner in codes_in(code) for one in sayings(inner).values()]
    return Written.of({one for one in each if one != _NONE})


@functools.lru_cache(maxsize=4096)
def sayings(code: types.CodeType) -> Mapping[int, _Saying]:
    """The offsets of the instructions of some code that may have to do with attributes, and with which."""
    instructions, found = instructions_of(code), dict[int, _Saying]()
    for at, one in enumerate(instructions):
        if one.opcode not in dis.hasname and one.opcode not in dis.hasconst:
            continue
        saying = _by_value(instructions, at)
        names = frozenset(_strings(one.argval))
        if saying is not None:
            found[one.offset] = saying._replace(names=names)
            if saying.name is not None and saying.pattern.isidentifier():  # a constant, which says no more than that
                found[instructions[saying.name].offset] = _Saying(frozenset())
        elif names:
            found.setdefault(one.offset, _Saying(names))
    return found


def _by_value(instructions: tuple[dis.Instruction, ...], at: int) -> _Saying | None:
    """How an attribute is asked for from an instruction on, if by a value that is its name."""
    one, following = instructions[at], instructions[at + 1 :]
    owner, value = list[dis.Instruction](), list[dis.Instruction]()
    if one.argval in _ASK and one.opname in _GLOBALS:
        owner, value = argument(following, {2: 0, 3: 0}), argument(following, {2: 1, 3: 1})
    elif one.argval == "__getattribute__":
        value = argument(following, {1: 0, 2: 1})
    elif one.argval == "__dict__":
        get = next((i for i, other in enumerate(following) if other.opname not in _CALLS), 0)
        value = argument(following[get + 1 :], {1: 0, 2: 0}) if following and following[get].argval == "get" else []
    elif one.argval not in (*_ASK, *_ALL) and not _takes_apart(instructions, at):
        return None
    name, whose = (instructions.index(each[-1]) if each else None for each in (value, owner))
    takes_all = one.argval not in _ASK and not value
    return _Saying(frozenset(), pattern(value) if value else ANY, name, whose, takes_all)


def _takes_apart(instructions: Sequence[dis.Instruction], at: int) -> bool:
    """Whether a function that looks at all attributes is loaded, or taken from a module, whatever that is called."""
    one, before = instructions[at], instructions[at - 1]
    is_global = one.opname in _GLOBALS or (one.opname in _READS and before.opname in _GLOBALS)
    if is_global and one.argval in itertools.chain(*_APART.values()):
        return True
    return one.opname in _READS and one.argval in _APART.get(before.argval, ())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from names_in_text(value)
    elif isinstance(value, tuple | frozenset):
        for one in value:
            yield from _strings(one)
