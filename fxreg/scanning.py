"""What a forward's bytecode says it might ask or do that no proxy can notice.

Tracing sees every operation on a value, but not `x is y`, `type(x)`, a `try` around an operation, a context manager,
or a write to a global. A module whose forward, or a function of the same program that it names, contains such a thing
is not traced. That is more than needed and never less: reachable is taken for reached.
"""

import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from .ambient import ambient, kept_answer
from .enclosed import defaults, enclosed, holds_iterator, slots
from .hearing import untold
from .naming import PUTS, codes_in, names_in, names_in_code, names_mentioned
from .outside import places
from .packages import is_foreign, is_library, is_own

PAST = "reads what an object keeps, past its attributes"
LOOKS_PAST = dict.fromkeys(("getattr_static", "__getstate__", "__reduce_ex__"), PAST)
_OPCODES = {
    "BEFORE_WITH": "enters",
    "BEFORE_ASYNC_WITH": "enters",
    "STORE_GLOBAL": "writes the global variable",
    "DELETE_GLOBAL": "deletes the global variable",
    "STORE_ATTR": "writes the attribute",
    "DELETE_ATTR": "deletes the attribute",
    "IS_OP": "compares identities",
}
_ASKS = {
    "import_module": "imports a module by its name",
    "__import__": "imports a module by its name",
    "print": "prints",
    "type": "asks for a type",
    "id": "asks for an identity",
    "vars": "looks into an object's dictionary",
    "__dict__": "looks into an object's dictionary",
    "__class__": "asks for a class",
    "Proxy": "asks whether it is traced",
    "globals": "looks into the globals",
    "locals": "looks into the locals",
    "callable": "asks whether something can be called",
    "is_grad_enabled": "reads the grad mode",
    "is_inference_mode_enabled": "reads the inference mode",
    "is_autocast_enabled": "reads autocast",
    "is_compiling": "asks whether it is compiled",
    "is_dynamo_compiling": "asks whether it is compiled",
    "is_exporting": "asks whether it is exported",
    "is_tracing": "asks whether it is traced",
    "is_any_autocast_enabled": "reads autocast",
    "has_torch_function": "asks whether it is traced",
    "has_torch_function_unary": "asks whether it is traced",
    "has_torch_function_variadic": "asks whether it is traced",
    "_getframe": "looks at who calls it",
    "currentframe": "looks at who calls it",
    "getsizeof": "asks how large an object is",
    "dir": "asks for the names of attributes",
    **LOOKS_PAST,
    "get_num_threads": "reads a global mode",
    "get_float32_matmul_precision": "reads a global mode",
    "get_default_dtype": "reads the default dtype",
    "are_deterministic_algorithms_enabled": "reads a global mode",
    "setattr": "sets an attribute by name",
    "delattr": "deletes an attribute by name",
    "manual_seed": "seeds a random generator",
    "fork_rng": "forks a random generator",
    "Thread": "starts a thread",
    "ThreadPoolExecutor": "starts a thread",
}
_MUTABLE = (list, dict, set)
_CHANGING = PUTS | {"__setitem__", "setattr", "put"}


_Result = TypeVar("_Result")


def once_per_function(scan: Callable[[types.FunctionType], _Result]) -> Callable[[types.FunctionType], _Result]:
    """Remember what a scan found, for as long as the function lives."""
    found: WeakKeyDictionary[types.FunctionType, _Result] = WeakKeyDictionary()

    @functools.wraps(scan)
    def scan_once(function: types.FunctionType) -> _Result:
        if function not in found:
            found[function] = scan(function)
        return found[function]

    return scan_once


def untraceable_reason(module: nn.Module) -> str | None:
    """Why a module's forward must not be traced, if its code says so."""
    functions = functions_of(module)
    if reason := next(filter(None, map(_function_reason, functions)), None):
        return reason
    names = _mentioned(functions)
    kept = (
        value for space in (vars(module), *_own_spaces(type(module))) for name, value in space.items() if name in names
    )
    return kept_answer(kept, type(module).__module__)


