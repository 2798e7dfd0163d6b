"""Penalties on parameters: one formula each, with its gradient in closed form where there is one.

Throughout, w is the parameter (any shape), s the strength, and the objective becomes loss + s·R(w).
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, cast

import torch
from torch import Tensor

from .arguments import Strength
from .effects import OptimizerOption, Penalty, penalty

P = ParamSpec("P")


def _with_own_strengths(function: Callable[Concatenate[Tensor, P], Tensor]) -> Penalty[P]:
    """`penalty`, typed for a formula that takes its strengths itself."""
    return cast(Penalty[P], penalty(function))


@penalty
def l1(weight: Tensor) -> Tensor:
    """Sum of absolute values, R(w) = Σ|w|.

    Gradient: sign(w), 0 at 0. The subgradient step oscillates around 0 and reaches no exact zeros.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.

    Raises:
        RuleError: a strength that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l1(0.5), param="weight")])
    >>> gm(torch.zeros(1, 3)).sum().backward()
    >>> bool((model.weight.grad == 0.5 * model.weight.sign()).all())
    True

    Source: Tibshirani (1996), "Regression shrinkage and selection via the lasso", eq. 2.
    """
    return weight.abs().sum()


@l1.gradient
def _(weight: Tensor) -> Tensor:
    return weight.sign()


@penalty(weight_decay=2.0)
def l2(weight: Tensor) -> Tensor:
    """Sum of squares, R(w) = Σw² (Keras's convention; without the ½ of torch's `weight_decay`).

    Gradient: 2w. Strength s equals an optimizer's coupled `weight_decay=2s`, which is also what `via="optimizer"` does.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight squared.

    Raises:
        RuleError: a strength that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 2)
    >>> gm = fxreg.transform(model, [fxreg.Rule(fxreg.l2(0.5), param="weight")])
    >>> gm(torch.zeros(1, 3)).sum().backward()
    >>> torch.equal(model.weight.grad, model.weight)
    True

    Source: Hoerl and Kennard (1970), "Ridge regression", eq. 2.5.
    """
    return weight.square().sum()


@l2.gradient
def _(weight: Tensor) -> Tensor:
    return 2 * weight


@_with_own_strengths
def elastic_net(weight: Tensor, *, l1: Strength, l2: Strength) -> Tensor:
    """Both at once, l1·Σ|w| + l2·Σw².

    Gradient: l1·sign(w) + 2·l2·w, 0 at 0. Its two strengths are `label.l1` and `label.l2` in `fxreg.strengths`.

    Args:
        l1: the strength of Σ|w|, at least 0.
        l2: the strength of Σw², at least 0.

    Raises:
        RuleError: a strength that is negative, infinite or NaN.

    >>> import fxreg
    >>> fxreg.elastic_net(l1=1e-4, l2=1e-3)
    elastic_net(l1=0.0001, l2=0.001)

    Source: Zou and Hastie (2005), "Regularization and variable selection via the elastic net", eq. 3 (naive).
    """
    return l1 * weight.abs().sum() + l2 * weight.square().sum()


@elastic_net.gradient
def _(weight: Tensor, *, l1: Tensor, l2: Tensor) -> Tensor:
    return l1 * weight.sign() + 2 * l2 * weight


@penalty
def group_lasso(weight: Tensor, *, dim: int | tuple[int, ...] = 0) -> Tensor:
    """Sum of the 2-norms of groups, R(w) = Σ_g ‖w_g‖₂: one group per index along `dim`, no √size factor.

    Gradient: w_g / ‖w_g‖₂ in each group; 0 in a group of exact zeros.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        dim: the dimension, or dimensions, whose indices name the groups: `dim=0` makes a group of each output
            channel of a Linear or Conv weight, `dim=1` of each input channel.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dimension the weight does not have.

    >>> import torch, fxreg
    >>> float(fxreg.group_lasso.function(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=0))
    5.0

    Source: Yuan and Lin (2006), "Model selection and estimation in regression with grouped variables", eq. 2.1.
    """
    return _group_norms(weight, dim).sum()


@group_lasso.gradient
def _(weight: Tensor, *, dim: int | tuple[int, ...] = 0) -> Tensor:
    norms = _group_norms(weight, dim)
    return torch.where(norms > 0, weight / norms, 0)


def _group_norms(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The 2-norm of every group, broadcastable against the weight."""
    kept = {_axis(d, weight.ndim) for d in ((dim,) if isinstance(dim, int) else dim)}
    reduced = [d for d in range(weight.ndim) if d not in kept]
    if not reduced:
        return weight.abs()
    norms: Tensor = torch.linalg.vector_norm(weight, dim=reduced, keepdim=True)
    return norms


def _axis(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise IndexError(f"dimension {dim} of a parameter with {ndim} dimension(s)")
    return dim % ndim


def _weight_decay(decay: Strength) -> None:
    """The optimizer's own `weight_decay=d`, whatever that optimizer makes of it.

    Coupled optimizers (SGD, Adam, …) add d·w to the gradient, the penalty d/2·Σw²; AdamW shrinks w by lr·d·w beside
    the gradient step, which is no penalty at all. It exists only `via="optimizer"`: `fxreg.param_groups` makes the
    groups.

    Args:
        decay: d ≥ 0.

    Raises:
        RuleError: a decay that is negative, infinite or NaN.

    >>> import fxreg
    >>> fxreg.weight_decay(0.01)
    weight_decay(0.01)

    Source: Loshchilov and Hutter (2019), "Decoupled weight decay regularization", algorithm 2.
    """


_weight_decay.__name__ = _weight_decay.__qualname__ = "weight_decay"
weight_decay: OptimizerOption[[float]] = OptimizerOption(_weight_decay)
