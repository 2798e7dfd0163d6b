"""The names in code: of variables, of attributes, of what it imports, and strings that could be names."""

import dis
import functools
import itertools
import re
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

_ATTRIBUTES = re.compile(r"\.(\w+)")


class Names(NamedTuple):
    """The names in some code, and in the code inside it.

    Attributes:
        read: the global variables that it loads.
        attributes: the attributes that it mentions.
        imported: the modules that it imports, with the number of leading dots.
        rebound: the variables, not its own, to which it gives a new value.
        filled: those into which it puts something.
    """

    read: tuple[str, ...]
    attributes: tuple[str, ...]
    imported: tuple[tuple[str, int], ...]
    rebound: frozenset[str]
    filled: frozenset[str]


_READS = ("LOAD_GLOBAL", "LOAD_NAME")
_MENTIONS = ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM")
_REBINDS = ("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF")
PUTS = {
    "append", "appendleft", "add", "update", "setdefault", "pop", "popitem", "extend", "clear", "insert", "remove",
    "discard",
}  # fmt: skip
"""Methods that change what a container holds."""
FILLS = PUTS | {"set", "reset"}
"""Methods that change what something holds: a container, or a context variable."""


@functools.lru_cache(maxsize=4096)
def names_in_code(code: types.CodeType) -> Names:
    """The names in some code, in its order."""
    read, attributes, imported = dict[str, None](), dict[str, None](), dict[tuple[str, int], None]()
    rebound, filled = set[str](), set[str]()
    for one in codes_in(code):
        instructions = [*dis.get_instructions(one)]
        begins: dict[tuple[Any, Any], str] = {}  # where an expression begins, and with which variable
        for at, instruction in enumerate(instructions):
            name, argument, where = instruction.opname, instruction.argval, begin(instruction)
            if name in _READS or (name == "LOAD_DEREF" and argument in code.co_freevars):
                begins[where] = argument
            if name in _READS:
                read[argument] = None
            elif name in _MENTIONS:
                attributes[argument] = None
                if argument in FILLS and where in begins and begins[where] == instructions[at - 1].argval:
                    filled.add(begins[where])
            elif name == "IMPORT_NAME":
                imported[argument, instructions[at - 2].argval] = None
            elif name in ("STORE_SUBSCR", "DELETE_SUBSCR") and where in begins:
                filled.add(begins[where])
            elif name in _REBINDS and (argument in code.co_freevars or name.endswith("GLOBAL")):
                rebound.add(argument)
    return Names(tuple(read), tuple(attributes), tuple(imported), frozenset(rebound), frozenset(filled))


def begin(instruction: dis.Instruction) -> tuple[Any, Any]:
    """The line and the column of the expression that an instruction is for; of none, if Python does not keep them."""
    position = instruction.positions
    known = position is not None and position.col_offset is not None
    return (position.lineno, position.col_offset) if known and position else (None, instruction.offset)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Some code, and all the code inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Every name that code uses, other than of local variables."""
    return frozenset(name for one in codes_in(code) for name in (*one.co_names, *_matched(one)))


def _matched(code: types.CodeType) -> Iterator[str]:
    """The attributes that are asked for by `case Point(x=0)`."""
    for one, after in itertools.pairwise(dis.get_instructions(code)):
        if after.opname == "MATCH_CLASS":
            yield from one.argval


@functools.lru_cache(maxsize=4096)
def names_mentioned(code: types.CodeType) -> frozenset[str]:
    """Every name, and every string that could be one, in some code."""
    return frozenset(names_in(code)).union(_strings(code))


def _strings(code: types.CodeType) -> Iterator[str]:
    """The constants in code that could be names, or format strings that ask for some."""
    constants = (constant for one in codes_in(code) for constant in one.co_consts if isinstance(constant, str))
    return (name for constant in constants for name in names_in_text(constant))


def names_in_text(text: str) -> list[str]:
    """The names in a string, if that could be one, or some with dots between; attributes, if it is one for `format`."""
    parts = text.split(".")
    return parts if all(map(str.isidentifier, parts)) else _ATTRIBUTES.findall(text) if "{" in text else []
