"""Every built-in effect against its formula, written out here in NumPy's float64, in value and in gradient."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fxreg

thoroughly = settings(max_examples=60, deadline=None, derandomize=True)
Array = np.ndarray[Any, np.dtype[np.float64]]


class Dot(nn.Module):
    """⟨w, x⟩: the loss's gradient of w is the input."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def emitted(weight: Tensor, *effects: Any, emit: Any = "backward", **keys: Any) -> tuple[Dot, torch.fx.GraphModule]:
    model = Dot(weight)
    return model, fxreg.transform(model, [fxreg.Rule(effect, **keys) for effect in effects], emit=emit)


def penalty_of(effect: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The value that `emit="output"` returns, and autograd's gradient of it."""
    model, gm = emitted(weight, effect, emit="output")
    value = gm(torch.zeros_like(weight))[1]
    (gradient,) = torch.autograd.grad(value, model.weight)
    return value.detach(), gradient


def gradient_of(weight: Tensor, grad: Tensor, *effects: Any, **keys: Any) -> Tensor:
    """What a backward pass leaves in `.grad`, where the loss alone leaves `grad`."""
    model, gm = emitted(weight, *effects, **keys)
    gm(grad).backward()
    assert model.weight.grad is not None
    return model.weight.grad


# Penalties.


def group_lasso(w: Array, dims: tuple[int, ...]) -> tuple[float, Array]:
    """One group per index along `dims`, by loops."""
    kept = sorted({dim % w.ndim for dim in dims}) if w.ndim else []
    value, gradient = 0.0, np.zeros_like(w)
    for index in itertools.product(*(range(w.shape[dim]) for dim in kept)):
        group: list[Any] = [slice(None)] * w.ndim
        for dim, i in zip(kept, index, strict=True):
            group[dim] = i
        norm = math.sqrt(float((w[tuple(group)] ** 2).sum()))
        value += norm
        if norm > 0:
            gradient[tuple(group)] = w[tuple(group)] / norm
    return value, gradient


@dataclass(frozen=True)
class Penalty:
    """A penalty by its factory, and s·R(w) with its gradient by hand.

    Attributes:
        least: the rank it needs.
        loose: by how much its float32 is worse than that of a sum.
    """

    make: Callable[[float], Any]
    by_hand: Callable[[float, Array], tuple[float, Array]]
    least: int = 0
    loose: float = 1

    @property
    def lowerings(self) -> list[dict[str, Any]]:
        vias = self.make(1.0).definition.vias
        return [keys for keys in LOWERINGS.values() if keys.get("via", "penalty") in vias]


def _each(value: Callable[[float, float], float], slope: Callable[[float, float], float]) -> Any:
    """A penalty that is a sum over elements, from its value and slope for |w| > 0; both are 0 at 0."""

    def by_hand(s: float, w: Array) -> tuple[float, Array]:
        sizes = [abs(float(x)) for x in w.reshape(-1)]
        slopes = [slope(s, x) if x else 0.0 for x in sizes]
        return math.fsum(value(s, x) for x in sizes if x), np.sign(w) * np.asarray(slopes).reshape(w.shape)

    return by_hand


def _scad(s: float, x: float, a: float = 3.7) -> tuple[float, float]:
    if x <= s:
        return s * x, s
    if x <= a * s:
        return (2 * a * s * x - x * x - s * s) / (2 * (a - 1)), (a * s - x) / (a - 1)
    return s * s * (a + 1) / 2, 0.0


def _mcp(s: float, x: float, gamma: float = 3.0) -> tuple[float, float]:
    return (s * x - x * x / (2 * gamma), s - x / gamma) if x <= gamma * s else (gamma * s * s / 2, 0.0)


def _huber(s: float, x: float, beta: float = 0.7) -> tuple[float, float]:
    return (s * x * x / (2 * beta), s * x / beta) if x < beta else (s * (x - beta / 2), s)


def _hoyer(s: float, w: Array) -> tuple[float, Array]:
    total, norm = float(np.abs(w).sum()), math.sqrt(float((w * w).sum()))
    if norm == 0:
        return 0.0, np.zeros_like(w)
    down = norm + 1e-8
    return s * total / down, s * (np.sign(w) / down - total * w / (norm * down * down))


def _entropy(s: float, w: Array) -> tuple[float, Array]:
    total = float(np.abs(w).sum())
    if total == 0:
        return 0.0, np.zeros_like(w)
    shares = [abs(float(x)) / total for x in w.reshape(-1)]
    value = -math.fsum(q * math.log(q) for q in shares if q)
    slopes = [-(math.log(q) + value) / total if q else 0.0 for q in shares]
    return s * value, s * np.sign(w) * np.asarray(slopes).reshape(w.shape)


def _above(s: float, w: Array, limit: float = 0.8) -> tuple[float, Array]:
    value, gradient = 0.0, np.zeros_like(w)
    for i, row in enumerate(w):
        norm = math.sqrt(float((row**2).sum()))
        if norm > limit:
            value += norm - limit
            gradient[i] = row / norm
    return s * value, s * gradient


def _nuclear(s: float, w: Array) -> tuple[float, Array]:
    """By NumPy's decomposition; the gradient is the polar factor's."""
    left, values, right = np.linalg.svd(w.reshape(len(w), math.prod(w.shape[1:])), full_matrices=False)
    kept = [i for i, value in enumerate(values) if value > 1e-9 * values[0]]
    return s * math.fsum(values), s * (left[:, kept] @ right[kept]).reshape(w.shape)


def _cosines(by_columns: bool) -> Callable[[float, Array], tuple[float, Array]]:
    def by_hand(s: float, w: Array) -> tuple[float, Array]:
        matrix = w.reshape(len(w), math.prod(w.shape[1:]))
        rows = matrix.T if by_columns else matrix
        norms = [max(math.sqrt(float((row**2).sum())), 1e-7) for row in rows]
        pairs = list(itertools.combinations(range(len(rows)), 2))
        value, gradient = 0.0, np.zeros_like(rows)
        for i, j in pairs:
            cosine = float(rows[i] @ rows[j]) / (norms[i] * norms[j])
            value += abs(cosine) / len(pairs)
            for one, other in ((i, j), (j, i)):
                slope = rows[other] / norms[other] - cosine * rows[one] / norms[one]
                gradient[one] += np.sign(cosine) * slope / norms[one] / len(pairs)
        return s * value, s * (gradient.T if by_columns else gradient).reshape(w.shape)

    return by_hand


def _gram(s: float, w: Array) -> tuple[float, Array]:
    matrix = w.reshape(len(w), math.prod(w.shape[1:]))
    if matrix.shape[0] <= matrix.shape[1]:
        error = matrix @ matrix.T - np.eye(len(matrix))
        slope = 4 * error @ matrix
    else:
        error = matrix.T @ matrix - np.eye(matrix.shape[1])
        slope = 4 * matrix @ error
    return s * float((error**2).sum()), s * slope.reshape(w.shape)


def _variation(*dims: int) -> Callable[[float, Array], tuple[float, Array]]:
    def by_hand(s: float, w: Array) -> tuple[float, Array]:
        value, gradient = 0.0, np.zeros_like(w)
        for dim in dims:
            lines, slopes = np.moveaxis(w, dim, 0), np.moveaxis(gradient, dim, 0)
            for i in range(len(lines) - 1):
                value += float(np.abs(lines[i + 1] - lines[i]).sum())
                slopes[i + 1] += np.sign(lines[i + 1] - lines[i])
                slopes[i] -= np.sign(lines[i + 1] - lines[i])
        return s * value, s * gradient

    return by_hand


def _grouped(*dims: int) -> Callable[[float, Array], tuple[float, Array]]:
    def by_hand(s: float, w: Array) -> tuple[float, Array]:
        value, gradient = group_lasso(w, dims)
        return s * value, s * gradient

    return by_hand


PENALTIES = {
    "l1": Penalty(fxreg.l1, lambda s, w: (s * float(np.abs(w).sum()), s * np.sign(w))),
    "l2": Penalty(fxreg.l2, lambda s, w: (s * float((w * w).sum()), 2 * s * w)),
    "elastic_net": Penalty(
        lambda s: fxreg.elastic_net(s, s / 3),
        lambda s, w: (s * float(np.abs(w).sum() + (w * w).sum() / 3), s * np.sign(w) + 2 * s * w / 3),
    ),
    "group_lasso": Penalty(fxreg.group_lasso, _grouped(0), least=1),
    "group_lasso, last": Penalty(lambda s: fxreg.group_lasso(s, dim=-1), _grouped(-1), least=1),
    "group_lasso, 1": Penalty(lambda s: fxreg.group_lasso(s, dim=1), _grouped(1), least=2),
    "group_lasso, 0 and -1": Penalty(lambda s: fxreg.group_lasso(s, dim=(0, -1)), _grouped(0, -1), least=1),
    "group_lasso, one dimension twice": Penalty(lambda s: fxreg.group_lasso(s, dim=(-2, 0)), _grouped(-2, 0), least=2),
    "group_lasso, none": Penalty(lambda s: fxreg.group_lasso(s, dim=()), _grouped()),
    "sparse_group_lasso": Penalty(
        lambda s: fxreg.sparse_group_lasso(l1=s / 3, group=s),
        lambda s, w: (
            s * float(np.abs(w).sum() / 3 + group_lasso(w, (0,))[0]),
            s * (np.sign(w) / 3 + group_lasso(w, (0,))[1]),
        ),
        least=1,
    ),
    "max_norm": Penalty(lambda s: fxreg.max_norm(s, limit=0.8), _above, least=1),
    "lp, half": Penalty(fxreg.lp, _each(lambda s, x: s * math.sqrt(x), lambda s, x: s / 2 / math.sqrt(x))),
    "lp, 1.5": Penalty(
        lambda s: fxreg.lp(s, p=1.5), _each(lambda s, x: s * x * math.sqrt(x), lambda s, x: 1.5 * s * math.sqrt(x))
    ),
    "smooth_l1": Penalty(
        lambda s: fxreg.smooth_l1(s, beta=0.7), _each(lambda s, x: _huber(s, x)[0], lambda s, x: _huber(s, x)[1])
    ),
    "log_sum": Penalty(
        lambda s: fxreg.log_sum(s, eps=0.1), _each(lambda s, x: s * math.log1p(x / 0.1), lambda s, x: s / (0.1 + x))
    ),
    "scad": Penalty(fxreg.scad, _each(lambda s, x: _scad(s, x)[0], lambda s, x: _scad(s, x)[1])),
    "mcp": Penalty(fxreg.mcp, _each(lambda s, x: _mcp(s, x)[0], lambda s, x: _mcp(s, x)[1])),
    "hoyer": Penalty(fxreg.hoyer, _hoyer, loose=10),
    "entropy": Penalty(fxreg.entropy, _entropy, loose=10),
    "nuclear_norm": Penalty(fxreg.nuclear_norm, _nuclear, least=2, loose=1e3),
    "orthogonal": Penalty(fxreg.orthogonal, _cosines(by_columns=False), least=2, loose=10),
    "orthogonal, columns": Penalty(
        lambda s: fxreg.orthogonal(s, mode="columns"), _cosines(by_columns=True), least=2, loose=10
    ),
    "soft_orthogonal": Penalty(fxreg.soft_orthogonal, _gram, least=2, loose=10),
    "total_variation": Penalty(fxreg.total_variation, _variation(-2, -1), least=2),
    "total_variation, rows": Penalty(lambda s: fxreg.total_variation(s, dim=0), _variation(0), least=1),
}
LOWERINGS: dict[str, dict[str, Any]] = {
    "attached": {}, "pulled": {"via": "gradient"},
}  # fmt: skip


def weights(*shape: int, seed: int = 0, zeros: bool = True) -> Tensor:
    """Normal float64 numbers, with exact zeros among them and a first row of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    if zeros and weight.ndim and weight.numel():
        weight[0] = 0
        weight.view(-1)[-1:] = 0
    return weight


SHAPES = [(), (0,), (5,), (3, 0), (1, 1), (3, 4), (2, 3, 4), (3, 2, 3, 3)]


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_penaltys_value_and_gradients_are_the_formulas(name: str, shape: tuple[int, ...]) -> None:
    case = PENALTIES[name]
    if len(shape) < case.least:
        return
    weight = weights(*shape, seed=3)
    expected, slope = case.by_hand(0.37, weight.numpy())
    value, gradient = penalty_of(case.make(0.37), weight)
    assert value.shape == ()
    close = {"rtol": 1e-13 * case.loose, "atol": 1e-15 * case.loose}
    assert float(value) == pytest.approx(expected, rel=close["rtol"], abs=close["atol"])
    torch.testing.assert_close(gradient, torch.from_numpy(np.asarray(slope)), **close)
    for keys in case.lowerings:
        found = gradient_of(weight, torch.zeros_like(weight), case.make(0.37), **keys)
        torch.testing.assert_close(found, torch.from_numpy(np.asarray(slope)), **close)


@thoroughly
@given(
    name=st.sampled_from(sorted(PENALTIES)),
    shape=st.lists(st.integers(0, 4), min_size=2, max_size=4).map(tuple),
    seed=st.integers(0, 1000),
    strength=st.floats(0, 10),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.slow
def test_closed_forms_are_the_derivatives_on_random_shapes(
    name: str, shape: tuple[int, ...], seed: int, strength: float, dtype: torch.dtype
) -> None:
    case = PENALTIES[name]
    weight = weights(*shape, seed=seed).to(dtype)
    effect = case.make(strength)
    grad = torch.ones_like(weight)
    _, slope = case.by_hand(strength, weight.double().numpy())
    expected = torch.from_numpy(np.asarray(slope)) + 1
    tolerance = case.loose * (1e-5 if dtype == torch.float32 else 1e-12)
    for keys in case.lowerings:
        found = gradient_of(weight, grad, effect, **keys)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(penalty_of(effect, weight)[1].double() + 1, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_at_zero_the_value_and_every_gradient_are_zero(name: str, zero: float) -> None:
    for shape in ((3, 4), (1, 1), (2, 2, 2)):
        weight = torch.full(shape, zero)
        value, gradient = penalty_of(PENALTIES[name].make(0.5), weight)
        assert float(value) == (0.5 * min(len(weight), weight[0].numel()) if name == "soft_orthogonal" else 0)
        assert not gradient.any()
        for keys in PENALTIES[name].lowerings:
            assert not gradient_of(weight, torch.zeros(shape), PENALTIES[name].make(0.5), **keys).any()


def _with_values(shape: tuple[int, ...], *values: float) -> Tensor:
    """A weight whose matrix has these singular values."""
    matrix = weights(*shape, seed=2, zeros=False).reshape(shape[0], -1)
    left, old, right = torch.linalg.svd(matrix, full_matrices=False)
    new = torch.zeros_like(old)
    new[: len(values)] = torch.tensor(values)
    return (left * new @ right).reshape(shape)


@pytest.mark.parametrize("shape", [(5, 4), (4, 40), (3, 2, 3, 3), (1, 6), (6, 1)], ids=str)
def test_spectral_is_the_largest_singular_value_squared_and_its_gradient_that_of_its_vectors(shape: Any) -> None:
    weight = _with_values(shape, 3.0, *([1.5, 1.4] if min(shape[0], weights(*shape)[0].numel()) > 2 else []))
    left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    slope = 2 * 0.37 * values[0] * torch.outer(left[:, 0], right[0]).reshape(shape)
    value, gradient = penalty_of(fxreg.spectral(0.37), weight)
    assert float(value) == pytest.approx(0.37 * float(torch.linalg.matrix_norm(weight.flatten(1), 2)) ** 2, rel=1e-9)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-9)
    for keys in LOWERINGS.values():
        found = gradient_of(weight, torch.zeros_like(weight), fxreg.spectral(0.37), **keys)
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3, 3), (300, 50), (512, 512)], ids=str)
def test_spectral_of_random_weights_is_at_most_a_little_too_small(shape: Any) -> None:
    """Which are the worst: there is no gap below the largest singular value."""
    for seed in range(5):
        weight = weights(*shape, seed=seed, zeros=False)
        ratio = float(fxreg.spectral.function(weight)) / float(torch.linalg.matrix_norm(weight.flatten(1), 2)) ** 2
        assert 0.93**2 < ratio < 1 + 1e-12
        assert fxreg.spectral.function(weight, iterations=100) > fxreg.spectral.function(weight) > 0


def test_spectral_has_a_subgradient_where_the_largest_singular_value_is_there_twice() -> None:
    weight = _with_values((6, 5), 2.0, 2.0, 1.0)
    gradient = gradient_of(weight, torch.zeros_like(weight), fxreg.spectral(1.0))
    values = torch.linalg.svdvals(gradient)
    assert values[0] == pytest.approx(4.0)
    assert values[1] < 1e-12
    assert float((gradient * weight).sum()) == pytest.approx(2 * 2.0**2)


def test_spectral_of_zeros_is_zero_and_so_is_its_gradient() -> None:
    for shape in ((3, 4), (1, 1), (2, 2, 2), (0, 3), (3, 0)):
        value, gradient = penalty_of(fxreg.spectral(0.5), torch.zeros(shape))
        assert float(value) == 0
        assert not gradient.any()


def test_spectral_needs_an_iteration_and_a_matrix() -> None:
    with pytest.raises(fxreg.RuleError, match="iterations must be at least 1, not 0"):
        fxreg.explain(nn.Linear(3, 2), fxreg.Rule(fxreg.spectral(1.0, iterations=0), param="weight"))
    with pytest.raises(fxreg.RuleError, match=r"'bias'.*two dimensions"):
        fxreg.explain(nn.Linear(3, 2), fxreg.Rule(fxreg.spectral(1.0), param="bias"))


def test_a_group_of_exact_zeros_stays_among_others_that_do_not() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, -4.0], [0.0, 2.0]])
    expected = torch.tensor([[0.0, 0.0], [0.6, -0.8], [0.0, 1.0]])
    value, gradient = penalty_of(fxreg.group_lasso(1.0), weight)
    assert float(value) == 7
    torch.testing.assert_close(gradient, expected)
    for keys in LOWERINGS.values():
        torch.testing.assert_close(gradient_of(weight, torch.zeros(3, 2), fxreg.group_lasso(1.0), **keys), expected)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_gradients_stay_finite_at_the_ends_of_float32(name: str, size: float) -> None:
    weight = size * torch.tensor([[1.0, -1.0], [0.5, 0.25]])
    expected = PENALTIES[name].by_hand(1.0, weight.double().numpy())[1]
    least = 1e-16 if name.startswith("orthogonal") else 0.0  # a cosine of 1e-46 is no float32
    for keys in PENALTIES[name].lowerings:
        found = gradient_of(weight, torch.zeros(2, 2), PENALTIES[name].make(1.0), **keys)
        torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=least)


@pytest.mark.parametrize(("dim", "wrong"), [(2, 2), (-3, -3), ((0, 5), 5), (10**30, 10**30)], ids=str)
def test_a_dimension_out_of_range_is_a_rule_error_at_match(dim: Any, wrong: int) -> None:
    try:
        effect = fxreg.group_lasso(0.1, dim=dim)
    except fxreg.RuleError:
        assert abs(wrong) > 2**63  # an operator has no such number: refused even earlier
        return
    with pytest.raises(fxreg.RuleError) as caught:
        fxreg.explain(Dot(torch.ones(2, 3)), fxreg.Rule(effect, label="rows"))
    for part in ("'rows'", "'weight'", "(2, 3)", str(wrong)):
        assert part in str(caught.value)


def test_l2_is_the_coupled_weight_decay_of_twice_its_strength() -> None:
    start = weights(4, 3).float()
    moved = []
    for rules, decay in (([fxreg.Rule(fxreg.l2(0.03))], 0.0), ([], 0.06)):
        model = Dot(start)
        gm = fxreg.transform(model, rules)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=decay)
        for _ in range(5):
            optimizer.zero_grad()
            gm(torch.ones(4, 3)).backward()
            optimizer.step()
        moved.append(model.weight.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-6, atol=1e-7)


# Numerics: 16 bits, autocast, strengths.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PENALTIES)
def test_16_bit_parameters_accumulate_in_float32(name: str, dtype: torch.dtype) -> None:
    """Σw² is 1.6e8 here, past float16, and Σ|w| takes more than bfloat16's 8 bits."""
    weight = torch.full((40, 100), 200.0).to(dtype)
    weight[1] = -37.0
    weight[2] = 0
    expected, slope = PENALTIES[name].by_hand(0.01, weight.double().numpy())
    value, gradient = penalty_of(PENALTIES[name].make(0.01), weight)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(expected, rel=1e-5)
    wanted = torch.from_numpy(slope).to(dtype)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, wanted, rtol=precision, atol=1e-7)
    for keys in PENALTIES[name].lowerings:
        found = gradient_of(weight, torch.zeros_like(weight), PENALTIES[name].make(0.01), **keys)
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=precision, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_16_bit_gradient_is_clipped_by_a_norm_taken_in_float32(dtype: torch.dtype) -> None:
    grad = torch.full((64, 64), 300.0).to(dtype)  # its norm's square is past float16
    found = gradient_of(torch.zeros_like(grad), grad, fxreg.clip_norm(1.0))
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.full_like(grad, 1 / 64), rtol=torch.finfo(dtype).eps, atol=0)


