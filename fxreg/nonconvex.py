"""Penalties that shrink large weights less than l1 does: closer to counting weights than to adding them up.

Throughout, w is the parameter (any shape), s the strength, and the objective becomes loss + s·R(w). None of them is
convex, but for `lp` with p ≥ 1 and `smooth_l1`: what a training run finds depends on where it starts.
"""

import torch
from torch import Tensor

from .arguments import Strength
from .decorating import own_strengths, penalty
from .norms import norm


@penalty
def lp(weight: Tensor, *, p: float = 0.5) -> Tensor:
    """Sum of powers, R(w) = Σ|w|^p, the bridge penalty: l1 at p = 1, l2 at p = 2, a count of weights as p → 0.

    Gradient: p·|w|^(p-1)·sign(w), and 0 at 0. For p < 1 it grows without bound towards 0.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight to the power of p.
        p: the exponent, greater than 0.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; an exponent that is not positive.

    >>> import torch, fxreg
    >>> float(fxreg.lp.function(torch.tensor([4.0, -9.0, 0.0]), p=0.5))
    5.0

    Source: Frank and Friedman (1993), "A statistical view of some chemometrics regression tools".
    """
    _check_above(0, p=p)
    size, is_zero = _size(weight)
    return torch.where(is_zero, 0.0, size.pow(p)).sum()


@lp.gradient
def _(weight: Tensor, *, p: float = 0.5) -> Tensor:
    size, _ = _size(weight)
    return p * size.pow(p - 1) * weight.sign()


@penalty
def smooth_l1(weight: Tensor, *, beta: float = 1.0) -> Tensor:
    """Squares near 0 and absolute values beyond, R(w) = Σ w²/(2β) where |w| < β, |w| − β/2 elsewhere (Huber's, over β).

    Gradient: max(-1, min(1, w/β)), continuous everywhere.

    Proximal operator: w − t·max(-1, min(1, w/(β + t))) with t = lr·s.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        beta: where squares end, greater than 0, in units of the weight.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a β that is not positive.

    >>> import torch, fxreg
    >>> float(fxreg.smooth_l1.function(torch.tensor([3.0, -0.5]), beta=1.0))
    2.625

    Source: Huber (1964), "Robust estimation of a location parameter"; Girshick (2015), "Fast R-CNN".
    """
    _check_above(0, beta=beta)
    size = weight.abs()
    return torch.where(size < beta, weight.square() / (2 * beta), size - beta / 2).sum()


@smooth_l1.gradient
def _(weight: Tensor, *, beta: float = 1.0) -> Tensor:
    return (weight / beta).clamp(-1, 1)


@smooth_l1.proximal
def _(weight: Tensor, step: Tensor, *, beta: float = 1.0) -> Tensor:
    return weight - step * (weight / (beta + step)).clamp(-1, 1)


@penalty
def log_sum(weight: Tensor, *, eps: float = 1e-2) -> Tensor:
    """Sum of logarithms, R(w) = Σ log(1 + |w|/ε): what iteratively reweighted l1 minimizes.

    Gradient: sign(w)/(ε + |w|), 0 at 0.

    Args:
        strength: s ≥ 0, in units of loss.
        eps: ε > 0, in units of the weight: well below the weights that are to stay.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; an ε that is not positive.

    >>> import torch, fxreg
    >>> round(float(fxreg.log_sum.function(torch.tensor([1.0, 0.0]), eps=1.0)), 4)
    0.6931

    Source: Candès, Wakin and Boyd (2008), "Enhancing sparsity by reweighted l1 minimization".
    """
    _check_above(0, eps=eps)
    return (weight.abs() / eps).log1p().sum()


@log_sum.gradient
def _(weight: Tensor, *, eps: float = 1e-2) -> Tensor:
    return weight.sign() / (eps + weight.abs())


@own_strengths
def scad(weight: Tensor, *, strength: Strength, a: float = 3.7) -> Tensor:
    """Smoothly clipped absolute deviation: l1 up to λ, constant beyond a·λ, a parabola between.

    R(w) = Σ λ|w| where |w| ≤ λ, (2aλ|w| − w² − λ²)/(2(a−1)) where λ < |w| ≤ aλ, λ²(a+1)/2 beyond. The strength λ is
    also where the pieces meet.

    Gradient: sign(w)·λ, sign(w)·(aλ − |w|)/(a − 1) and 0 in turn; 0 at 0.

    Proximal operator: sign(w)·max(|w| − lr·λ, 0) where |w| ≤ (1 + lr)·λ, ((a−1)·w − sign(w)·a·lr·λ)/(a − 1 − lr)
    up to a·λ, and w beyond. It is unique for lr < a − 1; for larger ones it jumps between the two minima, and is the
    smaller one where they are equal.

    Args:
        strength: λ ≥ 0, in units of the weight.
        a: greater than 1; the authors' choice is 3.7.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; an a of at most 1.

    >>> import torch, fxreg
    >>> float(fxreg.scad.function(torch.tensor([0.5, 100.0]), strength=torch.tensor(1.0), a=3.0))
    2.5

    Source: Fan and Li (2001), "Variable selection via nonconcave penalized likelihood", eq. 2.7 (the derivative).
    """
    _check_above(1, a=a)
    size = weight.abs()
    parabola = (2 * a * strength * size - size.square() - strength * strength) / (2 * (a - 1))
    beyond = torch.where(size <= a * strength, parabola, strength * strength * (a + 1) / 2)
    return torch.where(size <= strength, strength * size, beyond).sum()


@scad.gradient
def _(weight: Tensor, *, strength: Tensor, a: float = 3.7) -> Tensor:
    size = weight.abs()
    return weight.sign() * torch.minimum(strength, (a * strength - size) / (a - 1)).clamp_min(0)


