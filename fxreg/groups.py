"""Penalties on groups of weights: of a filter, a channel, a head, a row; all of one group goes, or none.

Throughout, w is the parameter (any shape), w_g a group of its elements, s the strength, and the objective becomes
loss + s·R(w). A group is one index along `dim`, or one tuple of indices along several dimensions; with `size` it is
that many indices in a row, or a block of so many by so many.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .arguments import Strength
from .decorating import own_strengths, penalty
from .norms import norm

Numbers: TypeAlias = int | tuple[int, ...]


@penalty
def group_lasso(weight: Tensor, *, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    """Sum of the 2-norms of groups, R(w) = Σ_g ‖w_g‖₂: one group per index along `dim`, no √size factor.

    With `size`, that many indices in a row are one group: `size=64` makes groups of heads of 64 rows, and `dim=(0, 1),
    size=4` one of each 4×4 block of a matrix.

    Gradient: w_g / ‖w_g‖₂ in each group; 0 in a group of exact zeros.

    Proximal operator: w_g·max(0, 1 − t/‖w_g‖₂) with t = lr·s; exactly 0 in a group whose norm is at most t.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        dim: the dimension, or dimensions, whose indices name the groups: `dim=0` makes a group of each output
            channel of a Linear or Conv weight, `dim=1` of each input channel.
        size: how many indices in a row, at least 1, are one group: a number for all of `dim`, or one for each of them,
            in their order. Every dimension is a multiple of its own.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import torch, fxreg
    >>> float(fxreg.group_lasso.function(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), dim=0))
    5.0
    >>> float(fxreg.group_lasso.function(torch.tensor([[3.0], [4.0], [5.0], [12.0]]), dim=0, size=2))
    18.0

    Source: Yuan and Lin (2006), "Model selection and estimation in regression with grouped variables", eq. 2.1.
    """
    return group_norms(weight, dim, size).sum()


@group_lasso.gradient
def _(weight: Tensor, *, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    return by_norm(weight, dim, size, _directions)


@group_lasso.proximal
def _(weight: Tensor, step: Tensor, *, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    return _shrunk(weight, step, dim, size)


@own_strengths
def sparse_group_lasso(weight: Tensor, *, l1: Strength, group: Strength, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    """Zeros in groups, and whole groups of zeros: l1·Σ|w| + group·Σ_g ‖w_g‖₂, no √size factor.

    Gradient: l1·sign(w) + group·w_g/‖w_g‖₂; 0 in a group of exact zeros. Its two strengths are `label.l1` and
    `label.group` in `fxreg.strengths`.

    Proximal operator: l1's soft threshold lr·l1, then group_lasso's, lr·group.

    Args:
        l1: the strength of Σ|w|, at least 0.
        group: the strength of Σ_g ‖w_g‖₂, at least 0.
        dim: as in `group_lasso`.
        size: as in `group_lasso`.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a dimension the weight does not have, or that is no
            multiple of its size.

    >>> import fxreg
    >>> fxreg.sparse_group_lasso(l1=1e-4, group=1e-3, dim=1)
    sparse_group_lasso(l1=0.0001, group=0.001, dim=1, size=1)

    Source: Simon, Friedman, Hastie and Tibshirani (2013), "A sparse-group lasso".
    """
    return l1 * weight.abs().sum() + group * group_norms(weight, dim, size).sum()


@sparse_group_lasso.gradient
def _(weight: Tensor, *, l1: Tensor, group: Tensor, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    return l1 * weight.sign() + group * by_norm(weight, dim, size, _directions)


@sparse_group_lasso.proximal
def _(weight: Tensor, step: Tensor, *, l1: Tensor, group: Tensor, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    return _shrunk(weight.sign() * (weight.abs() - step * l1).clamp_min(0), step * group, dim, size)


@penalty
def max_norm(weight: Tensor, *, limit: float, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    """A hinge on the 2-norms of groups, R(w) = Σ_g max(0, ‖w_g‖₂ − limit): groups below the limit are free.

    Gradient: w_g / ‖w_g‖₂ in each group above the limit, 0 in the others and at the limit.

    Proximal operator: in each group above the limit w_g·max(limit, ‖w_g‖₂ − t)/‖w_g‖₂, with t = lr·s.

    Args:
        strength: s ≥ 0, in units of loss per unit of weight.
        limit: at least 0, in units of the weight.
        dim: as in `group_lasso`; `dim=0` is a limit for each unit of a layer.
        size: as in `group_lasso`.

    Raises:
        RuleError: a strength that is negative, infinite or NaN; a negative limit; a dimension the weight does not
            have, or that is no multiple of its size.

    >>> import torch, fxreg
    >>> float(fxreg.max_norm.function(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), limit=2.0))
    3.0

    Source: Srebro, Rennie and Jaakkola (2005), "Maximum-margin matrix factorization", as a penalty.
    """
    norms = group_norms(weight, dim, size)
    return torch.where(norms > limit, norms - limit, 0).sum()


@max_norm.check
def _(limit: float, dim: Numbers, size: Numbers) -> None:
    if limit < 0:
        raise ValueError("limit must be at least 0")
    check_groups(dim, size)


@max_norm.gradient
def _(weight: Tensor, *, limit: float, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    return by_norm(weight, dim, size, lambda w, norms: torch.where(norms > limit, _directions(w, norms), 0))


@max_norm.proximal
def _(weight: Tensor, step: Tensor, *, limit: float, dim: Numbers = 0, size: Numbers = 1) -> Tensor:
    def nearer(w: Tensor, norms: Tensor) -> Tensor:
        return w * torch.where(norms > limit, (norms - step).clamp_min(limit) / norms, 1)

    return by_norm(weight, dim, size, nearer)


def check_groups(dim: Numbers, size: Numbers) -> None:
    """Raise ValueError for sizes that no groups have, whatever the weight."""
    dims, sizes = _several(dim), _several(size)
    if any(step < 1 for step in sizes):
        raise ValueError("size must be at least 1")
    if len(sizes) not in (1, len(dims)) or (not dims and sizes not in ((), (1,))):
        named = len(dims) or "none"
        raise ValueError(f"size has {len(sizes)} number(s) and dim names {named}; give one for all, or one for each")


group_lasso.check(check_groups)
sparse_group_lasso.check(check_groups)


def by_norm(weight: Tensor, dim: Numbers, size: Numbers, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a formula makes of the weight and of the 2-norms of its groups, which broadcast against it."""
    tiles, groups = tiled(weight, dim, size)
    return formula(tiles, group_norms(tiles, groups)).reshape(weight.shape)


