"""Finding parameters that a model also reaches past their registered names, where a substitute would be missed."""

import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .enclosed import inside
from .naming import names_in
from .scanning import functions_of

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_ASKED = {"Parameter", "is_leaf", "register_parameter", "get_parameter", "id"}
_CLOSED = (str, bytes, int, float, complex, type, types.ModuleType, torch.dtype, torch.device)


def hidden_uses(model: nn.Module, parameters: Collection[int]) -> Iterator[tuple[str, str, int]]:
    """The module's path, the attribute and the parameter's id, for every one of the parameters (by id) that is held
    in a plain attribute: itself or a view of it, in containers, closures, objects or unregistered modules."""
    registered = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _REGISTRIES or (isinstance(module, nn.RNNBase) and attribute.startswith("_flat_weight")):
                continue  # a recurrent layer's list is taken care of where it is called
            for identity in _held(value, registered, set()):
                if identity in parameters:
                    yield path, attribute, identity


def asks_for_parameters(module: nn.Module) -> str | None:
    """The function behind a forward, of a module or of one inside it, that asks what only a parameter is."""
    for one in module.modules():
        if type(one).__module__.startswith("torch.") and "forward" not in vars(one):
            continue
        for function in functions_of(one):
            if not names_in(function.__code__).isdisjoint(_ASKED):
                return function.__qualname__
    return None


def _held(value: Any, registered: set[int], seen: set[int]) -> Iterator[int]:
    """The ids of the tensors reachable from a value, and of those that they are views of."""
    if id(value) in seen or isinstance(value, _CLOSED) or id(value) in registered:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield id(value)
        if value._base is not None:
            yield id(value._base)
    for part in (*(value if isinstance(value, dict) else ()), *inside(value)):
        yield from _held(part, registered, seen)


def leads_to(module: nn.Module) -> bool:
    """Whether something that a module, or one inside it, keeps beside its registries leads to the module itself."""
    return module in reached(module)


def reached(module: nn.Module) -> set[nn.Module]:
    """The modules that something leads to which a module, or one inside it, keeps beside its registries."""
    waiting = [v for one in module.modules() for name, v in vars(one).items() if name not in _REGISTRIES]
    registered = {id(one) for one in module.modules() if one is not module}
    seen: set[int] = set()
    found: set[nn.Module] = set()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen and id(value) not in registered and not isinstance(value, _CLOSED):
            seen.add(id(value))
            if isinstance(value, nn.Module):
                found.add(value)
            waiting += inside(value)
    return found