@scad.proximal
def _(weight: Tensor, step: Tensor, *, strength: Tensor, a: float = 3.7) -> Tensor:
    size = weight.abs()
    soft = (size - step * strength).clamp_min(0)
    between = ((a - 1) * size - a * step * strength) / (a - 1 - step)
    small = torch.where(size <= (1 + step) * strength, soft, torch.minimum(size, between))
    jump = strength * torch.where(step < a + 1, (a + 1 + step) / 2, (step * (a + 1)).sqrt())
    large = torch.where(size <= jump, soft, size)
    return weight.sign() * torch.where(step < a - 1, small, large)


@own_strengths
def mcp(weight: Tensor, *, strength: Strength, gamma: float = 3.0) -> Tensor:
    """Minimax concave penalty: as steep as l1 at 0, ever less steep, and constant beyond γ·λ.

    R(w) = Σ λ|w| − w²/(2γ) where |w| ≤ γλ, γλ²/2 beyond. The strength λ is also where it ends, over γ.

    Gradient: sign(w)·max(0, λ − |w|/γ), 0 at 0.

    Proximal operator: sign(w)·max(|w| − lr·λ, 0)/(1 − lr/γ) where |w| ≤ γ·λ, and w beyond. It is unique for lr < γ;
    for larger ones it is the hard threshold λ·√(γ·lr), and 0 at the jump.

    Args:
        strength: λ ≥ 0, in units of the weight.
        gamma: γ > 0; the smaller, the more concave.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a γ that is not positive.

    >>> import torch, fxreg
    >>> float(fxreg.mcp.function(torch.tensor([1.0, 100.0]), strength=torch.tensor(1.0), gamma=2.0))
    1.75

    Source: Zhang (2010), "Nearly unbiased variable selection under minimax concave penalty".
    """
    _check_above(0, gamma=gamma)
    size = weight.abs()
    inside = strength * size - size.square() / (2 * gamma)
    return torch.where(size <= gamma * strength, inside, gamma * strength * strength / 2).sum()


@mcp.gradient
def _(weight: Tensor, *, strength: Tensor, gamma: float = 3.0) -> Tensor:
    return weight.sign() * (strength - weight.abs() / gamma).clamp_min(0)


@mcp.proximal
def _(weight: Tensor, step: Tensor, *, strength: Tensor, gamma: float = 3.0) -> Tensor:
    size = weight.abs()
    firm = torch.minimum(size, (size - step * strength).clamp_min(0) / (1 - step / gamma))
    hard = torch.where(size <= strength * (gamma * step).sqrt(), 0, size)
    return weight.sign() * torch.where(step < gamma, firm, hard)


@penalty
def hoyer(weight: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Ratio of norms, R(w) = ‖w‖₁ / (‖w‖₂ + ε): from 1, for one weight that is not 0, to √n, for n equal ones.

    It says nothing about the weights' size, so that it sparsifies without shrinking.

    Gradient: sign(w)/(‖w‖₂ + ε) − ‖w‖₁·w / (‖w‖₂·(‖w‖₂ + ε)²); 0 where w is 0, and all of it where all are.

    Args:
        strength: s ≥ 0, in units of loss.
        eps: ε > 0, in units of the weight.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; an ε that is not positive.

    >>> import torch, fxreg
    >>> round(float(fxreg.hoyer.function(torch.tensor([2.0, -2.0, 2.0, 2.0]))), 4)
    2.0

    Source: Hoyer (2004), "Non-negative matrix factorization with sparseness constraints".
    """
    _check_above(0, eps=eps)
    return weight.abs().sum() / (norm(weight) + eps)


@hoyer.gradient
def _(weight: Tensor, *, eps: float = 1e-8) -> Tensor:
    length = norm(weight)
    direction = torch.where(length > 0, weight / length, 0.0)
    return (weight.sign() - direction * (weight.abs().sum() / (length + eps))) / (length + eps)


@penalty
def entropy(weight: Tensor) -> Tensor:
    """Entropy of how the sum of absolute values is divided, R(w) = −Σ q log q with q = |w|/Σ|w|, in nats.

    From 0, for one weight that is not 0, to log n, for n equal ones; the weights' size does not matter.

    Gradient: −sign(w)·(log q + R)/Σ|w|; 0 where w is 0, and all of it where all are. It grows without bound towards 0.

    Args:
        strength: s ≥ 0, in units of loss.

    Raises:
        RuleError: a strength that is negative, infinite or NaN.

    >>> import torch, fxreg
    >>> round(float(fxreg.entropy.function(torch.tensor([1.0, -1.0, 0.0]))), 4)
    0.6931

    Source: Shannon (1948), "A mathematical theory of communication", theorem 2, of the shares |w|/Σ|w|.
    """
    share, log, _ = _shares(weight)
    return -(share * log).sum()


@entropy.gradient
def _(weight: Tensor) -> Tensor:
    share, log, total = _shares(weight)
    return -weight.sign() * (log - (share * log).sum()) / total


def _size(weight: Tensor) -> tuple[Tensor, Tensor]:
    """|w| with 1 in place of 0, and where that is: a power of 0 has no finite derivative."""
    is_zero = weight == 0
    return torch.where(is_zero, 1.0, weight.abs()), is_zero


def _shares(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|w|/Σ|w|, its logarithm, 0 for a share of 0, and Σ|w|, with 1 in place of a sum of 0."""
    total = weight.abs().sum()
    total = torch.where(total > 0, total, 1.0)
    share = weight.abs() / total
    return share, torch.where(share > 0, share, 1.0).log(), total


def _check_above(bound: int, **arguments: float) -> None:
    for name, value in arguments.items():
        if not value > bound:
            raise ValueError(f"{name} must be greater than {bound}")