def _own_spaces(kind: type) -> Iterator[Mapping[str, Any]]:
    """What the user's classes among those of a kind define."""
    return (vars(base) for base in kind.__mro__ if not _is_library(base))


def asks_for_none(module: nn.Module) -> bool:
    """Whether a module's code asks somewhere whether something is None."""
    return any(map(_asks_for_none, functions_of(module)))


def mentioned_names(module: nn.Module) -> frozenset[str]:
    """Every name, and every string that could be one, in a module's code."""
    return _mentioned(functions_of(module))


def _mentioned(functions: Iterable[types.FunctionType]) -> frozenset[str]:
    return frozenset().union(*(names_mentioned(function.__code__) for function in functions))


def global_names(modules: Iterable[nn.Module]) -> set[str]:
    """The global variables that the modules' code writes."""
    codes = (code for module in modules for f in functions_of(module) for code in codes_in(f.__code__))
    instructions = (one for code in codes for one in dis.get_instructions(code))
    return {str(one.argval) for one in instructions if one.opname in ("STORE_GLOBAL", "DELETE_GLOBAL")}


def changes_containers(functions: Iterable[types.FunctionType]) -> bool:
    """Whether these functions may change what a container holds."""
    return any(map(_may_change_containers, functions))


def global_objects(model: nn.Module) -> tuple[Any, ...]:
    """What the model's code can reach and change through global variables and its classes: containers, and objects of
    its own."""
    functions = {function for module in model.modules() for function in functions_of(module)}
    return tuple({**containers_of({*map(type, model.modules())}), **objects_named(functions)}.values())


def containers_of(kinds: Iterable[type]) -> dict[int, Any]:
    """The containers that are attributes of some classes, by identity."""
    spaces = (vars(base) for base in {base for kind in kinds for base in kind.__mro__} if not _is_library(base))
    return {id(value): value for space in spaces for value in space.values() if isinstance(value, _MUTABLE)}


def objects_named(functions: Iterable[types.FunctionType]) -> dict[int, Any]:
    """The containers and the user's own objects to which the names in some functions lead, or that they close over; by
    identity."""
    found: dict[int, Any] = {}
    waiting, met = [*functions], set[int]()
    while waiting:
        function = waiting.pop()
        met.add(id(function))
        named = [place.value for place in places(function.__code__, function.__globals__)]
        for value in (*named, *enclosed(function)):
            if isinstance(value, types.FunctionType) and id(value) not in met and not is_foreign(value.__module__):
                waiting.append(value)
            elif isinstance(value, _MUTABLE) or (_has_attributes(value) and not _is_library(type(value))):
                found[id(value)] = value
    inert = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module)
    return {identity: value for identity, value in found.items() if not isinstance(value, inert)}


def _has_attributes(value: object) -> bool:
    return bool(type(value).__dictoffset__ or slots(type(value)))


def functions_of(module: nn.Module) -> tuple[types.FunctionType, ...]:
    """The user's functions that a forward pass of a module may reach."""
    helpers = [v for v in vars(module).values() if callable(v) and not isinstance(v, (type, nn.Module))]
    if not helpers:
        return _reachable((type(module),), untold(getattr(type(module), "forward", None)))
    kinds = dict.fromkeys(type(v) for v in helpers if not _is_library(type(v)))
    kept = dict.fromkeys(function for v in helpers if (function := _as_function(v)) is not None)
    forward = untold(getattr(type(module), "forward", None))
    if kept:  # an instance's own functions may hold its tensors: no cache must
        return _reached((type(module), *kinds), (forward, *kept))
    return _reachable((type(module), *kinds), forward)


def functions_behind(function: Any) -> tuple[types.FunctionType, ...]:
    """The user's functions that a call of a function, bound method or callable object may reach."""
    owner = getattr(function, "__self__", function)
    start = function if _as_function(function) else inspect.getattr_static(type(function), "__call__", None)
    return _reached((type(owner),), (start,))


