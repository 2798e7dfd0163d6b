"""Gradient transforms as Optax and timm write them, in NumPy and in their own layouts: Optax's arrays are (in, out) or
(height, width, in, out); timm's are torch's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxreg

Array = np.ndarray[Any, np.dtype[np.float64]]


class Dot(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def ours(effect: Any, grad: Array, weight: Array, via: Any = None) -> Array:
    """What becomes of a gradient, in torch's layout."""
    model = Dot(torch.tensor(weight))
    fxreg.transform(model, fxreg.Rule(effect, via=via))(torch.tensor(grad)).backward()
    assert model.weight.grad is not None
    return model.weight.grad.numpy()


def to_torch(array: Array) -> Array:
    """Optax's layout to torch's: outputs first, then inputs, then places."""
    order = {2: (1, 0), 4: (3, 2, 0, 1)}.get(array.ndim)
    return array if order is None else np.ascontiguousarray(array.transpose(order))


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


SHAPES = [(), (5,), (3, 4), (3, 3, 2, 4)]


def norm(x: Array) -> float:
    return float(np.sqrt((x**2).sum()))


def _clip_by_block_rms(g: Array, w: Array, threshold: float = 0.7) -> Array:
    return g / max(1.0, float(np.sqrt((g**2).mean())) / threshold)


def _normalize(g: Array, w: Array, scale: float = 0.3) -> Array:
    return g * scale / (norm(g) + 1e-6)


def _trust_ratio(g: Array, w: Array, coefficient: float = 0.3, eps: float = 1e-2) -> Array:
    ratio = coefficient * norm(w) / (norm(g) + eps)
    return g * (1.0 if norm(w) == 0 or norm(g) == 0 else ratio)


ELEMENTWISE_OR_WHOLE: dict[str, tuple[Any, Any, Callable[[Array, Array], Array]]] = {
    "add_decayed_weights": (fxreg.l2(0.15), "gradient", lambda g, w: g + 0.3 * w),
    "clip": (fxreg.clip_value(0.4), None, lambda g, w: np.clip(g, -0.4, 0.4)),
    "clip_by_block_rms": (fxreg.clip_block_rms(0.7), None, _clip_by_block_rms),
    "normalize": (fxreg.normalize(0.3), None, _normalize),
    "scale_by_trust_ratio": (fxreg.trust_ratio(0.3, eps=1e-2), None, _trust_ratio),
    "zero_nans": (fxreg.zero_nans(), None, lambda g, w: np.where(np.isnan(g), 0, g)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ELEMENTWISE_OR_WHOLE)
def test_what_knows_no_layout_is_optaxs(name: str, shape: tuple[int, ...]) -> None:
    effect, via, theirs = ELEMENTWISE_OR_WHOLE[name]
    zeros = np.zeros(shape)
    for grad, weight in ((numbers(*shape), numbers(*shape, seed=1)), (numbers(*shape), zeros), (zeros, zeros + 1)):
        found = ours(effect, to_torch(grad), to_torch(weight), via)
        np.testing.assert_allclose(found, to_torch(theirs(grad, weight)), rtol=1e-12, atol=1e-15)


def test_zero_nans_is_optaxs_where_there_are_some() -> None:
    grad, wanted = np.array([[np.nan, 1.0], [np.inf, -np.inf]]), np.array([[0.0, 1.0], [np.inf, -np.inf]])
    np.testing.assert_array_equal(ours(fxreg.zero_nans(), grad, wanted), wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_clip_norm_of_one_parameter_is_optaxs_but_for_torchs_epsilon(shape: tuple[int, ...]) -> None:
    grad = 10 * numbers(*shape)
    for limit in (0.5, 2 * norm(grad)):
        theirs = grad if norm(grad) < limit else grad / norm(grad) * limit
        np.testing.assert_allclose(ours(fxreg.clip_norm(limit), grad, grad), theirs, rtol=1.01e-6 / norm(grad), atol=0)


# By units, which are each output's weights.


def _optax_unit_norms(x: Array) -> Array:
    """Over all but the last dimension, (in, out) or (height, width, in, out); a vector is one unit."""
    axes = None if x.ndim < 2 else tuple(range(x.ndim - 1))
    return np.sqrt((x**2).sum(axis=axes, keepdims=True))


def _timm_unit_norms(x: Array) -> Array:
    axes = None if x.ndim < 2 else tuple(range(1, x.ndim))
    return np.sqrt((x**2).sum(axis=axes, keepdims=True))


def _adaptive_clip(g: Array, w: Array, norms: Callable[[Array], Array], clipping: float, eps: float) -> Array:
    limits = clipping * np.maximum(norms(w), eps)
    return np.where(norms(g) < limits, g, g * (limits / np.maximum(norms(g), 1e-6)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clipping", [0.01, 1.0, 100.0])
def test_adaptive_clip_is_optaxs_in_torchs_layout_and_timms_as_it_is(shape: tuple[int, ...], clipping: float) -> None:
    grad, weight = numbers(*shape), numbers(*shape, seed=1)
    if grad.ndim > 1:
        weight[..., 0] = 0  # one output: its limit is that of eps
        grad[..., 1] *= 1e-8
    theirs = to_torch(_adaptive_clip(grad, weight, _optax_unit_norms, clipping, 1e-3))
    found = ours(fxreg.adaptive_clip(clipping), to_torch(grad), to_torch(weight))
    np.testing.assert_allclose(found, theirs, rtol=1e-12, atol=1e-18)
    timms = _adaptive_clip(to_torch(grad), to_torch(weight), _timm_unit_norms, clipping, 1e-3)
    np.testing.assert_allclose(found, timms, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centralize_is_optaxs_formula_in_torchs_layout_and_not_in_optaxs(shape: tuple[int, ...]) -> None:
    """Both subtract the mean over all dimensions but the first, which is the outputs in torch, and not in Optax."""

    def optaxs(g: Array) -> Array:
        return g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 else g

    grad = numbers(*shape)
    found = ours(fxreg.centralize(), to_torch(grad), to_torch(grad))
    np.testing.assert_allclose(found, optaxs(to_torch(grad)), rtol=1e-12, atol=1e-15)
    assert (grad.ndim > 1) == (np.abs(found - to_torch(optaxs(grad))).max() > 1e-3)


@pytest.mark.parametrize("gamma", [0.0, 0.55, 2.0])
def test_the_variance_of_noise_is_optaxs(gamma: float) -> None:
    """η/tᵞ with t from 1, over three steps; tests/test_effects.py has its distribution."""
    model = Dot(torch.zeros(100_000, dtype=torch.float64))
    gm = fxreg.transform(model, fxreg.Rule(fxreg.add_noise(0.04, gamma=gamma)))
    for t in (1, 2, 3):
        model.weight.grad = None
        gm(torch.zeros(100_000, dtype=torch.float64)).backward()
        assert model.weight.grad is not None
        variance = float(model.weight.grad.square().mean())
        assert variance == pytest.approx(0.04 / t**gamma, rel=5 * (2 / 100_000) ** 0.5)