@fxreg.penalty
def effects_gram(weight: Tensor) -> Tensor:
    """‖WWᵀ − I‖²: a matrix product, which autocast would run in bfloat16."""
    return (weight @ weight.mT - torch.eye(len(weight), device=weight.device)).square().sum()


@pytest.mark.parametrize("effect", [effects_gram(0.3), *(case.make(0.3) for case in PENALTIES.values())], ids=repr)
def test_under_autocast_penalties_are_computed_in_float32(effect: Any) -> None:
    weight = weights(6, 5).float()
    found = []
    for enabled in (False, True):
        model, gm = emitted(weight, effect, emit="output")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = gm(torch.zeros(6, 5))[1]
        value.backward()
        found.append((value.detach(), model.weight.grad))
        model, gm = emitted(weight, effect)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = gm(torch.zeros(6, 5))
        loss.backward()
        found[-1] += (model.weight.grad,)
    for without, within in zip(*found, strict=True):
        assert within.dtype == torch.float32
        assert torch.equal(without, within)


@pytest.mark.parametrize("effect", [fxreg.clip_norm(0.1), fxreg.centralize(), fxreg.scale(1 / 3)], ids=repr)
def test_under_autocast_transforms_are_computed_in_float32(effect: Any) -> None:
    grad = weights(6, 5, seed=1).float()
    expected = gradient_of(torch.zeros(6, 5), grad, effect)
    model, gm = emitted(torch.zeros(6, 5), effect)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gm(grad).backward()
    assert torch.equal(model.weight.grad, expected)


