"""What functions, objects and dicts carry with them, past what their classes make of it."""

import collections
from collections.abc import Callable
from typing import Any

import torch


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


def entries(value: dict[Any, Any]) -> dict[Any, Any]:
    """What is in a dict, in its order, however its class would look it up."""
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
