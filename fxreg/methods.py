"""Which functions run with a module as their first argument, and with nothing else: what they write to that is no
attribute of any other object."""

import dis
import functools
import types
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from .enclosed import defaults, enclosed, entries
from .naming import codes_in, names_in, names_in_code, names_mentioned
from .packages import is_library
from .scanning import once_per_function
from .stacks import instructions_of

_LOADS = ("LOAD_FAST", "LOAD_DEREF")
_OF_CLASSES = ("__new__", "__init_subclass__", "__class_getitem__")
_PARTS = {"__func__", "__wrapped__"}
_SPREADS = ("BUILD_TUPLE", "BUILD_LIST", "LIST_EXTEND", "LIST_APPEND", "LIST_TO_TUPLE")


def first_argument(function: types.FunctionType) -> str | None:
    """The name of a function's first argument, if it is never anything else."""
    code = function.__code__
    own = code.co_varnames[0] if code.co_argcount else None
    rebinds = any(
        one.argval == own and one.opname.startswith(("STORE_", "DELETE_")) and not one.opname.endswith("ATTR")
        for inner in codes_in(code)
        for one in instructions_of(inner)
    )
    return None if rebinds else own


def is_load(instruction: dis.Instruction, name: str | None) -> bool:
    """Whether an instruction loads a local variable."""
    return instruction.opname in _LOADS and instruction.argval == name


@functools.lru_cache(maxsize=4096)
def methods_of(kind: type) -> frozenset[types.FunctionType]:
    """The functions that get an instance of a class of modules: those in its body, and those to which these hand it."""
    found = set[types.FunctionType]()
    for base in kind.__mro__:
        if not issubclass(base, nn.Module) or is_library(base.__module__):
            continue
        waiting = [one for name, value in vars(base).items() if name not in _OF_CLASSES for one in _getters(value)]
        waiting = [one for one in waiting if one.__qualname__ == f"{base.__qualname__}.{one.__name__}"]
        while waiting:
            function = waiting.pop()
            if function not in found:
                found.add(function)
                waiting += _handed(function)
    return frozenset(found)


def only_methods(
    methods: Collection[types.FunctionType], functions: Collection[types.FunctionType]
) -> frozenset[types.FunctionType]:
    """Those of some methods of which others get hold in no way but `self.method` and `super().method`: as a class's
    attribute, by a string, or as a value that something keeps, they could be called with anything."""
    names, kept = set[str](), list[Any]()
    for function in functions:
        of_first, of_others = _attributes(function)
        names |= of_others if function in methods else of_first | of_others
        values = [function.__globals__.get(name) for name in names_in_code(function.__code__).read]
        handed = _handed(function) if function in methods else ()
        kept += [one for one in (*enclosed(function), *defaults(function)) if one not in handed]
        kept += [each for one in values for each in (one, *_entries(one))]
    if not _PARTS.isdisjoint(names):
        return frozenset()
    return frozenset(one for one in methods if one.__name__ not in names and not any(one is each for each in kept))


def _entries(value: Any) -> tuple[Any, ...]:
    if isinstance(value, dict):
        return tuple(entries(value).values())
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else ()


@once_per_function
def _attributes(function: types.FunctionType) -> tuple[frozenset[str], frozenset[str]]:
    """The attributes that a function reads of its first argument or of `super()`; those of others, and strings."""
    own, of_first, of_others = first_argument(function), set[str](), set[str]()
    for code in codes_in(function.__code__):
        instructions = instructions_of(code)
        of_others |= names_mentioned(code) - names_in(code)
        for at, one in enumerate(instructions):
            if one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                is_first = code is function.__code__ and is_load(instructions[at - 1], own) and not one.is_jump_target
                is_super = instructions[at - 1].opname == "CALL" and instructions[at - 3].argval == "super"
                (of_first if is_first or is_super else of_others).add(one.argval)
    return frozenset(of_first), frozenset(of_others)


def _getters(value: Any) -> Iterator[types.FunctionType]:
    parts = (value.fget, value.fset, value.fdel) if type(value) is property else (value,)
    parts = (value.func,) if type(value) is functools.cached_property else parts
    yield from (one for one in parts if type(one) is types.FunctionType)


@once_per_function
def _handed(function: types.FunctionType) -> tuple[types.FunctionType, ...]:
    """The functions that a decorator has put into a function, and that it calls with its own first argument."""
    if is_library(function.__globals__.get("__name__")):  # torch.no_grad, which hands on everything
        wrapped = getattr(function, "__wrapped__", None)
        return (wrapped,) if type(wrapped) is types.FunctionType else ()
    own, code = first_argument(function), function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    kept = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    functions = {name: value for name, value in kept.items() if type(value) is types.FunctionType}
    return tuple(value for name, value in functions.items() if own and _is_only_handed(code, name, own))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _is_only_handed(code: types.CodeType, name: str, own: str) -> bool:
    """Whether a variable of an enclosing function is used for nothing but calls with a function's first argument."""
    if any(name in inner.co_freevars for inner in codes_in(code) if inner is not code):
        return False
    instructions = instructions_of(code)
    uses = [at for at, one in enumerate(instructions) if one.argval == name and one.opcode in dis.hasfree]
    return all(
        instructions[at].opname == "LOAD_DEREF"
        and instructions[at - 1].opname == "PUSH_NULL"  # it is what is called
        and _is_first(instructions[at + 1 :], own)
        for at in uses
    )


def _is_first(following: Sequence[dis.Instruction], name: str) -> bool:
    """Whether a variable as it is is the first argument of a call, of which these are the arguments and the rest."""
    if not is_load(following[0], name):
        return False
    depth, is_spread = 1, False
    for one in following[1:]:
        if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs:
            return False
        depth += dis.stack_effect(one.opcode, one.arg if one.opcode >= dis.HAVE_ARGUMENT else None, jump=False)
        if depth > 1:
            continue
        if one.opname not in _SPREADS:
            return one.opname == "CALL_FUNCTION_EX" if is_spread else one.opname in ("PRECALL", "CALL")
        is_spread = True
    return False
