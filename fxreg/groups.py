"""Penalties on groups of weights: of a filter, a channel, a head, a row; all of one group goes, or none.

Throughout, w is the parameter (any shape), w_g a group of its elements, s the strength, and the objective becomes
loss + s·R(w). A group is one index along `dim`, or one tuple of indices along several dimensions.
"""

import torch
from torch import Tensor

from .arguments import Strength
from .decorating import own_strengths, penalty
from .norms import norm


@penalty
def group_lasso(weight: Tensor, *, dim: int | tuple[int, ...] = 0) -> Tensor:
    """Sum of the 2-norms of groups, R(w) = Σ_g ‖w_g‖₂: one group per index along `dim`, no √size factor.

    Gradient: w_g / ‖w_g‖₂ in each group; 0 in a group of exact zeros.

    Proximal operator: w_g·max(0, 1 − t/‖w_g‖₂) with t = lr·s; exactly 0 in a group whose norm is at most t.

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
    return group_norms(weight, dim).sum()


@group_lasso.gradient
def _(weight: Tensor, *, dim: int | tuple[int, ...] = 0) -> Tensor:
    return _directions(weight, group_norms(weight, dim))


@group_lasso.proximal
def _(weight: Tensor, step: Tensor, *, dim: int | tuple[int, ...] = 0) -> Tensor:
    return _shrunk(weight, step, dim)


@own_strengths
def sparse_group_lasso(weight: Tensor, *, l1: Strength, group: Strength, dim: int | tuple[int, ...] = 0) -> Tensor:
    """Zeros in groups, and whole groups of zeros: l1·Σ|w| + group·Σ_g ‖w_g‖₂, no √size factor.

    Gradient: l1·sign(w) + group·w_g/‖w_g‖₂; 0 in a group of exact zeros. Its two strengths are `label.l1` and
    `label.group` in `fxreg.strengths`.

    Proximal operator: l1's soft threshold lr·l1, then group_lasso's, lr·group.

    Args:
        l1: the strength of Σ|w|, at least 0.
        group: the strength of Σ_g ‖w_g‖₂, at least 0.
        dim: as in `group_lasso`.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dimension the weight does not have.

    >>> import fxreg
    >>> fxreg.sparse_group_lasso(l1=1e-4, group=1e-3, dim=1)
    sparse_group_lasso(l1=0.0001, group=0.001, dim=(1,))

    Source: Simon, Friedman, Hastie and Tibshirani (2013), "A sparse-group lasso".
    """
    return l1 * weight.abs().sum() + group * group_norms(weight, dim).sum()


@sparse_group_lasso.gradient
def _(weight: Tensor, *, l1: Tensor, group: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    return l1 * weight.sign() + group * _directions(weight, group_norms(weight, dim))


@sparse_group_lasso.proximal
def _(weight: Tensor, step: Tensor, *, l1: Tensor, group: Tensor, dim: int | tuple[int, ...] = 0) -> Tensor:
    return _shrunk(weight.sign() * (weight.abs() - step * l1).clamp_min(0), step * group, dim)


@penalty
def max_norm(weight: Tensor, *, limit: float, dim: int | tuple[int, ...] = 0) -> Tensor:
    """A hinge on the 2-norms of groups, R(w) = Σ_g max(0, ‖w_g‖₂ − limit): groups below the limit are free.

    Gradient: w_g / ‖w_g‖₂ in each group above the limit, 0 in the others and at the limit.

    Proximal operator: in each group above the limit w_g·max(limit, ‖w_g‖₂ − t)/‖w_g‖₂, with t = lr·s.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        limit: at least 0, in units of the weight.
        dim: as in `group_lasso`; `dim=0` is a limit for each unit of a layer.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a negative limit; a dimension the weight does not
            have.

    >>> import torch, fxreg
    >>> float(fxreg.max_norm.function(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), limit=2.0))
    3.0

    Source: Srebro, Rennie and Jaakkola (2005), "Maximum-margin matrix factorization", as a penalty.
    """
    if limit < 0:
        raise ValueError("limit must be at least 0")
    norms = group_norms(weight, dim)
    return torch.where(norms > limit, norms - limit, 0).sum()


@max_norm.gradient
def _(weight: Tensor, *, limit: float, dim: int | tuple[int, ...] = 0) -> Tensor:
    norms = group_norms(weight, dim)
    return torch.where(norms > limit, _directions(weight, norms), 0)


@max_norm.proximal
def _(weight: Tensor, step: Tensor, *, limit: float, dim: int | tuple[int, ...] = 0) -> Tensor:
    norms = group_norms(weight, dim)
    return weight * torch.where(norms > limit, (norms - step).clamp_min(limit) / norms, 1)


def group_norms(weight: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The 2-norm of every group, broadcastable against the weight."""
    kept = axes(dim, weight.ndim)
    reduced = tuple(d for d in range(weight.ndim) if d not in kept)
    return norm(weight, reduced) if reduced else weight.abs()


def _shrunk(weight: Tensor, threshold: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """w_g·max(0, 1 − threshold/‖w_g‖₂)."""
    norms = group_norms(weight, dim)
    return weight * torch.where(norms > threshold, 1 - threshold / norms, 0)


def _directions(weight: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, weight / norms, 0)


def axes(dim: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The dimensions that are meant, each once, counted from the first."""
    dims = (dim,) if isinstance(dim, int) else dim
    for one in dims:
        if not -ndim <= one < ndim:
            raise IndexError(f"dimension {one} of a parameter with {ndim} dimension(s)")
    return tuple(sorted({one % ndim for one in dims}))
