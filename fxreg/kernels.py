"""Penalties on how a weight varies from one place to the next: of kernels, embeddings over positions, filters in time.

Throughout, w is the parameter, s the strength, and the objective becomes loss + s·R(w).
"""

import torch
from torch import Tensor

from .decorating import penalty
from .groups import axes


@penalty
def total_variation(weight: Tensor, *, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    """Sum of absolute differences between neighbours, R(w) = Σ_d Σ_i |w_{i+1} − w_i| along each dimension d.

    Anisotropic: each dimension counts by itself. It makes kernels piecewise constant.

    Gradient: sign of the difference to the one before, less that to the one behind; 0 for equal neighbours.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        dim: the dimensions along which neighbours are compared: the last two, of a 2-d kernel, unless it is said.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dimension the weight does not have.

    >>> import torch, fxreg
    >>> float(fxreg.total_variation.function(torch.tensor([1.0, 1.0, 4.0, 2.0]), dim=(0,)))
    5.0

    Source: Rudin, Osher and Fatemi (1992), "Nonlinear total variation based noise removal algorithms".
    """
    total = weight.new_zeros(())
    for d in axes(dim, weight.ndim):
        total = total + weight.diff(dim=d).abs().sum()
    return total


@total_variation.gradient
def _(weight: Tensor, *, dim: int | tuple[int, ...] = (-2, -1)) -> Tensor:
    total = torch.zeros_like(weight)
    for d in axes(dim, weight.ndim):
        if weight.shape[d]:
            none = torch.zeros_like(weight.narrow(d, 0, 1))
            total = total - torch.cat([none, weight.diff(dim=d).sign(), none], d).diff(dim=d)
    return total
