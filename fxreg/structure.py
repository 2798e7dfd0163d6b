"""Walking nested outputs: tuples, lists, mappings, dataclasses, and whatever is registered with torch's pytree."""

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict
from torch.utils import _pytree as pytree  # private by name only: what torch.export and torch.func document

from .enclosed import defaults, enclosed
from .errors import CaptureError

_INERT = (
    bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, torch.Generator, slice, range, type(...), type(None), torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with every tensor mapped, depth first; whatever holds tensors is rebuilt, never written to.

    Raises:
        CaptureError: an object with tensors inside that cannot be rebuilt attribute by attribute.
    """
    return _mapped(function, value, {})


def _mapped(function: Callable[[Tensor], Tensor], value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _INERT):
        return value
    if not pytree.tree_is_leaf(value):
        children, spec = pytree.tree_flatten(value, is_leaf=lambda child: child is not value)
        return pytree.tree_unflatten([_mapped(function, child, done) for child in children], spec)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(function, value, done)
    if _holds_no_tensor(value):
        return value
    if _is_plain_object(value):
        result = done[id(value)] = copy.copy(value)
        vars(result).update({name: _mapped(function, old, done) for name, old in vars(value).items()})
        return result
    raise CaptureError(
        f"the model's output holds a {type(value).__module__}.{type(value).__qualname__} with tensors inside, and "
        "fxreg cannot tell how to rebuild it. Register it with torch.utils._pytree.register_pytree_node, or use "
        "emit='output' or emit='loss'."
    )


def _is_plain_object(value: Any) -> bool:
    """Whether an object is all in its attributes: a cache, a namespace, a distribution."""
    kind = type(value)
    slots = any(getattr(base, "__slots__", ()) for base in kind.__mro__)
    own_copy = any("__reduce_ex__" in vars(base) or "__copy__" in vars(base) for base in kind.__mro__[:-1])
    return isinstance(getattr(value, "__dict__", None), dict) and not slots and not own_copy and not _is_builtin(kind)


def _is_builtin(kind: type) -> bool:
    return issubclass(kind, list | tuple | dict | set | frozenset | types.FunctionType | BaseException)


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
    if type(value) in (dict, immutable_dict):  # fx interpreters pass a graph's literal dicts as immutable ones
        return {**value, field: new}
    result = copy.copy(value)
    if isinstance(result, dict):
        result[field] = new
    else:
        object.__setattr__(result, field, new)
    return result


def _map_dataclass(function: Callable[[Tensor], Tensor], value: Any, done: dict[int, Any]) -> Any:
    result = done[id(value)] = copy.copy(value)
    for field in dataclasses.fields(value):
        if hasattr(value, field.name):
            old = getattr(value, field.name)
            new = _mapped(function, old, done)
            if new is not old and isinstance(value, dict):  # a mapping and a dataclass in one
                if field.name in value:
                    result[field.name] = new
            elif new is not old:
                object.__setattr__(result, field.name, new)
    return result


def _holds_no_tensor(value: Any, depth: int = 4) -> bool:
    """Whether no tensor is found among an unknown object's attributes and items, a few levels down."""
    if isinstance(value, Tensor):
        return False
    if isinstance(value, (*_INERT, type, torch.nn.Module, types.BuiltinFunctionType)):
        return True
    if depth == 0 or isinstance(value, types.GeneratorType):
        return False
    if isinstance(value, types.FunctionType):
        return all(_holds_no_tensor(one, depth - 1) for one in (*enclosed(value), *defaults(value)))
    inside = list(getattr(value, "__dict__", {}).values())
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    inside += [getattr(value, name) for name in slots if isinstance(name, str) and hasattr(value, name)]
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside += value
    return all(_holds_no_tensor(one, depth - 1) for one in inside)
