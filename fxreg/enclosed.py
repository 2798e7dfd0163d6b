"""What a function carries with it."""

from collections.abc import Callable
from typing import Any


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
