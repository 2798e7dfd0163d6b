"""Penalties on a weight as a matrix W: a row for each index along its first dimension, everything else in the columns.

Throughout, s is the strength, and the objective becomes loss + s·R(W). Linear and Conv weights have a row per output.
"""

import torch
from torch import Tensor

from .decorating import penalty
from .norms import norm

_EPSILON = 1e-7  # Keras's


@penalty
def nuclear_norm(weight: Tensor) -> Tensor:
    """Sum of the singular values, R(W) = Σ σ_i: lasso on the rank.

    Gradient: U·Vᵀ of the singular vectors whose values are not 0, up to rounding; 0 for a matrix of zeros. It takes a
    singular value decomposition in every step, which waits for a GPU.

    Proximal operator: U·diag(max(σ − t, 0))·Vᵀ with t = lr·s, which lowers the rank exactly.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a parameter with fewer than two dimensions.

    >>> import torch, fxreg
    >>> round(float(fxreg.nuclear_norm.function(torch.diag(torch.tensor([3.0, -4.0])))), 4)
    7.0

    Source: Fazel (2002), "Matrix rank minimization with applications".
    """
    values: Tensor = torch.linalg.svdvals(_matrix(weight))
    return torch.where(_are_nonzero(values, weight), values, 0).sum()


@nuclear_norm.gradient
def _(weight: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(_matrix(weight), full_matrices=False)
    polar: Tensor = (left * _are_nonzero(values, weight)) @ right
    return polar.reshape(weight.shape)


@nuclear_norm.proximal
def _(weight: Tensor, step: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(_matrix(weight), full_matrices=False)
    shrunk: Tensor = (left * (values - step).clamp_min(0)) @ right
    return shrunk.reshape(weight.shape)


@penalty
def spectral(weight: Tensor, *, iterations: int = 20) -> Tensor:
    """Square of the largest singular value, R(W) = σ₁², by power iteration: how far the layer can stretch its input.

    As in `l2` there is no ½, which the paper has: s is its λ/2. The iteration starts anew in every step, from a vector
    that is always the same, so that the value depends on the weight alone; it is never above σ₁². After the default 20
    iterations, σ₁ came out 1 to 2% too small on average, and 7% at most, for matrices without a gap below σ₁ (random
    ones of 64×64 to 1024×4096, and new layers), and exact to 1e-10 where the next singular value is 0.7·σ₁. A step
    takes 2·iterations products of the matrix and a vector.

    Gradient: 2σ₁·u·vᵀ, with the singular vectors u and v as they are found; where σ₁ is there several times, one of its
    subgradients; 0 for a matrix of zeros.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight squared.
        iterations: how many there are, at least 1. Second derivatives are right where they converge.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; no iterations; a parameter with fewer than two
            dimensions.

    >>> import torch, fxreg
    >>> round(float(fxreg.spectral.function(torch.diag(torch.tensor([1.0, -4.0])))), 4)
    16.0

    Source: Yoshida and Miyato (2017), "Spectral norm regularization for improving the generalizability of deep
    learning", eq. 3 and algorithm 1.
    """
    matrix = _matrix(weight)
    slope = _spectral_slope(matrix, iterations)
    here, found = matrix.detach(), slope.detach()
    # The first derivative is that of fixed singular vectors, the slope; the second one sees them turn.
    return (found * here).sum() / 2 + ((matrix - here) * (found + slope) / 2).sum()


@spectral.gradient
def _(weight: Tensor, *, iterations: int = 20) -> Tensor:
    return _spectral_slope(_matrix(weight), iterations).reshape(weight.shape)


@penalty
def orthogonal(weight: Tensor, *, mode: str = "rows") -> Tensor:
    """Mean of the absolute cosines between rows, R(W) = Σ_{i<j} |cos(w_i, w_j)| / (N(N−1)/2), or between columns.

    Keras's `OrthogonalRegularizer`; 0 for a single row, where Keras has NaN. Norms below 1e-7 count as 1e-7.

    Gradient: by automatic differentiation; a cosine of 0 has 0.

    Args:
        strength: s ≥ 0, in units of loss.
        mode: "rows" or "columns".

    Raises:
        RuleError: a strength that is negative, infinite or NaN; another mode; a parameter with fewer than two
            dimensions.

    >>> import torch, fxreg
    >>> float(fxreg.orthogonal.function(torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])))
    0.3333333432674408

    Source: Brock et al. (2017), "Neural photo editing with introspective adversarial networks", as in
    Keras 3.
    """
    if mode not in ("rows", "columns"):
        raise ValueError(f"mode must be 'rows' or 'columns', not {mode!r}")
    matrix = _matrix(weight)
    rows = matrix if mode == "rows" else matrix.mT
    unit = rows / norm(rows, (1,)).clamp_min(_EPSILON)
    pairs = (unit @ unit.mT).triu(1).abs().sum()
    count = len(rows)
    return pairs / max(count * (count - 1) // 2, 1)


@penalty
def soft_orthogonal(weight: Tensor) -> Tensor:
    """Distance of the rows' inner products from the identity's, R(W) = ‖W·Wᵀ − I‖²_F: rows orthogonal, and of norm 1.

    More rows than columns cannot all be; such a weight is taken with its columns, R(W) = ‖Wᵀ·W − I‖²_F.

    Gradient: 4·(W·Wᵀ − I)·W, or 4·W·(Wᵀ·W − I).

    Args:
        strength: s ≥ 0, in units of loss per unit of weight to the fourth.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a parameter with fewer than two dimensions.

    >>> import torch, fxreg
    >>> float(fxreg.soft_orthogonal.function(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])))
    9.0

    Source: Bansal, Chen and Wang (2018), "Can we gain more from orthogonality regularizations".
    """
    return _gram_error(_wide(weight)).square().sum()


@soft_orthogonal.gradient
def _(weight: Tensor) -> Tensor:
    wide = _wide(weight)
    slope = 4 * _gram_error(wide) @ wide
    return (slope if len(slope) == len(weight) else slope.mT).reshape(weight.shape)


def _spectral_slope(matrix: Tensor, iterations: int) -> Tensor:
    """2·W·v·vᵀ, of the right singular vector v of the largest singular value."""
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    scaled = matrix
    if matrix.numel():  # without overflow, whatever the size of the numbers
        largest = matrix.detach().abs().amax()
        scaled = matrix / torch.where(largest > 0, largest, 1)
    index = matrix.new_ones(matrix.shape[1], dtype=torch.int64).cumsum(0)  # beside a sharded matrix, too
    right = 1 + torch.cos((index * index % 6283).to(matrix.dtype) / 1000)  # orthogonal to nothing that weights are like
    for _ in range(iterations):
        right = scaled.mT @ (scaled @ right)
        right = right / torch.linalg.vector_norm(right).clamp_min(torch.finfo(right.dtype).tiny)
    return 2 * torch.outer(matrix @ right, right)


def _matrix(weight: Tensor) -> Tensor:
    if weight.ndim < 2:
        raise ValueError(f"a matrix has two dimensions or more, and this parameter {weight.ndim}")
    return weight.flatten(1)


def _wide(weight: Tensor) -> Tensor:
    """The matrix, or its transpose if that is the wider one."""
    matrix = _matrix(weight)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _gram_error(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def _are_nonzero(values: Tensor, weight: Tensor) -> Tensor:
    """Which singular values, the largest first, are not 0 but for rounding."""
    return values > values[:1] * max(_matrix(weight).shape) * torch.finfo(values.dtype).eps