@functools.lru_cache(maxsize=4096)
def _reachable(owners: tuple[type, ...], forward: Any) -> tuple[types.FunctionType, ...]:
    return _reached(owners, (forward,))


def _reached(owners: tuple[type, ...], start: tuple[Any, ...]) -> tuple[types.FunctionType, ...]:
    """Some functions, and those that these name, outside well-known libraries."""
    waiting = [*start, *(inspect.getattr_static(owner, "__call__", None) for owner in owners[1:])]
    found: dict[types.FunctionType, None] = {}
    while waiting:
        function = _as_function(waiting.pop())
        if function is None or function in found or _is_library(function):
            continue
        found[function] = None
        waiting += enclosed(function)
        waiting.append(getattr(function, "__wrapped__", None))
        waiting += map(function.__globals__.get, names_in_code(function.__code__).read)
        for name in names_in(function.__code__):
            waiting += [inspect.getattr_static(owner, name, None) for owner in owners]
    return tuple(found)


def _as_function(value: Any) -> types.FunctionType | None:
    if type(value) in (staticmethod, classmethod, types.MethodType):
        value = value.__func__
    if type(value) is property:
        value = value.fget
    if type(value) in (functools.cached_property, functools.partial):
        value = value.func
    value = untold(value)
    return value if type(value) is types.FunctionType else None


def _is_library(definition: Any) -> bool:
    return is_library(definition.__module__)


def iterator_named(code: types.CodeType, space: Mapping[str, Any]) -> str | None:
    """The global name by which code may reach an iterator, or that of a module of the user's and of what is in it."""
    names = names_in(code)
    for name in names:
        value = space.get(name, sys.modules.get(name))
        if not isinstance(value, types.ModuleType):
            if holds_iterator(value):
                return name
        elif not is_foreign(value.__name__):
            kept = next((one for one in names if holds_iterator(vars(value).get(one))), None)
            if kept is not None:
                return f"{name}.{kept}"
    return None


@once_per_function
def _may_change_containers(function: types.FunctionType) -> bool:
    return any(map(_changes_containers, codes_in(function.__code__)))


def _changes_containers(code: types.CodeType) -> bool:
    stores = any(i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for i in dis.get_instructions(code))
    return stores or not _CHANGING.isdisjoint(code.co_names)


@once_per_function
def _asks_for_none(function: types.FunctionType) -> bool:
    return any(map(code_asks_for_none, codes_in(function.__code__)))


@functools.lru_cache(maxsize=4096)
def code_asks_for_none(code: types.CodeType) -> bool:
    """Whether code asks somewhere whether something is None."""
    before = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname  # `if x is None` is a jump of its own
        if name.endswith("_NONE") or (name == "IS_OP" and before is not None and _is_none(before)):
            return True
        before = instruction
    return False


def _is_none(instruction: dis.Instruction) -> bool:
    return instruction.opname == "LOAD_CONST" and instruction.argval is None


@once_per_function
def _function_reason(function: types.FunctionType) -> str | None:
    what = next((f"has a default that can change ({d!r})" for d in defaults(function) if isinstance(d, _MUTABLE)), None)
    if what is None and _may_change_containers(function):
        what = _changed_elsewhere(function.__code__, function.__globals__, enclosed(function))
    if what is None:
        what = kept_answer((*enclosed(function), *defaults(function)), function.__module__)
    if what is None:
        codes, space = codes_in(function.__code__), function.__globals__
        what = next((reason for code in codes if (reason := _code_reason(code, space))), None)
    return None if what is None else f"{function.__qualname__} {what}"


def code_reason(code: types.CodeType, space: dict[str, Any]) -> str | None:
    """Why code that runs with these global variables must not be traced, if it says so."""
    what = _changed_elsewhere(code, space) if _changes_containers(code) else None
    what = what or _code_reason(code, space)
    return None if what is None else f"{code.co_qualname} {what}"


