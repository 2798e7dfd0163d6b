"""What rules act on: the parameters of a module, each once, and the places where activations are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .errors import CaptureError, MatchError
from .kinds import Kind
from .rules import On, Op, Rule


@dataclass(frozen=True)
class Owner:
    """One way to a parameter: the module that directly owns it, that module's path and class, and the key there."""

    path: str
    key: str
    layer: nn.Module = field(repr=False, compare=False)
    kind: Kind = field(repr=False, compare=False)

    @property
    def full_name(self) -> str:
        return f"{self.path}.{self.key}" if self.path else self.key


@dataclass(frozen=True)
class Site:
    """One parameter, by identity, however many names it has.

    Attributes:
        name: its first name in `named_parameters()`.
        layer: the module that owns it under that name.
        param: its key in that module.
        shape, dtype, numel: of the parameter.
        aliases: its other names.
    """

    name: str
    layer: nn.Module = field(repr=False, compare=False)
    param: str
    shape: torch.Size
    dtype: torch.dtype
    numel: int
    aliases: tuple[str, ...]
    trainable: bool
    owners: tuple[Owner, ...] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class ActivationSite:
    """One module, by identity, whose activations, or those of calls in its forward, a rule acts on.

    Attributes:
        name: its first path in `named_modules()`.
        layer: the module.
        on: `"output"` or `"input"`.
        op: the function or method in its forward; None for the module itself.
        aliases: its other paths.
        param, shape, dtype, numel: None; there for predicates that look at parameters as well.
    """

    name: str
    layer: nn.Module = field(repr=False, compare=False)
    on: On
    op: Op | None
    aliases: tuple[str, ...]
    kinds: tuple[Kind, ...] = field(repr=False, compare=False)
    param: None = None
    shape: None = None
    dtype: None = None
    numel: None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


AnySite: TypeAlias = Site | ActivationSite


def check_paths(model: nn.Module) -> None:
    """Raise unless every module has paths of its own, by which rules can mean it."""
    if path := _path_inside_itself(model, "", set(), set()):
        raise CaptureError(
            f"the model's module {path!r} is inside itself, so that its paths never end. Take it out, or keep it in an "
            "attribute that registers no module, such as a tuple of one."
        )


def _path_inside_itself(module: nn.Module, path: str, above: set[nn.Module], seen: set[nn.Module]) -> str | None:
    """Where a module stands again somewhere below itself, if one does."""
    if module in above:
        return path
    if module in seen:
        return None
    seen.add(module)
    above.add(module)
    for name, child in module.named_children():
        if found := _path_inside_itself(child, f"{path}.{name}" if path else name, above, seen):
            return found
    above.remove(module)
    return None


def find_sites(model: nn.Module, kinds: Mapping[str, Kind]) -> Iterator[Site]:
    """Every parameter of the module once, in the order of `named_parameters()`."""
    owners: dict[int, list[Owner]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters[id(parameter)] = parameter
                owners.setdefault(id(parameter), []).append(_owner(model, path, module, key, kinds))
    for identity, parameter in parameters.items():
        first, *others = owners[identity]
        lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
        if lazy:
            raise MatchError(
                f"parameter {first.full_name!r} of a lazy {type(first.layer).__name__} has no shape yet. Run one "
                "forward pass of the model before fxreg reads it."
            )
        yield Site(
            name=first.full_name,
            layer=first.layer,
            param=first.key,
            shape=parameter.shape,
            dtype=parameter.dtype,
            numel=parameter.numel(),
            aliases=tuple(dict.fromkeys(o.full_name for o in others if o.full_name != first.full_name)),
            trainable=parameter.requires_grad,
            owners=(first, *others),
        )


def _owner(model: nn.Module, path: str, module: nn.Module, key: str, kinds: Mapping[str, Kind]) -> Owner:
    """A parametrization's leaves count as the parametrized layer's own."""
    if kinds[path].is_a(ParametrizationList):
        parent = path.rpartition("parametrizations.")[0].removesuffix(".")
        key = f"{path.removeprefix(parent).removeprefix('.')}.{key}"
        return Owner(parent, key, model.get_submodule(parent), kinds[parent])
    return Owner(path, key, module, kinds[path])


def find_activation_sites(model: nn.Module, kinds: Mapping[str, Kind], rule: Rule) -> Iterator[ActivationSite]:
    """Every module once, in the order of `named_modules()`, as a rule on activations sees it."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        found = tuple(kinds[path] for path in (first, *others))
        yield ActivationSite(first, module, rule.on, rule.op, tuple(others), found)
