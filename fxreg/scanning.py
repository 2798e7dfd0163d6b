"""What a forward's bytecode says it might ask or do that no proxy can notice.

Tracing sees every operation on a value, but not `x is y`, `type(x)`, a `try` around an operation, a context manager,
or a write to a global. A module whose forward, or a function of the same program that it names, contains such a thing
is not traced. That is more than needed and never less: reachable is taken for reached.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_OPCODES = {
    "BEFORE_WITH": "enters a context manager",
    "BEFORE_ASYNC_WITH": "enters a context manager",
    "STORE_GLOBAL": "writes a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "IS_OP": "compares identities",
}
_ASKS = {
    "type": "asks for a type",
    "id": "asks for an identity",
    "vars": "looks into an object's dictionary",
    "__dict__": "looks into an object's dictionary",
    "__class__": "asks for a class",
    "globals": "looks into the globals",
    "locals": "looks into the locals",
    "callable": "asks whether something can be called",
    "is_grad_enabled": "reads the grad mode",
    "is_inference_mode_enabled": "reads the inference mode",
    "is_autocast_enabled": "reads autocast",
    "is_any_autocast_enabled": "reads autocast",
    "get_default_dtype": "reads the default dtype",
    "are_deterministic_algorithms_enabled": "reads a global mode",
    "manual_seed": "seeds a random generator",
    "fork_rng": "forks a random generator",
    "Thread": "starts a thread",
    "ThreadPoolExecutor": "starts a thread",
}
_MUTABLE = (list, dict, set)
_LIBRARIES = ("torch", "numpy", "builtins", "math", "functools", "itertools", "operator", "collections", "typing")


_CHANGING = {"append", "add", "update", "setdefault", "pop", "extend", "clear", "insert", "remove", "__setitem__"}


def untraceable_reason(module: nn.Module) -> str | None:
    """Why a module's forward must not be traced, if its code says so."""
    forward = getattr(type(module), "forward", None)
    return None if forward is None else _reason(type(module), forward)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _reason(owner: Any, forward: Any) -> str | None:
    reasons = (_function_reason(function) for function in _reachable(owner, forward))
    return next(filter(None, reasons), None)


def _reachable(owner: type, forward: Any) -> Iterator[types.FunctionType]:
    """The functions that a method names, and those that these name, outside well-known libraries."""
    waiting, seen = [forward], set()
    while waiting:
        function = _as_function(waiting.pop())
        if function is None or function in seen or _is_library(function):
            continue
        seen.add(function)
        yield function
        waiting += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        waiting.append(getattr(function, "__wrapped__", None))
        for name in _names(function.__code__):
            waiting.append(function.__globals__.get(name))
            waiting.append(inspect.getattr_static(owner, name, None))


def _as_function(value: Any) -> types.FunctionType | None:
    if isinstance(value, staticmethod | classmethod | types.MethodType):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, functools.cached_property | functools.partial):
        value = value.func
    return value if isinstance(value, types.FunctionType) else None


def _is_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> set[str]:
    return {name for one in _codes(code) for name in one.co_names}


def _function_reason(function: types.FunctionType) -> str | None:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    what = next((f"has a default that can change ({d!r})" for d in defaults if isinstance(d, _MUTABLE)), None)
    if what is None and _may_change_a_global(function):
        what = "changes a global container"
    what = what or next((reason for code in _codes(function.__code__) if (reason := _code_reason(code))), None)
    return None if what is None else f"{function.__qualname__} {what}"


def _may_change_a_global(function: types.FunctionType) -> bool:
    names = _names(function.__code__)
    containers = any(isinstance(function.__globals__.get(name), _MUTABLE) for name in names)
    return containers and (
        not names.isdisjoint(_CHANGING)
        or any(i.opname == "STORE_SUBSCR" for code in _codes(function.__code__) for i in dis.get_instructions(code))
    )


def _code_reason(code: types.CodeType) -> str | None:
    if code.co_exceptiontable and "BEFORE_WITH" not in {i.opname for i in dis.get_instructions(code)}:
        return "catches exceptions"
    before = None
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_NAME") and instruction.argval in _ASKS:
            return _ASKS[instruction.argval]
        against_none = name == "IS_OP" and before is not None and before.argval is None
        if name in _OPCODES and not against_none and not _on_self(name, before):
            return _OPCODES[name]
        before = instruction
    return None


def _on_self(name: str, before: dis.Instruction | None) -> bool:
    """`self.x = …`: the tracer notices by itself, and only if it happens."""
    return name in ("STORE_ATTR", "DELETE_ATTR") and before is not None and before.argval == "self"