def group_norms(weight: Tensor, dim: Numbers, size: Numbers = 1) -> Tensor:
    """The 2-norm of every group, in as many dimensions as `tiled` has; of size 1, broadcastable against the weight."""
    tiles, groups = tiled(weight, dim, size)
    reduced = tuple(d for d in range(tiles.ndim) if d not in groups)
    return norm(tiles, reduced) if reduced else tiles.abs()


def tiled(weight: Tensor, dim: Numbers, size: Numbers) -> tuple[Tensor, tuple[int, ...]]:
    """The weight with each of `dim` split in two, groups and what is inside of one; and the dimensions of groups."""
    steps = _steps(dim, size, weight.ndim)
    if all(step == 1 for step in steps.values()):
        return weight, tuple(steps)
    shape: list[int] = []
    groups: list[int] = []
    for axis, count in enumerate(weight.shape):
        if axis not in steps:
            shape.append(count)
            continue
        if count % steps[axis]:
            raise ValueError(f"dimension {axis} has {count} elements, not a multiple of size {steps[axis]}")
        groups.append(len(shape))
        shape += [count // steps[axis], steps[axis]]
    return _gathered(weight, steps).reshape(shape), tuple(groups)


def _gathered(weight: Tensor, steps: dict[int, int]) -> Tensor:
    """A sharded weight whose shards end at ends of groups: gathered along dimensions where they would not."""
    sharded: Any = weight
    if not hasattr(weight, "device_mesh"):
        return weight
    from torch.distributed.tensor import Replicate  # takes a second to import

    placements = list(sharded.placements)
    for axis, step in steps.items():
        across = [i for i, placement in enumerate(placements) if placement.is_shard(axis)]
        if weight.shape[axis] // step % math.prod([sharded.device_mesh.size(i) for i in across]):
            for i in across:
                placements[i] = Replicate()
    found: Tensor = sharded if placements == list(sharded.placements) else sharded.redistribute(placements=placements)
    return found


def axes(dim: Numbers, ndim: int) -> tuple[int, ...]:
    """The dimensions that are meant, each once, counted from the first."""
    return tuple(_steps(dim, 1, ndim))


def _steps(dim: Numbers, size: Numbers, ndim: int) -> dict[int, int]:
    """How many indices are one group along each dimension that is meant, counted from the first."""
    dims, sizes = _several(dim), _several(size)
    found: dict[int, int] = {}
    for one, step in zip(dims, sizes if len(sizes) == len(dims) else sizes * len(dims), strict=True):
        if not -ndim <= one < ndim:
            raise IndexError(f"dimension {one} of a parameter with {ndim} dimension(s)")
        if found.setdefault(one % ndim, step) != step:
            raise ValueError(f"dimension {one % ndim} is there twice, with sizes {found[one % ndim]} and {step}")
    return dict(sorted(found.items()))


def _several(numbers: Numbers) -> tuple[int, ...]:
    return (numbers,) if isinstance(numbers, int) else numbers


def _shrunk(weight: Tensor, threshold: Tensor, dim: Numbers, size: Numbers) -> Tensor:
    """w_g·max(0, 1 − threshold/‖w_g‖₂)."""

    def shrink(w: Tensor, norms: Tensor) -> Tensor:
        return w * torch.where(norms > threshold, 1 - threshold / norms, 0)

    return by_norm(weight, dim, size, shrink)


def _directions(weight: Tensor, norms: Tensor) -> Tensor:
    return torch.where(norms > 0, weight / norms, 0)
