"""Walking nested outputs: tuples, lists, mappings, dataclasses, and whatever is registered with torch's pytree."""

import copy
import dataclasses
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.immutable_collections import immutable_dict
from torch.utils import _pytree as pytree  # private by name only: what torch.export and torch.func document

from .enclosed import defaults, enclosed, entries, slotted
from .errors import CaptureError
from .kinds import qualified

_INERT = (
    bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, slice, range, type(...), type(None), torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip


PLAIN = (
    bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
"""What is nothing but its value."""


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure with every tensor mapped, depth first; whatever holds tensors is rebuilt, never written to.

    Raises:
        CaptureError: an object with tensors inside that cannot be rebuilt attribute by attribute.
    """
    return _Mapping(function).of(value)


@dataclasses.dataclass
class _Mapping:
    """One pass over a structure. What was rebuilt is remembered, so that what was one object stays one."""

    function: Callable[[Tensor], Tensor]
    done: dict[int, Any] = dataclasses.field(default_factory=dict)

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.function(value)
        if isinstance(value, _INERT):
            return value
        if not pytree.tree_is_leaf(value):
            at_top = [True]  # asked first; Dynamo does not compare dicts by identity
            children, spec = pytree.tree_flatten(value, is_leaf=lambda _: not (at_top and at_top.pop()))
            return pytree.tree_unflatten([self.of(child) for child in children], spec)
        if id(value) in self.done:
            return self.done[id(value)]
        if is_record(value):
            return self._record(value)
        if _holds_none_of((Tensor,), value):
            return value
        if not torch.compiler.is_compiling() and (base := _container_below(type(value))) is not None:
            return self._container(value, base)  # Dynamo makes none of these
        if _is_plain_object(value):
            result = self.done[id(value)] = copy.copy(value)
            vars(result).update({name: self.of(old) for name, old in vars(value).items()})
            return result
        raise CaptureError(
            f"what the model is given, or returns, holds a {qualified(type(value))} with tensors inside, and "
            "fxreg cannot tell how to rebuild it. Register it with torch.utils._pytree.register_pytree_node, or use "
            "emit='output' or emit='loss'."
        )

    def _record(self, value: Any) -> Any:
        result = self.done[id(value)] = copy.copy(value)
        for name, old in fields_of(value):
            new = self.of(old)
            if new is not old and isinstance(value, dict):  # a mapping and a dataclass in one
                if name in value:
                    result[name] = new
            elif new is not old:
                object.__setattr__(result, name, new)
        return result

    def _container(self, value: Any, base: Any) -> Any:
        """A dict or list of the user's class: what is in it, whatever the class makes of that, and its attributes."""
        result = self.done[id(value)] = base.__new__(type(value))
        if base is list:
            list.extend(result, [self.of(one) for one in list.__iter__(value)])
        else:
            for key, one in entries(value).items():
                base.__setitem__(result, key, self.of(one))
        if vars(value) is value:  # its items are its attributes
            object.__setattr__(result, "__dict__", result)
        else:
            vars(result).update({name: self.of(one) for name, one in vars(value).items()})
        return result


def _container_below(kind: type) -> type | None:
    """What a class of the user's is a subclass of, if nothing but a container, with attributes."""
    base = next((one for one in (OrderedDict, dict, list) if issubclass(kind, one)), None)
    if base is None or not kind.__dictoffset__ or issubclass(kind, defaultdict):
        return None
    above: tuple[type, ...] = kind.__mro__[: kind.__mro__.index(base)]
    copies = any("__reduce_ex__" in vars(one) or "__copy__" in vars(one) for one in above)
    return None if copies or any(vars(one).get("__slots__") for one in above) else base


def _is_plain_object(value: Any) -> bool:
    """Whether an object is all in its attributes: a cache, a namespace, a distribution."""
    return isinstance(getattr(value, "__dict__", None), dict) and _is_plain_class(type(value))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_plain_class(kind: type) -> bool:
    slots = any(getattr(base, "__slots__", ()) for base in kind.__mro__)
    own_copy = any("__reduce_ex__" in vars(base) or "__copy__" in vars(base) for base in kind.__mro__[:-1])
    return not slots and not own_copy and not _is_builtin(kind)


def _is_builtin(kind: type) -> bool:
    return issubclass(kind, list | tuple | dict | set | frozenset | types.FunctionType | BaseException)


def fresh(tensor: Tensor) -> Tensor:
    """A copy of an example, for a model that may write into it."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in the structure, depth first."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(keep, value)
    return iter(found)


def loss_in(output: Any) -> Any:
    """What may be the loss that a model returned: a tensor itself, or its output's field `loss`, None without one."""
    if isinstance(output, Tensor):
        return output
    return output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)


def replace_field(value: Any, field: str, new: Any) -> Any:
    """A copy of a mapping, named tuple or dataclass with one field replaced."""
    if hasattr(type(value), "_replace"):
        return value._replace(**{field: new})
    if type(value) in (dict, immutable_dict):  # fx interpreters pass a graph's literal dicts as immutable ones
        return {**value, field: new}
    result = copy.copy(value)
    if isinstance(result, dict):
        result[field] = new
    else:
        object.__setattr__(result, field, new)
    return result


def recipe(value: Any, leaves: tuple[type, ...], take: Callable[[Any], int], is_kept: Callable[[Any], bool]) -> Any:
    """How to make a structure anew from its leaves, as plain data for `follow`.

    Args:
        leaves: the types of the leaves.
        take: gives each leaf a number.
        is_kept: whether something is not made, but kept somewhere.

    Raises:
        CaptureError: something that cannot be made attribute by attribute, or that is there twice.
    """
    seen: set[int] = set()

    def of(value: Any) -> Any:
        kind = type(value)
        if isinstance(value, leaves):
            return ("part", take(value))
        if kind is torch.Size:
            return ("size", tuple(map(of, value)))
        if kind is slice:
            return ("slice", tuple(map(of, (value.start, value.stop, value.step))))
        if isinstance(value, (*_INERT, type, types.BuiltinFunctionType)) or _is_bare(value) or is_kept(value):
            return ("same", value)
        if id(value) in seen and kind is not tuple:
            raise CaptureError(f"a {kind.__name__} is there twice")
        seen.add(id(value))
        if kind in (list, tuple):
            return (kind.__name__, tuple(map(of, value)))
        if kind is dict:
            return ("dict", tuple(value), tuple(map(of, value.values())))
        if _is_plain_object(value):
            return ("object", kind, tuple(vars(value)), tuple(map(of, vars(value).values())))
        raise CaptureError(f"a {qualified(kind)} is more than its attributes")

    return of(value)


_MADE: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "size": torch.Size,
    "slice": lambda parts: slice(*parts),
}