def test_a_strength_is_kept_in_float64() -> None:
    _, gm = emitted(torch.ones(1, dtype=torch.float64), fxreg.l1(1e-4))
    assert float(fxreg.strengths(gm)["l1"]) == 1e-4
    assert float(fxreg.penalties(gm)["l1"]) == 1e-4
    gm.half()
    assert float(fxreg.strengths(gm)["l1"]) == 1e-4


# Transforms.

finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return draw(st.sampled_from([0.0, 1e-5, 1.0, 1e4])) * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Transform:
    """A transform by its factory, and by hand."""

    make: Callable[[float], Any]
    by_hand: Callable[[float, Array], Array]


def _centralize(g: Array) -> Array:
    return g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 and g.size else g


def _units(g: Array, to: Callable[[Array, Array], Array]) -> Array:
    """By output unit, with weights of 1; a vector is one unit."""
    if g.ndim < 2:
        return to(g, np.ones_like(g))
    return np.asarray([to(row, np.ones_like(row)) for row in g]).reshape(g.shape)


def _norm(x: Array) -> float:
    return math.sqrt(float((x * x).sum()))


def _adaptive(s: float, g: Array) -> Array:
    def clip(row: Array, w: Array) -> Array:
        limit = s * max(_norm(w), 1e-3)
        return row * (limit / max(_norm(row), 1e-6)) if _norm(row) > limit else row

    return _units(g, clip)


