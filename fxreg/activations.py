"""Penalties that are meant for activations: of units over a batch. Those of elements, such as `l1`, and of groups fit
activations as well.

Throughout, a is one activation, its units lie along `dim`, and everything else is the batch, of n samples.
"""

import torch
from torch import Tensor

from .decorating import penalty

_EPSILON = 2.0**-20  # float32 has this, and 1 minus this


@penalty
def kl_sparsity(activation: Tensor, *, rho: float = 0.05, dim: int = 1) -> Tensor:
    """How far units are from being active a share ρ of the time, R(a) = Σ_j ρ·log(ρ/ρ_j) + (1−ρ)·log((1−ρ)/(1−ρ_j)).

    ρ_j is the mean of unit j over the batch, of activations between 0 and 1, as a sigmoid gives them; others count as
    the nearer end. It is kept between 2⁻²⁰ and 1 − 2⁻²⁰.

    Gradient: ((1−ρ)/(1−ρ_j) − ρ/ρ_j)/n; 0 where a is below 0 or above 1, and of units whose ρ_j is kept.

    Args:
        strength: s ≥ 0, in units of loss per nat.
        rho: ρ, between 0 and 1.
        dim: along which the units lie; 1 for (batch, units) and (batch, channels, …), -1 for (batch, tokens, units).

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a ρ that is not between 0 and 1; a dim out of range.

    >>> import torch, fxreg
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sigmoid(), torch.nn.Linear(8, 4))
    >>> rule = fxreg.Rule(fxreg.kl_sparsity(1e-2, rho=0.1), layer="Sigmoid", on="output")
    >>> gm = fxreg.transform(model, rule, example_inputs=(torch.randn(16, 4),))
    >>> float(fxreg.kl_sparsity.function(torch.full((16, 8), 0.1), rho=0.1)) < 1e-6
    True

    Source: Ng (2011), "Sparse autoencoder", lecture notes CS294A, section 3; Lee, Ekanadham and Ng (2008), "Sparse deep
    belief net model for visual area V2".
    """
    means = _means(activation, rho, dim)
    return (rho * (rho / means).log() + (1 - rho) * ((1 - rho) / (1 - means)).log()).sum()


@kl_sparsity.gradient
def _(activation: Tensor, *, rho: float = 0.05, dim: int = 1) -> Tensor:
    means, samples = _means(activation, rho, dim), _samples(activation, dim)
    raw = _mean(samples.clamp(0, 1))
    slope = ((1 - rho) / (1 - means) - rho / means) / max(len(samples), 1)
    slope = torch.where((raw >= _EPSILON) & (raw <= 1 - _EPSILON), slope, 0)
    moved = activation.movedim(dim, -1)
    return torch.where((moved >= 0) & (moved <= 1), slope, 0).movedim(-1, dim)


@penalty
def decorrelation(activation: Tensor, *, dim: int = 1) -> Tensor:
    """Covariances between units, R(a) = ½·Σ_{i≠j} C_ij² with C_ij = mean of (a_i − mean a_i)·(a_j − mean a_j).

    Gradient: 2/n · (a − mean a)·C, with C's diagonal left out.

    Args:
        strength: s ≥ 0, in units of loss per unit of activation to the fourth.
        dim: along which the units lie, as in `kl_sparsity`.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dim out of range.

    >>> import torch, fxreg
    >>> float(fxreg.decorrelation.function(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])))
    1.0

    Source: Cogswell, Ahmed, Girshick, Zitnick and Batra (2016), "Reducing overfitting in deep networks by decorrelating
    representations", eq. 2.
    """
    centred = _centred(activation, dim)
    if len(centred) < centred.shape[1]:
        squares = centred @ centred.mT / len(centred)  # Σ C_ij² is also that of the inner products of samples
        return (squares.square().sum() - _variances(centred).square().sum()) / 2
    return _covariances(centred).square().sum() / 2


@decorrelation.gradient
def _(activation: Tensor, *, dim: int = 1) -> Tensor:
    centred = _centred(activation, dim)
    if len(centred) < centred.shape[1]:
        along = centred @ centred.mT @ centred / len(centred) - centred * _variances(centred)
    else:
        along = centred @ _covariances(centred)
    moved = activation.movedim(dim, -1)
    return (2 / max(len(centred), 1) * along).reshape(moved.shape).movedim(-1, dim)


@penalty
def variance(activation: Tensor, *, target: float = 1.0, eps: float = 1e-4, dim: int = 1) -> Tensor:
    """A hinge that keeps units from collapsing, R(a) = mean_j max(0, target − √(Var(a_j) + ε)).

    Var is the unbiased variance over the batch; that of a single sample is taken as 0.

    Gradient: by automatic differentiation; 0 for units above the target and at it.

    Args:
        strength: s ≥ 0, in units of loss per unit of activation.
        target: the standard deviation from which on a unit is free.
        eps: ε > 0, in units of activation squared: the gradient stays finite where the variance is 0.
        dim: along which the units lie, as in `kl_sparsity`.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; an ε that is not positive; a dim out of range.

    >>> import torch, fxreg
    >>> float(fxreg.variance.function(torch.tensor([[1.0, 5.0], [1.0, -5.0]]), target=1.01))
    0.5

    Source: Bardes, Ponce and LeCun (2022), "VICReg: variance-invariance-covariance regularization for self-supervised
    learning", eq. 1.
    """
    if not eps > 0:
        raise ValueError("eps must be greater than 0")
    centred = _centred(activation, dim)
    spread = (centred.square().sum(0) / max(len(centred) - 1, 1) + eps).sqrt()
    return (target - spread).clamp_min(0).sum() / max(spread.numel(), 1)


def _samples(activation: Tensor, dim: int) -> Tensor:
    """The activation as (n, units)."""
    if not -activation.ndim <= dim < activation.ndim:
        raise IndexError(f"dimension {dim} of an activation with {activation.ndim} dimension(s)")
    units_last = activation.movedim(dim, -1)
    return units_last.unsqueeze(0).flatten(0, -2)  # reshape(-1, units) does not know how many, of no units


def _means(activation: Tensor, rho: float, dim: int) -> Tensor:
    if not 0 < rho < 1:
        raise ValueError("rho must be between 0 and 1")
    return _mean(_samples(activation, dim).clamp(0, 1)).clamp(_EPSILON, 1 - _EPSILON)


def _mean(samples: Tensor) -> Tensor:
    return samples.sum(0) / max(len(samples), 1)


def _centred(activation: Tensor, dim: int) -> Tensor:
    samples = _samples(activation, dim)
    return samples - _mean(samples)


def _variances(centred: Tensor) -> Tensor:
    return _mean(centred.square())


def _covariances(centred: Tensor) -> Tensor:
    """Those between units, with 0 for the variances."""
    found = centred.mT @ centred / max(len(centred), 1)
    return found - found.diag().diag()