def _changed_elsewhere(code: types.CodeType, space: dict[str, Any], kept: Iterable[Any] | None = None) -> str | None:
    """What code that changes some container may change outside of the call: global ones, or what it closes over.

    Args:
        kept: what it closes over, if that is known.
    """
    filled = names_in_code(code).filled
    for _, path, value in places(code, space):
        is_filled = len(path) == 1 and path[0] in filled and is_own(type(value).__module__) and _has_attributes(value)
        if is_filled or isinstance(value, _MUTABLE):
            return "changes a global container"
    free = filled.intersection(code.co_freevars) if kept is None else any(isinstance(one, _MUTABLE) for one in kept)
    return "changes a container of an enclosing function" if free else None


def _code_reason(code: types.CodeType, space: dict[str, Any]) -> str | None:
    if asks := ambient(code, space):
        return asks
    if name := iterator_named(code, space):
        return f"reads the iterator {name}"
    instructions = [*dis.get_instructions(code)]
    if code.co_exceptiontable and "BEFORE_WITH" not in {i.opname for i in instructions}:
        return "catches exceptions"
    for position, instruction in enumerate(instructions):
        name, argument = instruction.opname, instruction.argval
        if name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME") and argument in _ASKS:
            return _ASKS[argument]
        if looks_past(instructions, position):
            return PAST
        if name == "LOAD_GLOBAL" and (asks := _asks_under_another_name(space.get(argument))):
            return asks
        if name == "LOAD_DEREF" and argument == "__class__" and instructions[position + 1].opname == "LOAD_ATTR":
            return _ASKS["__class__"]
        if name == "STORE_DEREF" and argument in code.co_freevars:
            return f"writes the variable {argument!r} of an enclosing function"
        if name not in _OPCODES or (name == "IS_OP" and _is_none(instructions[position - 1])):
            continue
        match name:
            case "IS_OP":
                return _OPCODES[name]
            case "BEFORE_WITH" | "BEFORE_ASYNC_WITH":
                return f"{_OPCODES[name]} {context_name(instructions[:position])}"
            case "STORE_ATTR" | "DELETE_ATTR" if _is_on_self(instructions[:position], argument):
                continue  # the tracer notices by itself, and only if it happens
        return f"{_OPCODES[name]} {argument!r}"
    return None


def looks_past(instructions: Sequence[dis.Instruction], position: int) -> bool:
    """Whether code reads an attribute by `object.__getattribute__`, which no class hears of."""
    owner, name = (instructions[place].argval for place in (position - 1, position))
    return (owner, name) == ("object", "__getattribute__")


def _asks_under_another_name(value: Any) -> str | None:
    """What a function of torch's asks that was imported under a name of the user's choice."""
    library = isinstance(value, types.BuiltinFunctionType | types.FunctionType) and _is_library(value)
    return _ASKS.get(value.__name__) if library else None


def context_name(before: list[dis.Instruction]) -> str:
    """The dotted name in front of a `with` statement's call, which begins where the call does."""
    start = before[-1].positions
    chain = [
        str(i.argval)
        for i in before
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FAST", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD")
        and start is not None
        and i.positions is not None
        and (i.positions.lineno, i.positions.col_offset) == (start.lineno, start.col_offset)
    ]
    return ".".join(chain) or "a context manager"


def _is_on_self(before: list[dis.Instruction], name: str) -> bool:
    """Whether an attribute is that of `self`: `self.x = …`, or `self.x += …`."""
    if before[-1].argval == "self":
        return True
    if before[-1].opname != "SWAP":
        return False
    updated = [i for i, one in enumerate(before) if one.opname == "LOAD_ATTR" and one.argval == name]
    return bool(updated) and before[updated[-1] - 1].opname == "COPY" and before[updated[-1] - 2].argval == "self"
