"""What functions read from outside: global variables, and attributes of the classes, modules and objects they name.

A graph holds the values as they were when it was captured. What is compared later is what code mentions by name; the
functions of an installed package, and what it keeps in containers and objects of its own, are taken for constant.
"""

import functools
import inspect
import logging
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .freezing import frozen
from .naming import names_in_code
from .packages import is_foreign, is_installed, is_library
from .structure import PLAIN

_MISSING = object()
_NEVER = (Tensor, nn.Module, logging.Logger, types.BuiltinFunctionType, types.GenericAlias)


@dataclass(frozen=True)
class Outside:
    """A global variable, or an attribute of one.

    Attributes:
        module: the name of the module that has the variable.
        path: the variable's name, and an attribute's.
        value: what was there, frozen.
    """

    module: str
    path: tuple[str, ...]
    value: Any

    @property
    def name(self) -> str:
        return ".".join((self.module, *self.path))

    def now(self) -> Any:
        """What is there now."""
        found: Any = sys.modules[self.module]
        for part in self.path:
            found = getattr(found, part, None)
        return found


def read_outside(codes: Iterable[tuple[types.CodeType, dict[str, Any]]]) -> tuple[Outside, ...]:
    """What code may read, with its global variables; each once."""
    found = {(one.module, one.path): one for code, space in codes for one in _read_by(code, space)}
    return tuple(found.values())


def _read_by(code: types.CodeType, space: dict[str, Any]) -> Iterator[Outside]:
    module = space.get("__name__", "")
    if space is not vars(sys.modules.get(module, types)):
        return  # made by `exec`, or gone
    names = names_in_code(code)
    for name in names.read:
        value = space.get(name, _MISSING)
        if type(value) in PLAIN:
            yield Outside(module, (name,), value)
            continue
        if isinstance(value, types.FunctionType) and _is_users_own(value):
            yield _code_of(module, value, name)
        if value is _MISSING or isinstance(value, _NEVER) or _is_of_library(value):
            continue
        if hasattr(value, "__dict__"):
            for attribute in names.attributes:
                kept = inspect.getattr_static(value, attribute, _MISSING)
                if type(kept) in PLAIN:
                    yield Outside(module, (name, attribute), kept)
                elif (
                    isinstance(value, types.ModuleType) and isinstance(kept, types.FunctionType) and _is_users_own(kept)
                ):
                    yield _code_of(module, kept, name, attribute)
        if not isinstance(value, type | types.ModuleType) and not is_installed(module):
            yield Outside(module, (name,), frozen(value))


def _is_users_own(function: types.FunctionType) -> bool:
    return not is_foreign(function.__module__) and not is_installed(function.__module__)


def _code_of(module: str, function: types.FunctionType, *path: str) -> Outside:
    return Outside(module, (*path, "__code__"), frozen(function.__code__))


def _is_of_library(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        return is_foreign(value.__name__)
    kind = value if isinstance(value, type) else type(value)
    return is_library(kind.__module__) and not isinstance(value, Collection | functools.partial)
