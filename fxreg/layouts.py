"""Which modules and parameters a model has, and which of them are one: as data, and seen at a glance."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from .kinds import qualified
from .rules import Rule


@dataclass(frozen=True)
class Layout:
    """What rules select from.

    Attributes:
        modules: for the path of every module, the first path of the same module, and its qualified class.
        parameters: for every name of every parameter, the first name of the same parameter, and its shape.
    """

    modules: Mapping[str, tuple[str, str]]
    parameters: Mapping[str, tuple[str, torch.Size]]


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model as it is now."""
    paths, names = dict[int, str](), dict[int, str]()
    modules, parameters = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        modules[path] = (paths.setdefault(id(module), path), qualified(type(module)))
        for key, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{key}" if path else key
                parameters[name] = (names.setdefault(id(parameter), name), parameter.shape)
    return Layout(modules, parameters)


class Glance:
    """A layout in what can be compared fast: classes, keys, and who is who.

    It keeps the modules: the identity of one that is gone could be another one's later. Parameters may become other
    objects at every call (`torch.func.functional_call` swaps them), so of them it counts which places hold the same
    one, and their shapes.

    Args:
        asks: whether what somebody may ask of a parameter counts, too.

    Attributes:
        passed: for everything that was compared with modules as they are here, by its identity, itself and these.
    """

    def __init__(self, model: nn.Module, roots: Iterable[nn.Module], asks: bool = False) -> None:
        self.passed: dict[int, tuple[Any, Any]] = {}
        self._modules, self._owners = [*model.modules()], [*model.modules(), *roots]
        self._types = [*map(type, self._modules)]
        self._children_of, self._parameters_of = _PLAIN if all(map(_has_dicts, self._owners)) else _OTHER
        children = [*map(self._children_of, self._owners)]
        self._child_names, self._children = [*map(tuple, children)], [*_all(children)]
        held = [*map(self._parameters_of, self._modules)]
        self._names, self._identities, self._ties = [*map(tuple, held)], _identities(held), _ties(held)
        self._asks, self._asked = asks, _asked(held)

    def is_current(self) -> bool:
        """Whether everything is as it was: asked before every call, and so answered in C as far as that goes."""
        children = [*map(self._children_of, self._owners)]
        if [*map(type, self._modules)] != self._types or [*map(tuple, children)] != self._child_names:
            return False
        if not all(map(operator.is_, _all(children), self._children)):
            return False
        held = [*map(self._parameters_of, self._modules)]
        if [*map(tuple, held)] != self._names:
            return False
        identities = _identities(held)
        if identities != self._identities:
            if _ties(held) != self._ties:
                return False
            self._identities = identities
        return not self._asks or _asked(held) in (None, self._asked)


_Ask: TypeAlias = Callable[[nn.Module], dict[str, Any]]
_PLAIN: tuple[_Ask, _Ask] = (operator.attrgetter("_modules"), operator.attrgetter("_parameters"))
"""What gives a module's children and parameters, where it keeps them in dicts."""
_OTHER: tuple[_Ask, _Ask] = (
    lambda module: dict(module._modules.items()),
    lambda module: dict(module._parameters.items()),
)


def _has_dicts(module: nn.Module) -> bool:
    """Not so of a scripted one."""
    return isinstance(module._modules, dict) and isinstance(module._parameters, dict)


def _all(several: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """The values of several dicts, one after the other."""
    return itertools.chain.from_iterable(map(dict.values, several))


def _identities(held: Iterable[dict[str, Any]]) -> list[int]:
    return [id(one) for each in held for one in each.values()]


_answers = operator.attrgetter("requires_grad", "dtype")


def _asked(held: Iterable[dict[str, Any]]) -> list[Any] | None:
    """What parameters can be asked for, beside their shapes; nothing while others stand in for them."""
    found = [one for each in held for one in each.values() if one is not None]
    return [*map(_answers, found)] if {*map(type, found)} <= {nn.Parameter} else None


def _ties(held: Iterable[dict[str, Any]]) -> list[tuple[int, Any]]:
    """For every place that may have a parameter, the first with the same one, and its shape."""
    first: dict[int, int] = {}
    places = enumerate(one for each in held for one in each.values())
    return [(first.setdefault(id(one), place), getattr(one, "shape", None)) for place, one in places]


class Meaning:
    """What rules meant of a model when it was transformed.

    A pickle leaves the rules behind, which may hold any function; then every other layout means something else.

    Attributes:
        rules: the rules; None if they are no longer known.
        layout: of the model.
        glance: the same; None until somebody looked.
        properties: what was behind those that the graph took; None until somebody looked.
        asks: whether the rules may ask parameters for what a layout does not hold.
    """

    def __init__(self, rules: tuple[Rule, ...] | None, layout: Layout) -> None:
        self.rules, self.layout = rules, layout
        self.glance: Glance | None = None
        self.properties: dict[tuple[type, str], Any] | None = None
        self.asks = any(callable(rule.where) for rule in rules or ())

    def __reduce__(self) -> tuple[Any, ...]:
        return Meaning, (None, self.layout)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Meaning":
        return Meaning(self.rules, self.layout)


def seen(meaning: Meaning | None) -> Glance | None:
    """The last glance at a model, if it still looks so."""
    glance = meaning.glance if meaning is not None else None
    return glance if glance is not None and glance.is_current() else None
