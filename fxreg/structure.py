"""Walking nested outputs: tuples, lists, mappings, dataclasses, and whatever is registered with torch's pytree."""

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # private by name only: what torch.export and torch.func document

from .errors import CaptureError

_INERT = (
    bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, torch.Generator, slice, range, type(...), type(None), torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with every tensor mapped, in depth-first order; containers are rebuilt, never written to."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _INERT):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(function, value)
    if not pytree.tree_is_leaf(value):
        children, spec = pytree.tree_flatten(value, is_leaf=lambda child: child is not value)
        return pytree.tree_unflatten([map_tensors(function, child) for child in children], spec)
    if _holds_no_tensor(value):
        return value
    raise CaptureError(
        f"the model's output holds a {type(value).__module__}.{type(value).__qualname__} with tensors inside, and "
        "fxreg cannot tell how to rebuild it. Register it with torch.utils._pytree.register_pytree_node, or use "
        "emit='output' or emit='loss'."
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in the structure, depth first."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return iter(found)


def replace_field(value: Any, field: str, new: Any) -> Any:
    """A copy of a mapping, named tuple or dataclass with one field replaced."""
    if hasattr(value, "_replace"):
        return value._replace(**{field: new})
    if type(value) is dict:
        return {**value, field: new}
    result = copy.copy(value)
    if isinstance(result, dict):
        result[field] = new
    else:
        object.__setattr__(result, field, new)
    return result


def _map_dataclass(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    result = copy.copy(value)
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            old = getattr(value, field.name)
            new = map_tensors(function, old)
            if new is not old:
                if isinstance(value, dict):  # a transformers ModelOutput: a mapping and a dataclass in one
                    if field.name in value:
                        result[field.name] = new
                else:
                    object.__setattr__(result, field.name, new)
    return result


def _holds_no_tensor(value: Any, depth: int = 4) -> bool:
    """Whether no tensor is found among an unknown object's attributes and items, a few levels down."""
    if isinstance(value, Tensor):
        return False
    if isinstance(value, (*_INERT, type, torch.nn.Module, types.FunctionType, types.BuiltinFunctionType)):
        return True
    if depth == 0:
        return False
    inside = list(getattr(value, "__dict__", {}).values())
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside += [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside += value
    return all(_holds_no_tensor(one, depth - 1) for one in inside)