def _trust(s: float, g: Array) -> Array:
    return g * (s * math.sqrt(g.size) / _norm(g)) if _norm(g) > 0 else g


def _tangent(g: Array) -> Array:
    """To weights of 1: what is left has no sum."""
    return g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 and g.size else g


TRANSFORMS = {
    "clip_block_rms": Transform(
        fxreg.clip_block_rms, lambda s, g: g * min(1.0, s * math.sqrt(g.size) / _norm(g)) if _norm(g) else g
    ),
    "adaptive_clip": Transform(fxreg.adaptive_clip, _adaptive),
    "normalize": Transform(fxreg.normalize, lambda s, g: g * s / (_norm(g) + 1e-6)),
    "trust_ratio": Transform(fxreg.trust_ratio, _trust),
    "tangent": Transform(lambda s: fxreg.tangent(), lambda s, g: _tangent(g)),
    "clip_value": Transform(fxreg.clip_value, lambda s, g: np.clip(g, -s, s)),
    "clip_norm": Transform(fxreg.clip_norm, lambda s, g: g * min(1.0, s / (math.sqrt((g * g).sum()) + 1e-6))),
    "scale": Transform(fxreg.scale, lambda s, g: s * g),
    "centralize": Transform(lambda s: fxreg.centralize(), lambda s, g: _centralize(g)),
    "zero_nans": Transform(lambda s: fxreg.zero_nans(), lambda s, g: g),
    "mask": Transform(lambda s: fxreg.mask(torch.tensor(s)), lambda s, g: g * (s != 0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@settings(thoroughly, max_examples=40)
@given(grad=gradients(), strength=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0]))
@pytest.mark.slow
def test_transforms_are_their_formulas_on_random_gradients(name: str, grad: Tensor, strength: float) -> None:
    weight = torch.ones_like(grad)
    expected = torch.from_numpy(np.asarray(TRANSFORMS[name].by_hand(strength, grad.numpy())))
    found = gradient_of(weight, grad, TRANSFORMS[name].make(strength))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_tangent_leaves_the_norms_of_units_and_nothing_along_them() -> None:
    weight, grad = weights(4, 5, seed=1), weights(4, 5, seed=2, zeros=False)
    found = gradient_of(weight, grad, fxreg.tangent())
    assert torch.equal(found[0], grad[0])  # a unit of zeros has no direction
    torch.testing.assert_close((found * weight).sum(1)[1:], torch.zeros(3, dtype=torch.float64), atol=1e-14, rtol=0)
    along = (grad - found)[1:] / weight[1:]
    mean = along.nanmean(1, keepdim=True)
    torch.testing.assert_close(torch.where(weight[1:] != 0, along, mean), mean.expand(3, 5))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (5,), ()], ids=str)
