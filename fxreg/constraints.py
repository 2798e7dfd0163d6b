"""Constraints: where a parameter may be, as the projection that puts it back there after each step.

Throughout, w is the parameter (any shape), and w_g a group of its elements. A group is one index along `dim`, as in
`group_lasso`, or `size` of them in a row: of a Linear or Conv weight, `dim=0` makes a group of each output unit, and
`dim=()` one of all of it.
(Keras's `axis` says the opposite, what a group reaches over, and its kernels have their outputs last.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import Strength
from .constraining import constraint
from .groups import Numbers, axes, by_norm, check_groups, tiled


@constraint(foreach=True)
def non_negative(weights: list[Tensor]) -> list[Tensor]:
    """No element below 0, w ← max(w, 0).

    >>> import torch, fxreg
    >>> fxreg.non_negative.function([torch.tensor([-1.0, 2.0])])
    [tensor([0., 2.])]

    Source: Lawson and Hanson (1974), "Solving least squares problems", chapter 23.
    """
    return list(torch._foreach_clamp_min(weights, 0.0))


@constraint(foreach=True)
def box(weights: list[Tensor], *, low: float, high: float) -> list[Tensor]:
    """Every element between two bounds, w ← max(low, min(w, high)).

    Args:
        low: at most `high`, in units of the weight; -inf for none.
        high: at least `low`; inf for none.

    Raises:
        RuleError: bounds between which there is nothing.

    >>> import torch, fxreg
    >>> fxreg.box.function([torch.tensor([-3.0, 0.5, 3.0])], low=-1.0, high=1.0)
    [tensor([-1.0000,  0.5000,  1.0000])]

    Source: Bertsekas (1976), "On the Goldstein–Levitin–Polyak gradient projection method", section 3.
    """
    return list(torch._foreach_clamp_max(torch._foreach_clamp_min(weights, low), high))


@box.check
def _(low: float, high: float) -> None:
    if low > high or low == math.inf or high == -math.inf:
        raise ValueError(f"nothing is at least {low:g} and at most {high:g}")


@constraint
def limit_norm(weight: Tensor, *, limit: Strength, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    """The 2-norm of every group at most the limit, w_g ← w_g·min(1, limit/‖w_g‖₂). Keras's `MaxNorm`.

    Groups within the limit keep every bit; Keras divides all by ‖w_g‖₂ + 1e-7 instead.

    Args:
        limit: at least 0, in units of the weight; live in `fxreg.strengths`.
        dim: the dimension, or dimensions, whose indices name the groups; `()` makes one group of all.
        size: how many indices in a row are one group, as in `group_lasso`.

    Raises:
        RuleError: a limit that is negative, infinite or NaN; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.limit_norm.function(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), limit=torch.tensor(2.0))
    tensor([[1.2000, 1.6000],
            [1.0000, 0.0000]])

    Source: Srebro, Rennie and Jaakkola (2005), "Maximum-margin matrix factorization"; Srivastava et al. (2014),
    "Dropout", section 5.1.
    """
    return _limited(weight, limit, dim, size)


@constraint
def unit_norm(weight: Tensor, *, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    """The 2-norm of every group 1, w_g ← w_g/‖w_g‖₂. Keras's `UnitNorm`.

    A group of zeros has no nearest one of norm 1, and stays.

    Args:
        dim: as in `limit_norm`.
        size: as in `limit_norm`.

    Raises:
        RuleError: a dimension the weight does not have, or that is no multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.unit_norm.function(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])

    Source: Absil, Mahony and Sepulchre (2008), "Optimization algorithms on matrix manifolds", section 4.1.1.
    """
    return _of_norm(weight, dim, size, lambda _: 1.0)


@constraint
def min_max_norm(
    weight: Tensor, *, low: float = 0.0, high: float = 1.0, rate: float = 1.0, dim: Numbers = 0, size: Numbers = 1
) -> Tensor:
    """The 2-norm n of every group between bounds, n ← rate·max(low, min(n, high)) + (1−rate)·n. Keras's `MinMaxNorm`.

    A group of zeros has no direction to grow in, and stays.

    Args:
        low: at least 0 and at most `high`, in units of the weight.
        high: at least `low`.
        rate: from 0 to 1, how much of the way each step takes; below 1 the bounds are reached in the limit only.
        dim: as in `limit_norm`.
        size: as in `limit_norm`.

    Raises:
        RuleError: bounds between which there is no norm, a rate outside 0…1; a dimension the weight does
            not have, or that is no multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.min_max_norm.function(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), low=1.0, high=2.0)
    tensor([[1.2000, 1.6000],
            [0.0000, 1.0000]])

    Source: Chollet et al. (2015), Keras, `constraints.MinMaxNorm`.
    """
    return _of_norm(weight, dim, size, lambda norms: rate * norms.clamp(low, high) + (1 - rate) * norms)


@min_max_norm.check
def _(low: float, high: float, rate: float, dim: Numbers, size: Numbers) -> None:
    if not 0 <= low <= high or low == math.inf:
        raise ValueError(f"no norm is at least {low:g} and at most {high:g}; 0 ≤ low ≤ high must hold")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, not {rate:g}")
    check_groups(dim, size)


@constraint
def simplex(weight: Tensor, *, total: float = 1.0, dim: Numbers = (), size: Numbers = 1) -> Tensor:
    """No element below 0, and the sum of every group the total: w_g ← max(w_g − θ, 0), with the θ that makes it so.

    Args:
        total: greater than 0, in units of the weight.
        dim: as in `limit_norm`; by default all of the parameter is one group.
        size: as in `limit_norm`.

    Raises:
        RuleError: a total that is not positive and finite; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.simplex.function(torch.tensor([0.9, 0.5, -1.0]))
    tensor([0.7000, 0.3000, 0.0000])

    Source: Held, Wolfe and Crowder (1974), "Validation of subgradient optimization"; Duchi et al. (2008), fig. 1.
    """
    return _by_group(weight, dim, size, lambda rows: _on_simplex(rows, total))


@simplex.check
def _(total: float, dim: Numbers, size: Numbers) -> None:
    if not 0 < total < math.inf:
        raise ValueError(f"total must be positive and finite, not {total:g}")
    check_groups(dim, size)


@constraint
def l1_ball(weight: Tensor, *, radius: Strength, dim: Numbers = (), size: Numbers = 1) -> Tensor:
    """The sum of absolute values of every group at most the radius, w_g ← sign(w_g)·max(|w_g| − θ, 0) where it is more.

    Sparse, as `l1` is, with a size that is given instead of a strength.

    Args:
        radius: at least 0, in units of the weight; live in `fxreg.strengths`.
        dim: as in `limit_norm`; by default all of the parameter is one group.
        size: as in `limit_norm`.

    Raises:
        RuleError: a radius that is negative, infinite or NaN; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.l1_ball.function(torch.tensor([1.0, -0.6, 0.1]), radius=torch.tensor(1.0))
    tensor([ 0.7000, -0.3000,  0.0000])

    Source: Duchi, Shalev-Shwartz, Singer and Chandra (2008), "Efficient projections onto the l1-ball", fig. 1.
    """

    def project(rows: Tensor) -> Tensor:
        sizes = rows.abs()
        outside = sizes.sum(1, keepdim=True) > radius
        return torch.where(outside, rows.sign() * _on_simplex(sizes, radius), rows)

    return _by_group(weight, dim, size, project)


@constraint
def l2_ball(weight: Tensor, *, radius: Strength, dim: Numbers = (), size: Numbers = 1) -> Tensor:
    """The 2-norm of every group at most the radius, w_g ← w_g·min(1, radius/‖w_g‖₂): `limit_norm` for all in one group.

    Args:
        radius: at least 0, in units of the weight; live in `fxreg.strengths`.
        dim: as in `limit_norm`; by default all of the parameter is one group.
        size: as in `limit_norm`.

    Raises:
        RuleError: a radius that is negative, infinite or NaN; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import torch, fxreg
    >>> fxreg.l2_ball.function(torch.tensor([3.0, 4.0]), radius=torch.tensor(1.0))
    tensor([0.6000, 0.8000])

    Source: Parikh and Boyd (2014), "Proximal algorithms", section 6.5.1.
    """
    return _limited(weight, radius, dim, size)


@constraint
def n_m_sparsity(weight: Tensor, *, n: int = 2, m: int = 4, dim: int = 1) -> Tensor:
    """Of every m elements in a row along a dimension the n largest in absolute value stay, the others are 0.

    Of equal ones the first stay. The pattern is chosen anew after every step, so what is 0 can come back.

    Args:
        n: from 1 to m.
        m: the size of the dimension is a multiple of it.
        dim: along which the elements are counted: of a Linear or Conv weight 1 is its inputs, which hardware expects.

    Raises:
        RuleError: an n that is not from 1 to m; a dimension the weight does not have, or of another size.

    >>> import torch, fxreg
    >>> fxreg.n_m_sparsity.function(torch.tensor([[0.1, -3.0, 2.0, 0.2]]))
    tensor([[ 0., -3.,  2.,  0.]])

    Source: Mishra et al. (2021), "Accelerating sparse deep neural networks"; Zhou et al. (2021), "Learning N:M
    fine-grained structured sparse neural networks from scratch".
    """
    (dim,) = axes(dim, weight.ndim)
    if weight.shape[dim] % m:
        raise ValueError(f"dimension {dim} has {weight.shape[dim]} elements, not a multiple of {m}")
    last = weight.movedim(dim, -1)
    blocks = last.reshape(*last.shape[:-1], last.shape[-1] // m, m)
    ranks = blocks.abs().argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.where(ranks < n, blocks, 0).reshape(last.shape).movedim(-1, dim)


@n_m_sparsity.check
def _(n: int, m: int, dim: object) -> None:
    if not 1 <= n <= m:
        raise ValueError("1 ≤ n ≤ m must hold")


for _one in (limit_norm, unit_norm, l1_ball, l2_ball):
    _one.check(check_groups)


def _limited(weight: Tensor, limit: Tensor, dim: Numbers, size: Numbers) -> Tensor:
    return by_norm(weight, dim, size, lambda w, norms: torch.where(norms > limit, w * (limit / norms), w))


def _of_norm(weight: Tensor, dim: Numbers, size: Numbers, wanted: Callable[[Tensor], Tensor | float]) -> Tensor:
    """The groups with the norms that are wanted instead of theirs; what has no direction stays."""
    return by_norm(weight, dim, size, lambda w, norms: torch.where(norms > 0, w / norms * wanted(norms), w))


def _by_group(weight: Tensor, dim: Numbers, size: Numbers, project: Callable[[Tensor], Tensor]) -> Tensor:
    """What a projection makes of the groups, given as the rows of a matrix."""
    tiles, kept = tiled(weight, dim, size)
    order = [*kept, *(d for d in range(tiles.ndim) if d not in kept)]
    arranged = tiles.permute(order)
    groups = math.prod([tiles.shape[d] for d in kept])  # a list: Dynamo takes no generator here
    if weight.numel() == 0:
        return weight
    rows = arranged.reshape(groups, weight.numel() // groups)
    moved = project(rows).reshape(arranged.shape).permute([order.index(d) for d in range(tiles.ndim)])
    return moved.reshape(weight.shape)


def _on_simplex(rows: Tensor, total: float | Tensor) -> Tensor:
    """The nearest point of each row among those without an element below 0 whose sum is the total."""
    rows = rows - rows.amax(1, keepdim=True)  # the same nearest point; and sums as exact as can be
    ordered = rows.sort(1, descending=True).values
    excess = ordered.cumsum(1) - total
    count = torch.ones_like(rows).cumsum(1)  # not arange: the rows may be sharded
    positive = (ordered * count > excess).sum(1, keepdim=True).clamp_min(1)
    return (rows - excess.gather(1, positive - 1) / positive).clamp_min(0)
