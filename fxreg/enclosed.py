"""What functions, objects and dicts carry with them, past what their classes make of it."""

import collections
import dis
import functools
import io
import queue
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .packages import is_foreign


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
        inner = [*getattr(value, "__dict__", {}).values()]
    return depth > 0 and any(holds_iterator(one, depth - 1) for one in inner)


def entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """What is in a dict, in its order, however its class would look it up."""
    if type(value) is dict:
        return value.copy()
    kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return dict(kind.items(value))


def slotted(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps in slots."""
    return {name: getattr(value, name) for name in slots(type(value)) if hasattr(value, name)}


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