def test_trust_ratio_and_adaptive_clip_are_shares_of_the_weights_norms(shape: tuple[int, ...]) -> None:
    weight, grad = weights(*shape, seed=1, zeros=False), weights(*shape, seed=2, zeros=False)
    found = gradient_of(weight, grad, fxreg.trust_ratio(0.1))
    torch.testing.assert_close(found, grad * (0.1 * weight.norm() / grad.norm()))
    found = gradient_of(weight, grad, fxreg.adaptive_clip(0.1))
    dims = tuple(range(1, len(shape))) if len(shape) > 1 else tuple(range(len(shape)))
    limits = 0.1 * weight.square().sum(dims, keepdim=True).sqrt()
    norms = grad.square().sum(dims, keepdim=True).sqrt()
    torch.testing.assert_close(found, grad * (limits / norms).clamp(max=1.0))


def test_clip_norm_is_torchs_for_a_list_of_one() -> None:
    for size in (0.01, 1.0, 100.0):
        weight = torch.zeros(5, 7, requires_grad=True)
        weight.grad = grad = size * weights(5, 7, seed=2).float()
        found = gradient_of(torch.zeros(5, 7), grad.clone(), fxreg.clip_norm(1.0))
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        torch.testing.assert_close(found, weight.grad)


def test_clip_norm_leaves_a_short_gradient_bitwise_and_a_zero_one_zero() -> None:
    grad = 0.01 * weights(5, 7).float()
    assert torch.equal(gradient_of(torch.zeros(5, 7), grad, fxreg.clip_norm(1.0)), grad)
    assert torch.equal(gradient_of(torch.zeros(3), torch.zeros(3), fxreg.clip_norm(1.0)), torch.zeros(3))
    assert torch.equal(gradient_of(torch.zeros(3), torch.zeros(3), fxreg.clip_norm(0.0)), torch.zeros(3))


