"""Which names code may give a new value: whoever reads one of them must not rely on what it was."""

import dis
import itertools
import re
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

from .methods import first_argument, is_load
from .naming import FILLS, begin, codes_in, names_in_code, names_mentioned
from .packages import is_foreign, is_installed
from .scanning import once_per_function
from .stacks import instructions_of, is_read_of_copy

_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL")
_SETTERS = {"setattr": 3, "delattr": 2}
_BY_NAME = {"__setattr__", "__delattr__", "vars", "__dict__", "globals"}
_ALL = {("LOAD_GLOBAL", "exec"), ("LOAD_GLOBAL", "eval"), ("STORE_ATTR", "__class__")}
"""What may change all attributes at once."""
ANY = ".*"
_READS = ("LOAD_ATTR", "LOAD_METHOD")
_JUMPS = {*dis.hasjrel, *dis.hasjabs}


class Written(NamedTuple):
    """The names that some code may give a new value, other than local ones.

    Attributes:
        names: those that it says.
        patterns: regular expressions of those that it puts together.
        filled: the attributes with containers into which it puts something.
        elsewhere: the names and patterns that may be attributes of what is no module.
    """

    names: frozenset[str]
    patterns: frozenset[str] = frozenset()
    filled: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()

    def among(self, names: Collection[str]) -> set[str]:
        """Those of some names that are among them."""
        fits = re.compile("|".join(sorted(self.patterns)) or r"(?!)", re.DOTALL).fullmatch
        return {name for name in names if name in self.names or fits(name)}

    def may_be(self, name: str) -> bool:
        """Whether a name, or a pattern, is among them."""
        return name in self.patterns or bool(self.among((name,)))

    def union(self, other: "Written") -> "Written":
        """What one of two may be."""
        return Written(*map(frozenset.union, self, other))

    def meeting(self, asked: "Written") -> set[str]:
        """The names among them that others may be, which code asks for; and the patterns, if it asks for such, too."""
        return self.among(asked.names) | asked.among(self.names) | (set(self.patterns) if asked.patterns else set())

    def filling(self, names: Collection[str]) -> Self:
        """The same, with those of some names that have containers into which it puts something."""
        filled = self.filled.intersection(names)
        return self._replace(names=self.names | filled, elsewhere=self.elsewhere | filled)

    def in_objects(self) -> "Written":
        """What of it may be attributes of what is no module."""
        return Written.of(self.elsewhere)

    @classmethod
    def by(cls, functions: Iterable[types.FunctionType], methods: Collection[types.FunctionType] = ()) -> Self:
        """What any of some functions may write.

        Args:
            methods: those that always get a module as their first argument.
        """
        found = {function: _written(function) for function in functions}
        each = [one if function in methods else one.anywhere() for function, one in found.items()]
        return cls(*(frozenset[str]().union(*(one[place] for one in each)) for place in range(4)))

    def anywhere(self) -> Self:
        """The same, if nobody knows whose attributes they are."""
        return self._replace(elsewhere=self.names | self.patterns)

    @classmethod
    def of(cls, patterns: Iterable[str], names: Iterable[str] = ()) -> Self:
        """Some names, and patterns, of which those that are names are taken for such."""
        plain = {one for one in patterns if one.isidentifier()}
        return cls(frozenset(names) | plain, frozenset(patterns) - plain)


@once_per_function
def _written(function: types.FunctionType) -> Written:
    """What a function writes; all but what it writes to its first argument, elsewhere."""
    own, is_new = first_argument(function), function.__name__ == "__init__"
    names, elsewhere, filled = set[str](), set[str](), set[str]()
    keeps = not (is_installed(function.__module__) or is_foreign(function.__globals__.get("__name__")))
    for code in codes_in(function.__code__):
        instructions = instructions_of(code)
        mine = own if code is function.__code__ else None
        if keeps:  # what packages keep in containers is taken for constant
            elsewhere |= names_in_code(code).filled
        filled.update(_filled(instructions))
        for at, one in enumerate(instructions):
            if one.opname in _STORES:
                is_own = one.opname.endswith("ATTR") and _is_to(mine, instructions, at)
                if not (is_own and is_new):
                    (names if is_own else elsewhere).add(str(one.argval))
        for written, owner in _by_name(code, instructions):
            (names if len(owner) == 1 and is_load(owner[0], mine) else elsewhere).add(written)
    return Written.of(names | elsewhere)._replace(filled=frozenset(filled), elsewhere=frozenset(elsewhere))


def _is_to(name: str | None, instructions: Sequence[dis.Instruction], at: int) -> bool:
    """Whether it is a local variable's attribute that is written: `value.name = 1`, `del value.name`."""
    if instructions[at - 1].opname == "SWAP":  # the owner, a copy of it, its attribute, and what is added
        written = instructions[at].argval
        at = next((i - 1 for i in range(at - 1, 1, -1) if is_read_of_copy(instructions[i - 1 : i + 1], written)), at)
    return is_load(instructions[at - 1], name) and not instructions[at].is_jump_target


def _filled(instructions: Iterable[dis.Instruction]) -> Iterator[str]:
    """The attributes with the containers into which something is put."""
    last: dict[Any, str] = {}  # of an expression, by where it begins
    for one in instructions:
        place = begin(one)
        if one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") or (one.opname in _READS and one.argval in FILLS):
            yield from (last[place],) if place in last else ()
        elif one.opname in _READS:
            last[place] = one.argval


def _by_name(
    code: types.CodeType, instructions: Sequence[dis.Instruction]
) -> Iterator[tuple[str, list[dis.Instruction]]]:
    """A pattern for each place that may write by a name which is a value like any other, and whose attribute it is."""
    if _BY_NAME & names_mentioned(code) or _SETTERS.keys() & set(code.co_consts):
        yield ANY, []
    for at, one in enumerate(instructions):
        if (one.opname, one.argval) in _ALL:
            yield ANY, []
        elif one.argval in _SETTERS and one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            following, count = instructions[at + 1 :], _SETTERS[one.argval]
            yield pattern(argument(following, {count: 1})), argument(following, {count: 0})
        elif one.argval in _SETTERS and one.opname != "LOAD_CONST":
            yield ANY, []


def argument(following: Sequence[dis.Instruction], places: Mapping[int, int]) -> list[dis.Instruction]:
    """The instructions for one argument of the call of a function that was just loaded: by how many it is given, which.
    None if they cannot be told."""
    found = (_arguments([*following], count)[place] for count, place in places.items())
    return next(filter(None, found), [])


def pattern(value: list[dis.Instruction]) -> str:
    """A regular expression for the strings that instructions may give."""
    match value:
        case [dis.Instruction(opname="LOAD_CONST", argval=str() as name)]:
            return re.escape(name)
        case [*parts, dis.Instruction(opname="BUILD_STRING", arg=int() as count)]:
            return "".join(map(pattern, _operands(parts, count)))
    return ANY


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