def _is_bare(value: Any) -> bool:
    """Whether a value is a function that carries nothing which may be of one call."""
    if type(value) is not types.FunctionType:
        return False
    return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__)


def follow(recipe: Any, parts: Sequence[Any]) -> Any:
    """A structure made after a recipe."""
    kind, first, *rest = recipe
    if kind == "part":
        return parts[first]
    if kind == "same":
        return first
    if kind in _MADE:
        return _MADE[kind]([follow(one, parts) for one in first])
    if kind == "dict":
        return {key: follow(one, parts) for key, one in zip(first, rest[0], strict=True)}
    result = object.__new__(first)
    for name, one in zip(*rest, strict=True):
        setattr(result, name, follow(one, parts))
    return result


def _holds_none_of(leaves: tuple[type, ...], value: Any, depth: int = 4) -> bool:
    """Whether no tensor is found among an unknown object's attributes and items, a few levels down."""
    if isinstance(value, leaves):
        return False
    if isinstance(value, (*_INERT, type, torch.nn.Module, types.BuiltinFunctionType)):
        return True
    if depth == 0 or isinstance(value, types.GeneratorType):
        return False
    if isinstance(value, types.FunctionType):
        return all(_holds_none_of(leaves, one, depth - 1) for one in (*enclosed(value), *defaults(value)))
    inside: list[Any] = []
    if type(value) not in (dict, list, tuple, set, frozenset):  # Dynamo's guards fail on their missing __dict__
        inside += getattr(value, "__dict__", {}).values()
        inside += slotted(value).values()
    if isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inside += value
    for one in inside:  # noqa: SIM110  Dynamo breaks its graph in a generator expression
        if not _holds_none_of(leaves, one, depth - 1):
            return False
    return True


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass: what its fields say is all of it."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields_of(value: Any) -> tuple[tuple[str, Any], ...]:
    """The fields of a dataclass instance, with what is in them."""
    present = (one.name for one in dataclasses.fields(value) if hasattr(value, one.name))
    return tuple((name, getattr(value, name)) for name in present)


def likeness(value: Any) -> Any:
    """What kind of value something is, as plain data that code can say: the number of a tensor's dimensions, the parts
    of a container, a plain value itself, the type of anything else."""
    if isinstance(value, Tensor):
        return value.dim() if type(value) is Tensor else (type(value).__qualname__, value.dim())
    if isinstance(value, PLAIN):
        return repr(value)
    kind = type(value).__qualname__
    if isinstance(value, tuple | list):
        return (kind, *map(likeness, value))
    if is_record(value):
        return (kind, *((name, likeness(one)) for name, one in fields_of(value)))
    if isinstance(value, dict):
        return (kind, *((name, likeness(one)) for name, one in value.items()))
    return kind


def held(value: Any) -> Any:
    """Arguments as they are now: the containers among them may change later."""
    kind = type(value)
    if kind in (tuple, list):
        return kind([held(one) for one in value])
    return {key: held(one) for key, one in value.items()} if kind is dict else value


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same to everybody: in containers too, of one type, and -0.0 is not 0.0."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(alike, one.values(), other.values()))
    return repr(one) == repr(other) if isinstance(one, float | complex) else bool(one == other)


def differs(held: Any, now: Any) -> bool:
    """Whether containers among arguments have changed since they were held."""
    if type(now) in (tuple, list):
        return len(held) != len(now) or any(map(differs, held, now))
    if type(now) is dict:
        return list(held) != list(now) or any(map(differs, held.values(), now.values()))
    return held is not now


def holds_mutable(values: Any) -> bool:
    """Whether there are containers among arguments that could be written to."""
    return any(type(v) in (list, dict, set) or (type(v) is tuple and holds_mutable(v)) for v in values)


def is_nested(result: Any) -> bool:
    """Whether there are containers in a result: how many, and how long, may be other the next time."""
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple | list) else ()
    if is_record(result):
        parts = [part for _, part in fields_of(result)]
    return any(isinstance(part, tuple | list | dict) for part in parts)


def has_attributes(tensor: Tensor) -> bool:
    """Whether a forward has given a tensor attributes, beside Dynamo's marks, which mean nothing to anyone else."""
    return any(not name.startswith("_dynamo_") for name in getattr(tensor, "__dict__", ()))