AT_THE_KNEE = {
    "clip_value": (fxreg.clip_value(0.8), lambda g: g.abs().amax(1, keepdim=True) / 0.8),
    "clip_norm": (fxreg.clip_norm(2.0), lambda g: g.norm() / 2),
    "clip_global_norm": (fxreg.clip_global_norm(2.0), lambda g: g.norm() / 2),
    "clip_block_rms": (fxreg.clip_block_rms(2.0), lambda g: g.square().mean().sqrt() / 2),
    "adaptive_clip": (fxreg.adaptive_clip(0.5), lambda g: g.norm(dim=1, keepdim=True) / (0.5 * 7**0.5)),
}


@pytest.mark.parametrize("name", AT_THE_KNEE)
def test_where_a_clip_begins_it_changes_nothing_yet(name: str) -> None:
    """At the threshold and just below; just above it, it takes only what is too much. torch's epsilon is 1e-6."""
    effect, ratio = AT_THE_KNEE[name]
    weight, grad = torch.ones(5, 7, dtype=torch.float64), weights(5, 7, seed=2, zeros=False)
    at = grad / ratio(grad)
    for factor in (0.5, 1 - 1e-9, 1.0, 1 + 1e-9):
        found = gradient_of(weight, factor * at, effect)
        torch.testing.assert_close(found, min(factor, 1.0) * at, rtol=1e-6, atol=0)
    above = gradient_of(weight, 2 * at, effect)
    torch.testing.assert_close(ratio(above), torch.ones_like(ratio(above)), rtol=1e-6, atol=0)


def test_clip_value_bounds_infinities_and_keeps_nan() -> None:
    grad = torch.tensor([math.nan, math.inf, -math.inf, 0.5, -3.0, 0.0])
    found = gradient_of(torch.zeros(6), grad, fxreg.clip_value(2.0))
    assert found[0].isnan()
    assert torch.equal(found[1:], torch.tensor([2.0, -2.0, 0.5, -2.0, 0.0]))


def test_zero_nans_keeps_infinities() -> None:
    grad = torch.tensor([math.nan, math.inf, -math.inf, -1.5, 0.0])
    found = gradient_of(torch.zeros(5), grad, fxreg.zero_nans())
    assert torch.equal(found, torch.tensor([0.0, math.inf, -math.inf, -1.5, 0.0]))


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True, False, True], [False, False, True]]), torch.tensor([[1.0, 0.0, -2.0], [0.0, -0.0, 1e-30]]),
        torch.tensor([True, False, True]), torch.tensor([[0], [7]]), torch.tensor(0), torch.tensor(True),
        torch.ones(1, 1, dtype=torch.int8), torch.tensor([[0.5, 0.0, 0.0]], dtype=torch.float16),
        torch.tensor([1e-300, 0.0, 1.0], dtype=torch.float64),
    ],
    ids=lambda mask: f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}",
)  # fmt: skip
def test_mask_keeps_the_gradient_where_it_is_not_zero(mask: Tensor) -> None:
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, 6.0]])
    expected = np.where(np.broadcast_to(mask.numpy() != 0, (2, 3)), grad.numpy(), 0)
    found = gradient_of(torch.zeros(2, 3), grad, fxreg.mask(mask))
    assert torch.equal(found.nan_to_num(7), torch.from_numpy(expected).nan_to_num(7))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2, 3), (2, 3, 1), (0,)], ids=str)
