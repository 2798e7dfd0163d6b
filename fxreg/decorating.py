"""What makes an effect of a formula: the decorators of penalties and of gradient transforms."""

from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, cast, overload

from torch import Tensor

from .effects import Definition, Gradient, Penalty

P = ParamSpec("P")


@overload
def penalty(function: Callable[Concatenate[Tensor, P], Tensor]) -> Penalty[Concatenate[float, P]]: ...
@overload
def penalty(
    *, weight_decay: float
) -> Callable[[Callable[Concatenate[Tensor, P], Tensor]], Penalty[Concatenate[float, P]]]: ...
def penalty(function: Any = None, *, weight_decay: float | None = None) -> Any:
    """Register a penalty from its formula R(weight, *, named parameters) -> 0-d tensor.

    The strength s multiplies the formula from outside: the decorated name becomes a factory `name(s, …)`. A formula
    with strengths of its own annotates them `fxreg.Strength`. Redecorating a name replaces it.

    Args:
        function: the formula, of the weight (any shape; float32 or wider) and of named parameters annotated float,
            int, bool, str, Tensor, `int | tuple[int, ...]`, or `fxreg.Anchor`: a tensor for each parameter.
        weight_decay: the d per unit of strength for which an optimizer's coupled `weight_decay=d` is exactly this.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.penalty
    ... def log_cosh(weight: torch.Tensor, *, width: float = 1.0) -> torch.Tensor:
    ...     return (weight / width).cosh().log().sum()
    >>> log_cosh(1e-3)
    log_cosh(0.001, width=1.0)
    """
    if function is None:
        return lambda f: Penalty(f, weight_decay)
    return Penalty(function, weight_decay)


def own_strengths(function: Callable[Concatenate[Tensor, P], Tensor]) -> Penalty[P]:
    """`penalty`, typed for a formula that takes its strengths itself."""
    return cast(Penalty[P], penalty(function))


@overload
def gradient(function: Callable[Concatenate[Tensor, Tensor, P], Tensor]) -> Gradient[P]: ...
@overload
def gradient(*, detach: bool) -> Callable[[Callable[Concatenate[Tensor, Tensor, P], Tensor]], Gradient[P]]: ...
def gradient(function: Any = None, *, detach: bool = False) -> Any:
    """Register a gradient transform from its formula f(grad, weight, *, named parameters) -> Tensor.

    Args:
        function: the formula: `grad` and `weight` have the parameter's shape, in float32 or wider. A parameter
            annotated `fxreg.Strength` is a live 0-d tensor, one annotated `fxreg.Stream` a random stream, and one
            annotated `fxreg.Anchor` a tensor for each parameter.
        detach: cut the parameter off instead: its gradient is None, and the formula is never called.

    Raises:
        RuleError: a parameter that an operator's schema cannot hold.

    >>> import torch, fxreg
    >>> @fxreg.gradient
    ... def sign(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    ...     return grad.sign()
    >>> sign()
    sign()
    """
    if function is None:
        return lambda f: Gradient(f, detach)
    return Gradient(function, detach)


class OptimizerOption(Definition[P]):
    """An effect that is an option of the optimizer and has no node."""

    default_via = "optimizer"
    leading = 0
