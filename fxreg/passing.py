"""How arguments are passed, by position or by name: a graph passes them as its examples did, and most code cannot tell.

Wrappers around a root's forward can, and so can hooks and a `__call__` of its own.
"""

import dis
import inspect
import itertools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import CaptureError

_PASS_ON = {"LIST_EXTEND", "DICT_MERGE", "CALL_FUNCTION_EX", "BUILD_MAP"}
"""What follows where `*args` and `**kwargs` are loaded for nothing but a call."""


@dataclass(frozen=True)
class Passing:
    """How a graph passes arguments on to the forward.

    Attributes:
        by_position: how many at least, and at most unless `is_open`.
        by_name: their names; with `takes_more`, at least these.
        is_told: whether the forward's wrappers, or `__call__`, can tell.
    """

    by_position: int
    by_name: frozenset[str]
    is_open: bool
    takes_more: bool
    is_told: bool

    @property
    def takes_nothing(self) -> bool:
        return not (self.by_position or self.by_name or self.is_open or self.takes_more)

    def check(self, model: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raise if a call passes arguments in another way, and something could tell.

        Args:
            model: has hooks that will see them.

        Raises:
            CaptureError: it does.
        """
        if not self.is_told and (model is None or not (model._forward_pre_hooks or model._forward_hooks)):
            return
        fits = len(args) == self.by_position or (self.is_open and len(args) > self.by_position)
        names = set(kwargs)
        if fits and (self.by_name <= names if self.takes_more else self.by_name == names):
            return
        raise CaptureError(
            f"the model was captured with {self.by_position} arguments by position and {sorted(self.by_name)} by name, "
            f"and is called with {len(args)} and {sorted(names)}. It has a wrapper around its forward, a hook or a "
            "__call__ that could tell. Pass them as captured, or give transform example_inputs= passed like this call: "
            "a tuple for arguments by position, a dict for those by name."
        )


def can_tell(model: nn.Module) -> bool:
    """Whether code around a module's forward could act on how an argument was passed."""
    if type(model).__call__ is not nn.Module.__call__:
        return True
    forward: Any = inspect.unwrap(model.forward, stop=_looks) if hasattr(model.forward, "__wrapped__") else None
    return forward is not None and _looks(forward)


def _looks(function: Any) -> bool:
    """Whether a wrapper does more with its arguments than pass them on."""
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__wrapped__"):
        return False
    if not isinstance(function, types.FunctionType):
        return True
    code = function.__code__
    named = code.co_argcount + code.co_kwonlyargcount
    count = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    open_names = {*code.co_varnames[named : named + count]}
    instructions = [*dis.get_instructions(code)]
    return not open_names.isdisjoint(code.co_cellvars) or any(
        one.argval in open_names and not (one.opname == "LOAD_FAST" and after.opname in _PASS_ON)
        for one, after in itertools.pairwise(instructions)
        if isinstance(one.argval, str) and one.opname not in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST")
    )