def test_a_mask_that_does_not_broadcast_to_the_weight_is_refused_at_match(shape: tuple[int, ...]) -> None:
    with pytest.raises(fxreg.RuleError, match=r"'weight'.*\(2, 3\)"):
        fxreg.explain(Dot(torch.ones(2, 3)), fxreg.Rule(fxreg.mask(torch.ones(shape))))


@pytest.mark.parametrize("ndim", range(5))
def test_centralize_subtracts_the_mean_over_all_but_the_first_dimension(ndim: int) -> None:
    grad = weights(*range(2, 2 + ndim), seed=4, zeros=False)
    found = gradient_of(torch.zeros_like(grad), grad, fxreg.centralize())
    expected = grad.numpy().copy()
    if ndim > 1:
        for row in expected:
            row -= row.sum() / row.size
    torch.testing.assert_close(found, torch.from_numpy(expected))


def test_freeze_leaves_no_gradient_so_that_no_optimizer_moves_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    gm = fxreg.transform(model, fxreg.Rule(fxreg.freeze(), name="0"))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        gm(torch.ones(2, 3)).sum().backward()
        assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
        optimizer.step()
    same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False]
    assert all(p.requires_grad for p in model.parameters())


# Noise.

MANY = 200_000
SIGMAS = 5.0


class Dots(nn.Module):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(MANY, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((p * x).sum() for p in self.parameters())  # type: ignore[return-value]


def noise(*names: str, eta: float = 1.0, steps: int = 1, **keys: Any) -> list[dict[str, Array]]:
    """The noise alone, by step and parameter."""
    model = Dots(names)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.add_noise(eta, **keys)))
    found = []
    for _ in range(steps):
        drawn = torch.autograd.grad(gm(torch.zeros(MANY, dtype=torch.float64)), list(model.parameters()))
        found.append({name: g.numpy() for name, g in zip(names, drawn, strict=True)})
    return found


def assert_standard_normal(z: Array) -> None:
    """Its moments, and its distribution function (Kolmogorov–Smirnov), within five standard errors."""
    n = z.size
    assert abs(z.mean()) < SIGMAS / math.sqrt(n)
    assert abs((z**2).mean() - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs((z**3).mean()) < SIGMAS * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < SIGMAS * math.sqrt(96 / n)
    distribution = torch.special.ndtr(torch.from_numpy(np.sort(z))).numpy()
    assert np.abs(distribution - (np.arange(n) + 0.5) / n).max() < 2.2 / math.sqrt(n)


def assert_uncorrelated(first: Array, second: Array) -> None:
    bound = SIGMAS / math.sqrt(first.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < bound


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62])
def test_the_noise_is_normal(seed: int) -> None:
    (drawn,) = noise("w", seed=seed)
    assert_standard_normal(drawn["w"])


@pytest.mark.parametrize("gamma", [0.0, 0.55, 2.0])
def test_its_variance_is_eta_over_t_to_the_gamma_with_t_from_one(gamma: float) -> None:
    for t, drawn in enumerate(noise("w", eta=0.04, gamma=gamma, steps=3), start=1):
        assert_standard_normal(drawn["w"] / math.sqrt(0.04 / t**gamma))


def test_it_is_independent_between_elements_parameters_steps_and_seeds() -> None:
    first, second = noise("v", "w", steps=2)
    (other,) = noise("w", seed=1)
    assert_uncorrelated(first["v"], first["w"])
    assert_uncorrelated(first["w"], second["w"])
    assert_uncorrelated(first["v"], second["w"])
    assert_uncorrelated(first["w"], other["w"])
    for lag in (1, 2, 3, 64, 1024):
        assert_uncorrelated(first["w"][lag:], first["w"][:-lag])


def test_it_is_reproducible_from_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    first = noise("v", "w", steps=3, seed=5)
    torch.manual_seed(2)
    again = noise("v", "w", steps=3, seed=5)
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    (fresh,) = noise("w", seed=5)
    assert np.array_equal(fresh["w"], first[0]["w"]), "it does not depend on the parameters beside it"


def test_it_leaves_the_global_generators_alone() -> None:
    model, gm = emitted(torch.zeros(10), fxreg.add_noise(1.0))
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    gm(torch.zeros(10)).backward()
    assert model.weight.grad.any()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_it_is_added_to_the_gradient() -> None:
    weight, grad = torch.zeros(4, 5), weights(4, 5).float()
    alone = gradient_of(weight, torch.zeros(4, 5), fxreg.add_noise(0.5))
    torch.testing.assert_close(gradient_of(weight, grad, fxreg.add_noise(0.5)), grad + alone)
    assert torch.equal(gradient_of(weight, grad, fxreg.add_noise(0.0)), grad)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_it_has_the_shape_and_dtype_of_any_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = gradient_of(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), fxreg.add_noise(1.0))
    assert (found.shape, found.dtype) == (shape, dtype)
    assert found.isfinite().all()
    assert found.unique().numel() >= 0.9 * found.numel()  # float16 has few numbers


