"""What a rule may ask of where in the graph a layer stands; decided once the model is captured."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .classes import Layer, checked_layers


@dataclass(frozen=True, repr=False)
class Position:
    """A condition on a layer's position, for `where=`. They compose: `before(…) & ~last()`."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The classes that it asks for."""
        return ()

    def __and__(self, other: Any) -> "Position":
        return Both(self, other) if isinstance(other, Position) else NotImplemented

    def __or__(self, other: Any) -> "Position":
        return Either(self, other) if isinstance(other, Position) else NotImplemented

    def __invert__(self) -> "Position":
        return Not(self)


@dataclass(frozen=True, repr=False)
class Beside(Position):
    """The layer's output goes into a layer of these classes, or its input comes from one."""

    side: str
    types: tuple[Layer, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.types

    def __repr__(self) -> str:
        names = [one if isinstance(one, str) else one.__name__ for one in self.types]
        return f"{self.side}({names[0] if len(names) == 1 else '(' + ', '.join(names) + ')'})"


@dataclass(frozen=True, repr=False)
class Last(Position):
    """No other layer with parameters comes after it."""

    def __repr__(self) -> str:
        return "last()"


@dataclass(frozen=True, repr=False)
class Not(Position):
    one: Position

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.one.layers

    def __repr__(self) -> str:
        return f"~{_within(self.one)}"


@dataclass(frozen=True, repr=False)
class _Two(Position):
    one: Position
    other: Position

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.one.layers + self.other.layers


class Both(_Two):
    def __repr__(self) -> str:
        return f"{_within(self.one)} & {_within(self.other)}"


class Either(_Two):
    def __repr__(self) -> str:
        return f"{_within(self.one)} | {_within(self.other)}"


def _within(one: Position) -> str:
    return f"({one!r})" if isinstance(one, _Two) else repr(one)


def before(layers: Layer | Iterable[Layer]) -> Position:
    """Layers whose output goes into a layer of that class: directly, or through what only reshapes. For `where=`.

    Between the two may stand what gives the same numbers in another shape or order (`flatten`, `view`, `permute`, …,
    `nn.Flatten`, `nn.Identity`), and nothing else: no nonlinearity, dropout or addition. Other uses of the output
    do not matter. What is called as a whole counts as one layer.

    Args:
        layers: a module class, a class name, or several, as in `layer=`.

    Raises:
        RuleError: neither classes nor names of classes.

    >>> import torch, fxreg
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    >>> rule = fxreg.Rule(fxreg.l1(1e-4), layer="Conv2d", param="weight", where=fxreg.before(nn.BatchNorm2d))
    >>> [edit.site for edit in fxreg.explain(fxreg.transform(model, rule)).plan.edits]
    ['0.weight']
    """
    return Beside("before", checked_layers(layers, "before", "type"))


def after(layers: Layer | Iterable[Layer]) -> Position:
    """Layers that take the output of a layer of that class: directly, or through what only reshapes. For `where=`.

    Args:
        layers: as for `before`, whose mirror image this is.

    Raises:
        RuleError: neither classes nor names of classes.

    >>> import fxreg
    >>> fxreg.after("Embedding") | ~fxreg.before(("LayerNorm", "RMSNorm"))
    after(Embedding) | ~before((LayerNorm, RMSNorm))
    """
    return Beside("after", checked_layers(layers, "after", "type"))


def last() -> Position:
    """The last layers: what they give reaches an output, and no other layer with parameters comes after. For `where=`.

    A model with several heads has several.

    >>> import torch, fxreg
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> rule = fxreg.Rule(fxreg.l2(1e-3), param="weight", where=~fxreg.last())
    >>> [edit.site for edit in fxreg.explain(fxreg.transform(model, rule)).plan.edits]
    ['0.weight']
    """
    return Last()
