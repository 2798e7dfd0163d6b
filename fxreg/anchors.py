"""Penalties on the distance from an anchor: what a parameter was when training began, or another point.

The anchor of a parameter is a tensor of its shape, kept beside the model: one copy of the weights that the rule matches
for each such argument. It is copied once, when the model is transformed, stays whatever the model loads later, and is
saved by `fxreg.state_dict`.
"""

from torch import Tensor

from .arguments import Anchor
from .decorating import penalty
from .formulas import gives_new


@penalty
def l2_sp(weight: Tensor, *, anchor: Anchor = None) -> Tensor:
    """Squared distance from the starting point, R(w) = Σ(w − w⁰)²: fine-tuning that stays near what was pretrained.

    As in `l2` there is no ½, which the paper has: s is its α/2. New layers have no starting point worth staying at:
    put `l2` on them.

    Gradient: 2(w − w⁰), which is 0 at the start.

    Proximal operator: w − (w − w⁰)·2t/(1 + 2t) with t = lr·s.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight squared.
        anchor: w⁰, a mapping of full parameter names to tensors of their shapes, such as a `state_dict`; names of what
            the rule does not match may be among them. By default each parameter's value when the model is transformed.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a parameter without a tensor, or with one of another
            shape or not of floating-point numbers; by default, a parameter on the meta device.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 2)
    >>> gm = fxreg.transform(model, fxreg.Rule(fxreg.l2_sp(0.5)))
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(2.0)
    >>> round(float(fxreg.penalties(gm)["l2_sp"]), 4)
    4.0

    Source: Li, Grandvalet and Davoine (2018), "Explicit inductive bias for transfer learning with convolutional
    networks", eq. 3.
    """
    distance: Tensor = weight - anchor
    return distance.square().sum()


@l2_sp.gradient
@gives_new
def _(weight: Tensor, *, anchor: Anchor = None) -> Tensor:
    distance: Tensor = weight - anchor
    return 2 * distance


@l2_sp.proximal
def _(weight: Tensor, step: Tensor, *, anchor: Anchor = None) -> Tensor:
    nearer: Tensor = weight - (weight - anchor) * (2 * step / (1 + 2 * step))
    return nearer


@penalty
def ewc(weight: Tensor, *, fisher: Anchor, anchor: Anchor = None) -> Tensor:
    """Distance from an earlier task's solution where that matters, R(w) = Σ F(w − w*)²: elastic weight consolidation.

    F is the diagonal of the Fisher information, the mean squared gradient of the earlier task's log-likelihood. There
    is no ½: s is Avalanche's `ewc_lambda`, and λ/2 of the paper.

    Gradient: 2F(w − w*), which is 0 at the start.

    Proximal operator: w − (w − w*)·2tF/(1 + 2tF) with t = lr·s.

    Args:
        strength: s ≥ 0, in units of loss.
        fisher: F ≥ 0, a mapping of full parameter names to tensors of their shapes.
        anchor: w*, likewise; by default each parameter's value when the model is transformed.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a parameter without a tensor, or with one of another
            shape or not of floating-point numbers; by default, a parameter on the meta device.

    >>> import torch, fxreg
    >>> model = torch.nn.Linear(3, 2)
    >>> fisher = {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, 10.0])}
    >>> gm = fxreg.transform(model, fxreg.Rule(fxreg.ewc(0.5, fisher)))
    >>> with torch.no_grad():
    ...     _ = model.bias.add_(2.0)
    >>> round(float(fxreg.penalties(gm)["ewc"]), 4)
    20.0

    Source: Kirkpatrick et al. (2017), "Overcoming catastrophic forgetting in neural networks", eq. 3, as in Avalanche.
    """
    weighted: Tensor = fisher * (weight - anchor).square()
    return weighted.sum()


@ewc.gradient
@gives_new
def _(weight: Tensor, *, fisher: Anchor, anchor: Anchor = None) -> Tensor:
    slope: Tensor = 2 * fisher * (weight - anchor)
    return slope


@ewc.proximal
def _(weight: Tensor, step: Tensor, *, fisher: Anchor, anchor: Anchor = None) -> Tensor:
    pull = 2 * step * fisher
    nearer: Tensor = weight - (weight - anchor) * (pull / (1 + pull))
    return nearer
