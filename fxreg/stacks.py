"""What a frame that is being watched has loaded, for the instruction that comes next: told without running anything."""

import builtins
import dis
import functools
import inspect
import types
from collections.abc import Sequence
from typing import Any

from torch import nn

UNKNOWN = object()
"""Nobody knows what was loaded."""


@functools.lru_cache(maxsize=4096)
def instructions_of(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    """The instructions of some code."""
    return tuple(dis.get_instructions(code))


class Stack:
    """What a frame has loaded, as far as that are variables, and attributes and items that nothing computes."""

    def __init__(self, frame: types.FrameType) -> None:
        self.frame = frame
        self.instructions = instructions_of(frame.f_code)
        self.position = next(i for i, one in enumerate(self.instructions) if one.offset == frame.f_lasti)

    def top(self) -> Any:
        """What was loaded last."""
        return self._loaded(self.position - 1)[0]

    def loaded(self, position: int | None) -> Any:
        """What the instructions up to a position load, if nothing in between runs."""
        return UNKNOWN if position is None else self._loaded(position)[0]

    def first(self) -> Any:
        """The first argument of the function that is loaded here, where it is a variable or an attribute of one."""
        end = self.position + 2
        while self.instructions[end].opname == "LOAD_ATTR":
            end += 1
        return self._loaded(end - 1)[0]

    def read(self) -> tuple[Any, ...]:
        """Whose attribute is read by `value.name`; nothing if nobody knows."""
        is_read = self.instructions[self.position].opname in ("LOAD_ATTR", "LOAD_METHOD")
        return self._known(self.top()) if is_read else ()

    def asked(self, position: int | None) -> tuple[Any, ...]:
        """Whose attribute is asked for by name, if the instructions up to a position load it; nothing if nobody
        knows."""
        code, function = self.frame.f_code, self.instructions[self.position].argval
        if code.co_name == function == "__getattribute__" and code.co_argcount:
            return (self.frame.f_locals[code.co_varnames[0]],)  # which was asked for just that
        return () if function in self.frame.f_globals else self._known(self.loaded(position))

    def is_module(self) -> bool:
        """Whether a module of Python's is loaded here, and no function."""
        is_variable = self.instructions[self.position].opname in ("LOAD_GLOBAL", "LOAD_NAME")
        return is_variable and isinstance(self.loaded(self.position), types.ModuleType)

    def taken(self) -> tuple[Any, ...]:
        """What the function that is loaded here is called with; nothing if nobody knows, or if it is one of several."""
        is_name = self.instructions[self.position].opcode in dis.hasname
        return self._known(self.only_argument()) if is_name else ()

    @staticmethod
    def _known(value: Any) -> tuple[Any, ...]:
        return () if value is UNKNOWN else (value,)

    def is_key(self) -> bool:
        """Whether a constant is looked up in the keyword arguments that the function was called with."""
        code, get = self.frame.f_code, self.instructions[max(self.position - 2, 0) : self.position]
        if not code.co_flags & inspect.CO_VARKEYWORDS or [one.argval for one in get[1:]] != ["get"]:
            return False
        variadic = bool(code.co_flags & inspect.CO_VARARGS)
        own = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + variadic]
        uses = [one for one in self.instructions if one.argval == own and one.opcode in dis.haslocal]
        return get[0] in uses and all(one.opname == "LOAD_FAST" for one in uses)

    def typed(self) -> Any:
        """Whose type is asked for, by `value.__class__` or `type(value)`."""
        if self.instructions[self.position].argval == "__class__":
            return self.top()
        if self.instructions[self.position + 1].opname == "PRECALL" and self._is_asked_about(self.position):
            return None
        return self.only_argument()

    def only_argument(self) -> Any:
        """What the function that is loaded here is called with, if that is all."""
        first = end = self.position + 1
        while self.instructions[end].opname in _LOADS:
            end += 1
        value, start = self._loaded(end - 1)
        is_argument = start == first and self.instructions[end].opname in ("PRECALL", "CALL")
        return value if is_argument and self.instructions[end].arg == 1 else UNKNOWN

    def _is_asked_about(self, position: int) -> bool:
        """Whether what is loaded at a position is the second argument of `isinstance`."""
        start = self._loaded(position - 1)[1]
        return self.instructions[start - 1].argval in ("isinstance", "issubclass")

    def written(self) -> Any:
        """Whose attribute is written, by `value.name = 1`, `value.name += 1` or `del value.name`."""
        name, last = self.instructions[self.position].argval, self.position - 1
        if self.instructions[last].opname == "SWAP":  # the owner, a copy of it, its attribute, and what is added
            read = next(
                (i for i in range(last, 1, -1) if is_read_of_copy(self.instructions[i - 1 : i + 1], name)), None
            )
            return self._loaded(read - 2)[0] if read is not None else UNKNOWN
        return self._loaded(last)[0]

    def _loaded(self, position: int) -> tuple[Any, int]:
        """What the instructions up to a position have loaded, and where they start."""
        instruction = self.instructions[position]
        if self.instructions[position + 1].is_jump_target:  # of `a if c else b`, who knows which
            return UNKNOWN, position
        match instruction.opname:
            case "LOAD_CONST":
                return instruction.argval, position
            case "LOAD_FAST" | "LOAD_DEREF":
                return self.frame.f_locals.get(instruction.argval, UNKNOWN), position
            case "LOAD_GLOBAL" | "LOAD_NAME":
                spaces = (self.frame.f_locals, self.frame.f_globals, vars(builtins))
                found = (space[instruction.argval] for space in spaces if instruction.argval in space)
                return next(found, UNKNOWN), position
            case "LOAD_ATTR":
                owner, start = self._loaded(position - 1)
                return _plain_attribute(owner, instruction.argval), start
            case "BINARY_SUBSCR":
                index, start = self._loaded(position - 1)
                values, start = self._loaded(start - 1)
                return _plain_item(values, index), start
            case "FORMAT_VALUE" if instruction.arg == 0:
                value, start = self._loaded(position - 1)
                return value if type(value) is str else UNKNOWN, start
            case "BUILD_STRING":
                parts, start = list[Any](), position
                for _ in range(instruction.arg or 0):
                    part, start = self._loaded(start - 1)
                    parts.insert(0, part)
                return "".join(parts) if all(type(one) is str for one in parts) else UNKNOWN, start
        return UNKNOWN, position


_LOADS = {"LOAD_CONST", "LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "BINARY_SUBSCR"}


def _plain_attribute(owner: Any, name: str) -> Any:
    """An attribute that is there, without running anybody's code for it."""
    if isinstance(owner, nn.Module):
        for kept in (owner._modules, owner._parameters, owner._buffers):
            if name in kept:
                return kept[name]
    value = inspect.getattr_static(owner, name, UNKNOWN)
    if isinstance(value, types.MemberDescriptorType):  # a slot
        return getattr(owner, name, UNKNOWN)
    if isinstance(value, types.GetSetDescriptorType) and name == "__dict__":
        return vars(owner)
    return UNKNOWN if hasattr(type(value), "__get__") and not isinstance(value, type) else value


def _plain_item(values: Any, index: Any) -> Any:
    if type(values) in (nn.ModuleList, nn.Sequential) and type(index) is int:
        values = [*values._modules.values()]
    try:
        return values[index] if type(values) in (list, tuple, dict) else UNKNOWN
    except (LookupError, TypeError):
        return UNKNOWN


def is_read_of_copy(pair: Sequence[dis.Instruction], name: str) -> bool:
    copied, read = pair
    return (copied.opname, read.opname, read.argval) == ("COPY", "LOAD_ATTR", name)
