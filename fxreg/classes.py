"""Classes of modules as rules ask for them: by the class, or by its name."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import nn

from .errors import RuleError
from .kinds import Kind, qualified

Layer: TypeAlias = type[nn.Module] | str


def checked_layers(layers: object, who: str, what: str = "layer") -> tuple[Layer, ...]:
    """One or several classes or names of classes, as a tuple. `"nn.Linear"` says one class, and becomes it."""
    found = several(layers)
    for one in found:
        if isinstance(one, nn.Module):
            cls, alone = type(one).__name__, " One module alone is selected by its path, name=." * (what == "layer")
            raise RuleError(f"{who}: {what} must be a class, got an instance of {cls}. Give the class, {cls}.{alone}")
        named = isinstance(one, str) and is_dotted(one)
        if not named and not (isinstance(one, type) and issubclass(one, nn.Module)):
            raise RuleError(f"{who}: {what} must be nn.Module classes or class names, got {one!r}.")
    if not found:
        raise RuleError(f"{who}: {what} is empty; leave it out to match every layer.")
    return tuple((_said(one) or one) if isinstance(one, str) else one for one in found)


def several(value: object) -> Sequence[Any]:
    """One or several values as a sequence."""
    if isinstance(value, str | re.Pattern | type | nn.Module):
        return (value,)
    try:
        return tuple(value)  # type: ignore[arg-type]
    except TypeError:
        return (value,)


def class_name(cls: type[nn.Module]) -> str | None:
    """The name that says one of torch's own classes, and no other."""
    names = (f"nn.{cls.__name__}", f"nn.{qualified(cls).removeprefix('torch.nn.')}")
    return next((name for name in names if _torch_class(name) is cls), None)


def is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def is_of(layers: tuple[Layer, ...], kind: Kind) -> bool | None:
    """Whether a module of that kind is one of the layers asked for; None where nothing says so."""
    if not layers or any(_is_instance(cls, layer) for cls in kind.classes for layer in layers):
        return True
    if kind.classes:
        return False
    return True if any(isinstance(layer, str) and _ends(kind.name, layer) for layer in layers) else None


def is_known(name: str, classes: Iterable[type], unloaded: Iterable[str]) -> bool:
    """Whether a class of that name is there, or would be."""
    by_name = (_ends(qualified, name) for qualified in unloaded)
    return _torch_class(name) is not None or any(_is_named(cls, name) for cls in classes) or any(by_name)


def _is_instance(cls: type, layer: Layer) -> bool:
    if isinstance(layer, type):
        return issubclass(cls, layer)
    return any(_is_named(base, layer) for base in cls.__mro__)


def _is_named(cls: type, name: str) -> bool:
    """Whether `name` is a dotted suffix of the class's qualified name; `nn.` means `torch.nn.`."""
    return cls is _torch_class(name) or _ends(qualified(cls), name)


def _ends(qualified: str, name: str) -> bool:
    return not name.startswith("nn.") and f".{qualified}".endswith(f".{name}")


def _said(name: str) -> type[nn.Module] | None:
    """The class that only the name says: other names are also those of classes elsewhere."""
    return _torch_class(name) if name.startswith("nn.") else None


def _torch_class(name: str) -> type[nn.Module] | None:
    """The class of that name in `torch.nn`: "Linear", "nn.Linear" or "torch.nn.Linear"."""
    found: object = nn
    prefix = "torch.nn." if name.startswith("torch.nn.") else "nn."
    for part in name.removeprefix(prefix).split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