# Transforms together, and with penalties.


def test_transforms_act_in_rule_order() -> None:
    grad = torch.tensor([3.0, 4.0])
    clip, triple = fxreg.clip_norm(1.0), fxreg.scale(3.0)
    torch.testing.assert_close(gradient_of(torch.zeros(2), grad, clip, triple), 3 * grad / 5)
    torch.testing.assert_close(gradient_of(torch.zeros(2), grad, triple, clip), grad / 5)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_any_order_of_three_is_their_composition(order: tuple[int, ...]) -> None:
    grad = weights(3, 4, seed=8)
    effects = (fxreg.clip_value(0.4), fxreg.centralize(), fxreg.clip_norm(0.9))
    by_hand = (TRANSFORMS["clip_value"], TRANSFORMS["centralize"], TRANSFORMS["clip_norm"])
    expected = grad.numpy()
    for k in order:
        expected = by_hand[k].by_hand((0.4, 0.0, 0.9)[k], expected)
    found = gradient_of(torch.ones(3, 4, dtype=torch.float64), grad, *(effects[k] for k in order))
    torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("via", ["penalty", "gradient"])
@pytest.mark.parametrize("first", [True, False])
def test_transforms_see_the_losss_gradient_only(via: Any, first: bool) -> None:
    weight, grad = torch.tensor([2.0, -7.0]), torch.tensor([30.0, 40.0])
    rules = [fxreg.Rule(fxreg.l1(10.0), via=via), fxreg.Rule(fxreg.clip_norm(1.0)), fxreg.Rule(fxreg.scale(2.0))]
    model = Dot(weight)
    gm = fxreg.transform(model, rules if first else [*rules[1:], rules[0]])
    gm(grad).backward()
    torch.testing.assert_close(model.weight.grad, 2 * grad / 50 + 10 * weight.sign())


class Twice(nn.Module):
    """One weight in two layers, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.first(x)) + F.linear(x, self.first.weight))


@pytest.mark.parametrize("effect", [fxreg.clip_norm(0.1), fxreg.clip_value(0.05)], ids=repr)
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_transform_acts_once_on_the_gradient_summed_over_all_uses(effect: Any, name: str) -> None:
    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(4, 3)
    (plain,) = torch.autograd.grad(model(x).square().sum(), model.first.weight)
    gm = fxreg.transform(model, fxreg.Rule(effect, name=name))
    gm(x).square().sum().backward()
    expected = plain.clamp(-0.05, 0.05) if effect.name == "clip_value" else 0.1 * plain / (plain.norm() + 1e-6)
    torch.testing.assert_close(model.first.weight.grad, expected)


@pytest.mark.parametrize("effect", [fxreg.clip_norm(0.1), fxreg.clip_value(0.05), fxreg.scale(2.0)], ids=repr)
def test_each_parameter_is_transformed_by_itself(effect: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    gm = fxreg.transform(model, fxreg.Rule(effect))
    gm(x).square().sum().backward()
    for parameter, g in zip(model.parameters(), plain, strict=True):
        (strength,) = effect.strengths.values()
        expected = TRANSFORMS[effect.name].by_hand(strength, g.double().numpy())
        torch.testing.assert_close(parameter.grad.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-7)


SPARSE = {
    "l1": (fxreg.l1(0.1), "penalty"), "l1, pulled": (fxreg.l1(0.1), "gradient"), "l2": (fxreg.l2(0.1), "penalty"),
    "clip_norm": (fxreg.clip_norm(0.5), "gradient"), "clip_value": (fxreg.clip_value(0.5), "gradient"),
    "scale": (fxreg.scale(0.5), "gradient"), "mask": (fxreg.mask(torch.tensor([1.0, 0.0])), "gradient"),
    "centralize": (fxreg.centralize(), "gradient"), "zero_nans": (fxreg.zero_nans(), "gradient"),
    "add_noise": (fxreg.add_noise(0.1), "gradient"),
}  # fmt: skip


@pytest.mark.parametrize(("effect", "via"), SPARSE.values(), ids=SPARSE)
def test_a_sparse_gradient_is_treated_as_the_dense_one_or_refused(effect: Any, via: Any) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 2, sparse=sparse))
        try:
            gm = fxreg.transform(model, fxreg.Rule(effect, via=via))
        except fxreg.FxregError:
            break
        gm(torch.tensor([1, 2, 1])).sum().backward()
        grad = model[0].weight.grad
        found.append(torch.zeros(5, 2) if grad is None else grad.to_dense())
    assert found, "the dense one is refused"
    torch.testing.assert_close(found[-1], found[0])


def test_noise_is_not_drawn_again_where_a_checkpoint_runs_the_module_again() -> None:
    x = torch.randn(6, 4)

    def gradients(call: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        gm = fxreg.transform(model, fxreg.Rule(fxreg.add_noise(0.5, seed=3), param="weight"))
        found = []
        for _ in range(2):
            model.zero_grad()
            call(gm).sum().backward()
            assert model.weight.grad is not None
            found.append(model.weight.grad.clone())
        return found

    expected = gradients(lambda gm: gm(x))
    found = gradients(lambda gm: checkpoint(gm, x.clone().requires_grad_(), use_reentrant=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(fxreg.FxregError, match="draws random numbers"):
        gradients(lambda gm: checkpoint(gm, x, use_reentrant=False))
