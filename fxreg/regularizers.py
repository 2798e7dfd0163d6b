"""Norms as penalties, and the optimizer's decay: one formula each, with its gradient in closed form.

Throughout, w is the parameter (any shape), s the strength, and the objective becomes loss + s·R(w).
"""

import torch
from torch import Tensor

from .arguments import Strength
from .decorating import OptimizerOption, own_strengths, penalty
from .formulas import gives_new


@penalty
def l1(weight: Tensor) -> Tensor:
    """Sum of absolute values, R(w) = Σ|w|.

    Gradient: sign(w), 0 at 0. The subgradient step oscillates around 0 and reaches no exact zeros.

    Proximal operator: the soft threshold sign(w)·max(|w| − t, 0) with t = lr·s, which does.

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
@gives_new
def _(weight: Tensor) -> Tensor:
    return weight.sign()


@l1.proximal(foreach=True)
def _(weights: list[Tensor], step: Tensor) -> list[Tensor]:
    return soft_thresholded(weights, step)


@penalty(weight_decay=2.0)
def l2(weight: Tensor) -> Tensor:
    """Sum of squares, R(w) = Σw² (Keras's convention; without the ½ of torch's `weight_decay`).

    Gradient: 2w. Strength s equals an optimizer's coupled `weight_decay=2s`, which is also what `via="optimizer"` does.

    Proximal operator: w/(1 + 2t) with t = lr·s.

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
@gives_new
def _(weight: Tensor) -> Tensor:
    return 2 * weight


@l2.proximal(foreach=True)
def _(weights: list[Tensor], step: Tensor) -> list[Tensor]:
    return _divided(weights, 1 + 2 * step)


@own_strengths
def elastic_net(weight: Tensor, *, l1: Strength, l2: Strength) -> Tensor:
    """Both at once, l1·Σ|w| + l2·Σw².

    Gradient: l1·sign(w) + 2·l2·w, 0 at 0. Its two strengths are `label.l1` and `label.l2` in `fxreg.strengths`.

    Proximal operator: sign(w)·max(|w| − lr·l1, 0)/(1 + 2·lr·l2).

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
@gives_new
def _(weight: Tensor, *, l1: Tensor, l2: Tensor) -> Tensor:
    return l1 * weight.sign() + 2 * l2 * weight


@elastic_net.proximal(foreach=True)
def _(weights: list[Tensor], step: Tensor, *, l1: Tensor, l2: Tensor) -> list[Tensor]:
    return _divided(soft_thresholded(weights, step * l1), 1 + 2 * step * l2)


def soft_thresholded(weights: list[Tensor], threshold: Tensor) -> list[Tensor]:
    """sign(w)·max(|w| − threshold, 0)."""
    sizes = torch._foreach_abs(weights)
    torch._foreach_add_(sizes, threshold.to(weights[0].dtype), alpha=-1)
    torch._foreach_clamp_min_(sizes, 0.0)
    torch._foreach_mul_(sizes, torch._foreach_sign(weights))
    return list(sizes)


def _divided(weights: list[Tensor], divisor: Tensor) -> list[Tensor]:
    return list(torch._foreach_div(weights, divisor.to(weights[0].dtype)))


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
