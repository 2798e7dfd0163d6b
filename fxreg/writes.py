"""Which names code may give a new value: whoever reads one of them must not rely on what it was."""

import dis
import itertools
import re
import types
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple, Self

from .enclosed import codes_in
from .scanning import names_mentioned, once_per_function

_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
_SETTERS = {"setattr": 3, "delattr": 2}
_BY_NAME = {"__setattr__", "__delattr__", "vars", "__dict__", "globals"}
_ANY = ".*"
_JUMPS = {*dis.hasjrel, *dis.hasjabs}


class Written(NamedTuple):
    """The names that some code may give a new value, other than local ones.

    Attributes:
        names: those that it says.
        patterns: regular expressions of those that it puts together.
    """

    names: frozenset[str]
    patterns: frozenset[str] = frozenset()

    def among(self, names: Collection[str]) -> set[str]:
        """Those of some names that are among them."""
        fits = re.compile("|".join(sorted(self.patterns)) or r"(?!)", re.DOTALL).fullmatch
        return {name for name in names if name in self.names or fits(name)}

    @classmethod
    def by(cls, functions: Iterable[types.FunctionType]) -> Self:
        """What any of some functions may write."""
        each = [*map(_written, functions)]
        return cls(frozenset().union(*(one.names for one in each)), frozenset().union(*(one.patterns for one in each)))


@once_per_function
def _written(function: types.FunctionType) -> Written:
    own = function.__code__.co_varnames[:1] if function.__name__ == "__init__" else ()
    names, patterns = set[str](), set[str]()
    for code in codes_in(function.__code__):
        instructions = [*dis.get_instructions(code)]
        before = None
        for one in instructions:
            is_new = before is not None and before.opname == "LOAD_FAST" and before.argval in own
            if one.opname in _STORES and not is_new:
                names.add(str(one.argval))
            before = one
        patterns.update(_by_name(code, instructions))
    return Written(frozenset(names), frozenset(patterns))


def _by_name(code: types.CodeType, instructions: list[dis.Instruction]) -> Iterator[str]:
    """A pattern for each place that may write by a name which is a value like any other."""
    if _BY_NAME & names_mentioned(code) or _SETTERS.keys() & set(code.co_consts):
        yield _ANY
    for at, one in enumerate(instructions):
        if one.argval in _SETTERS and one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield _pattern(_arguments(instructions[at + 1 :], _SETTERS[one.argval])[1])
        elif one.argval in _SETTERS and one.opname != "LOAD_CONST":
            yield _ANY


def _pattern(value: list[dis.Instruction]) -> str:
    """A regular expression for the strings that instructions may give."""
    match value:
        case [dis.Instruction(opname="LOAD_CONST", argval=str() as name)]:
            return re.escape(name)
        case [*parts, dis.Instruction(opname="BUILD_STRING", arg=int() as count)]:
            return "".join(map(_pattern, _operands(parts, count)))
    return _ANY


def _arguments(instructions: list[dis.Instruction], count: int) -> list[list[dis.Instruction]]:
    """The instructions for each argument of a call of a global function, which follow its name; none for any if they
    cannot be told."""
    following = instructions[instructions[0].opname == "PUSH_NULL" :]  # which is for the call
    for end, depth in enumerate(_depths(following)):
        if depth == count and end < len(following) and following[end].opname in ("PRECALL", "CALL"):
            return _operands(following[:end], count) if following[end].arg == count else [[]] * count
    return [[]] * count


def _operands(instructions: list[dis.Instruction], count: int) -> list[list[dis.Instruction]]:
    """The instructions for each of the values that they leave on the stack: each starts where there was last room for
    it."""
    starts = [0] * count
    for at, (before, after) in enumerate(itertools.pairwise(_depths(instructions))):
        for place in range(before, min(after, count)):
            starts[place] = at
    return [instructions[start:end] for start, end in itertools.pairwise([*starts, len(instructions)])]


def _depths(instructions: list[dis.Instruction]) -> list[int]:
    """How many values are on the stack before each instruction and behind the last, as far as none of them jumps."""
    depths = [0]
    for one in instructions:
        if one.opcode in _JUMPS or depths[-1] < 0:
            break
        argument = one.arg if one.opcode >= dis.HAVE_ARGUMENT else None
        depths.append(depths[-1] + dis.stack_effect(one.opcode, argument, jump=False))
    return depths
