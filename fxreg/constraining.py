"""What a constraint is: a projection that `fxreg.ProximalStep` applies after each step of the optimizer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, overload

import torch
from torch import Tensor

from .effects import Definition, Effect
from .formulas import ProximalFormula

P = ParamSpec("P")


class Constraint(Definition[P]):
    """An effect that puts a parameter back where it is allowed to be, after each step."""

    default_via = "proximal"
    leading = 1

    def __init__(self, function: Callable[..., Any], foreach: bool = False) -> None:
        self.prox: ProximalFormula = ProximalFormula(function, None, foreach)
        super().__init__(function)
        self.prox = replace(self.prox, anchors=self.anchors)

    def _trial(self, weight: Tensor, effect: Effect) -> str | None:
        strengths = {name: weight.new_ones((), dtype=torch.float64) for name in effect.strengths}
        self.prox.moved([weight], 1.0, strengths, self._trial_arguments(weight, effect))
        return None


@overload
def constraint(function: Callable[Concatenate[Tensor, P], Tensor]) -> Constraint[P]: ...
@overload
def constraint(*, foreach: bool) -> Callable[[Callable[Concatenate[list[Tensor], P], list[Tensor]]], Constraint[P]]: ...
def constraint(function: Any = None, *, foreach: bool = False) -> Any:
    """Register a constraint from its projection f(weight, *, named parameters) -> the nearest allowed weight.

    A rule with it acts after each step of the optimizer, by `fxreg.ProximalStep`, whatever the learning rate.

    Args:
        function: the formula, of the weight (any shape; float32 or wider) and of named parameters annotated as those of
            `fxreg.penalty`. One annotated `fxreg.Strength` is at least 0, and live in `fxreg.strengths`.
        foreach: whether it takes a list of weights of one dtype and device, and returns a list: for what acts on each
            element by itself, by `torch._foreach_*`.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.constraint
    ... def symmetric(weight: torch.Tensor) -> torch.Tensor:
    ...     return (weight + weight.T) / 2
    >>> fxreg.Rule(symmetric()).lowering
    'proximal'
    """
    if function is None:
        return lambda f: Constraint(f, foreach)
    return Constraint(function, foreach)
