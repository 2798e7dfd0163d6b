"""Constraints: every projection is allowed, stays there, and is the nearest: by definition, and by other means."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn, optim

import fxreg
from fxreg.constraining import Constraint
from fxreg.effects import registry

from .marks import slow_but
from .test_proximal import Holder, draw_weight, moved, sharded

briefly = settings(max_examples=25, deadline=None, derandomize=True)
Array = np.ndarray


def groups(w: Array, dim: int | None) -> list[Array]:
    """The elements of every group, as vectors."""
    return [w.reshape(-1)] if dim is None else [part.reshape(-1) for part in np.moveaxis(w, dim, 0)]


@dataclass(frozen=True)
class Convex:
    """A convex constraint: how far a group is from allowed, and allowed vectors of n elements."""

    effect: Any
    dim: int | None
    excess: Callable[[Array], float]
    allowed: Callable[[np.random.Generator, int], Array]


def _inside(random: np.random.Generator, n: int, radius: float) -> Array:
    v = random.standard_normal(n)
    return radius * random.uniform() ** 0.1 * v / np.linalg.norm(v)


def _share(random: np.random.Generator, n: int) -> Array:
    return random.dirichlet(np.full(n, 0.3))


CONVEX = {
    "non_negative": Convex(
        fxreg.non_negative(), None, lambda v: float(-v.min()), lambda r, n: np.abs(r.standard_normal(n))
    ),
    "box": Convex(
        fxreg.box(-0.3, 0.5),
        None,
        lambda v: float(np.maximum(-0.3 - v, v - 0.5).max()),
        lambda r, n: r.uniform(-0.3, 0.5, n),
    ),
    "limit_norm": Convex(
        fxreg.limit_norm(0.8), 0, lambda v: float(np.linalg.norm(v) - 0.8), lambda r, n: _inside(r, n, 0.8)
    ),
    "limit_norm, dim=1": Convex(
        fxreg.limit_norm(0.8, dim=1), 1, lambda v: float(np.linalg.norm(v) - 0.8), lambda r, n: _inside(r, n, 0.8)
    ),
    "l2_ball": Convex(
        fxreg.l2_ball(0.8), None, lambda v: float(np.linalg.norm(v) - 0.8), lambda r, n: _inside(r, n, 0.8)
    ),
    "l1_ball": Convex(
        fxreg.l1_ball(0.8),
        None,
        lambda v: float(np.abs(v).sum() - 0.8),
        lambda r, n: 0.8 * _share(r, n) * r.choice([-1, 1], n),
    ),
    "l1_ball, dim=1": Convex(
        fxreg.l1_ball(0.8, dim=1),
        1,
        lambda v: float(np.abs(v).sum() - 0.8),
        lambda r, n: 0.8 * _share(r, n) * r.choice([-1, 1], n),
    ),
    "simplex": Convex(
        fxreg.simplex(), None, lambda v: max(float(-v.min()), abs(float(v.sum()) - 1)), lambda r, n: _share(r, n)
    ),
    "simplex, dim=0": Convex(
        fxreg.simplex(total=2.5, dim=0),
        0,
        lambda v: max(float(-v.min()), abs(float(v.sum()) - 2.5)),
        lambda r, n: 2.5 * _share(r, n),
    ),
}
OTHERS = {
    "unit_norm": fxreg.unit_norm(),
    "min_max_norm": fxreg.min_max_norm(low=0.5, high=0.9),
    "n_m_sparsity": fxreg.n_m_sparsity(),
}
EFFECTS = {name: case.effect for name, case in CONVEX.items()} | OTHERS


def test_every_constraint_is_here() -> None:
    built_in = {
        d.name for d in registry.values() if isinstance(d, Constraint) and d.function.__module__ == "fxreg.constraints"
    }
    assert {effect.name for effect in EFFECTS.values()} == built_in


@pytest.mark.parametrize("name", CONVEX)
@briefly
@given(seed=st.integers(0, 999), size=st.sampled_from([0.05, 1.0, 20.0]))
def test_a_convex_projection_is_allowed_and_the_nearest(name: str, seed: int, size: float) -> None:
    """The nearest point p of a convex set to w is the one in it with ⟨w − p, u − p⟩ ≤ 0 for every u in it."""
    case = CONVEX[name]
    w = draw_weight(seed, (3, 4), size)
    found = moved(case.effect, w).numpy()
    random = np.random.default_rng(seed)
    tolerance = 1e-14 * (1 + size) ** 2
    for p, v in zip(groups(found, case.dim), groups(w.numpy(), case.dim), strict=True):
        assert case.excess(p) <= tolerance
        for _ in range(20):
            u = case.allowed(random, len(p))
            assert case.excess(u) <= 1e-12
            assert (v - p) @ (u - p) <= tolerance


@pytest.mark.parametrize("name", EFFECTS)
@briefly
@given(seed=st.integers(0, 999), size=st.sampled_from([0.05, 1.0, 20.0]), lr=st.sampled_from([1e-3, 10.0]))
@pytest.mark.slow
def test_a_projection_stays_where_it_is_whatever_the_learning_rate(
    name: str, seed: int, size: float, lr: float
) -> None:
    once = moved(EFFECTS[name], draw_weight(seed, size=size), lr)
    torch.testing.assert_close(moved(EFFECTS[name], once, 1.0), once, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", [n for n in CONVEX if "simplex" not in n])
def test_what_is_allowed_keeps_every_bit(name: str) -> None:
    w = 0.01 * draw_weight(0).abs()
    assert torch.equal(moved(EFFECTS[name], w), w)


@pytest.mark.parametrize("name", ["simplex", "l1_ball", "l2_ball", "box"])
def test_a_solver_that_knows_only_the_constraint_finds_the_same_point(name: str) -> None:
    w = draw_weight(3, (5,), 1.5)
    v = w.numpy()
    effect, bounds, constraint = {
        "simplex": (fxreg.simplex(), (0, None), {"type": "eq", "fun": lambda u: u.sum() - 1}),
        # u = a − b with a, b ≥ 0, and Σ(a + b) the norm where one of each pair is 0
        "l1_ball": (fxreg.l1_ball(0.8), (0, None), {"type": "ineq", "fun": lambda u: 0.8 - u.sum()}),
        "l2_ball": (fxreg.l2_ball(0.8), (None, None), {"type": "ineq", "fun": lambda u: 0.64 - u @ u}),
        "box": (fxreg.box(-0.3, 0.5), (-0.3, 0.5), {"type": "ineq", "fun": lambda u: 1.0}),
    }[name]
    split = (lambda u: u[:5] - u[5:]) if name == "l1_ball" else (lambda u: u)
    start = np.full(10 if name == "l1_ball" else 5, 0.1)
    solution = minimize(
        lambda u: 0.5 * ((split(u) - v) ** 2).sum(),
        start,
        method="SLSQP",
        bounds=[bounds] * len(start),
        constraints=[constraint],
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(moved(effect, w).numpy(), split(solution.x), atol=1e-6)


def test_the_sparsest_pattern_is_the_best_of_all() -> None:
    for n, m, dim in ((2, 4, 1), (1, 2, 0), (1, 3, -1), (3, 4, 1)):
        w = draw_weight(n, (6, 12))
        found = moved(fxreg.n_m_sparsity(n, m, dim=dim), w)
        rows, kept = (t if dim else t.T for t in (w, found))
        for row, out in zip(rows.reshape(-1, m), kept.reshape(-1, m), strict=True):
            patterns = [torch.tensor([k in chosen for k in range(m)]) for chosen in itertools.combinations(range(m), n)]
            best = min(patterns, key=lambda pattern, row=row: float((row - row * pattern).square().sum()))
            assert torch.equal(out, row * best)


def test_of_equal_elements_the_first_stay() -> None:
    assert moved(fxreg.n_m_sparsity(), torch.ones(2, 8)).tolist() == [[1, 1, 0, 0] * 2] * 2
    assert moved(fxreg.n_m_sparsity(1, 4, dim=0), -torch.ones(4, 1)).flatten().tolist() == [-1, 0, 0, 0]


def test_n_m_sparsity_counts_along_the_inputs_of_a_convolution() -> None:
    found = moved(fxreg.n_m_sparsity(), draw_weight(0, (3, 8, 3, 3)))
    assert ((found.reshape(3, 2, 4, 3, 3) != 0).sum(2) == 2).all()


# Keras's formulas, for axis=0 of a kernel (in, out); fxreg's weight is (out, in).

EPS = 1e-7
KERNEL = draw_weight(5, (4, 3)).numpy()
NORMS = np.sqrt((KERNEL**2).sum(0, keepdims=True))


@pytest.mark.parametrize(
    ("effect", "wanted"),
    [
        (fxreg.limit_norm(1.5), KERNEL * np.clip(NORMS, 0, 1.5) / (EPS + NORMS)),
        (fxreg.unit_norm(), KERNEL / (EPS + NORMS)),
        (fxreg.min_max_norm(), KERNEL * np.clip(NORMS, 0, 1) / (EPS + NORMS)),
        (
            fxreg.min_max_norm(low=1.0, high=1.5, rate=0.3),
            KERNEL * (0.3 * np.clip(NORMS, 1.0, 1.5) + 0.7 * NORMS) / (EPS + NORMS),
        ),
        (fxreg.non_negative(), np.maximum(KERNEL, 0)),
    ],
    ids=lambda value: repr(value) if not isinstance(value, np.ndarray) else "keras",
)
def test_keras_formulas_but_for_its_epsilon(effect: Any, wanted: Array) -> None:
    found = moved(effect, torch.tensor(KERNEL.T)).numpy()
    assert (np.abs(found - KERNEL.T) > 1e-3).any()
    np.testing.assert_allclose(found, wanted.T, rtol=3 * EPS, atol=0)


# Everything else.


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    w = draw_weight(0, (3, 400), 4.0).to(dtype)
    assert torch.equal(moved(EFFECTS[name], w), moved(EFFECTS[name], w.float()).to(dtype))


@pytest.mark.parametrize("name", EFFECTS)
def test_zeros_and_huge_elements_are_finite(name: str) -> None:
    at_zero = moved(EFFECTS[name], torch.zeros(3, 4))
    assert at_zero.isfinite().all()
    assert torch.equal(at_zero, torch.zeros(3, 4)) == ("simplex" not in name)
    huge = moved(EFFECTS[name], torch.tensor([[1e18, -1e18, 1.0, 1e-30]] * 3))
    assert huge.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_direction_is_kept_where_its_squares_are_zero_or_infinite(size: float) -> None:
    found = moved(fxreg.unit_norm(), torch.full((2, 4), size))
    torch.testing.assert_close(found, torch.full((2, 4), 0.5))
    torch.testing.assert_close(moved(fxreg.l2_ball(2.0), torch.full((4,), 1e30)), torch.ones(4))


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("name", EFFECTS)
def test_at_the_ends_of_float32_projections_are_what_they_are_in_float64(name: str, size: float) -> None:
    w = draw_weight(2, (4, 4), size).float()
    found, wanted = moved(EFFECTS[name], w).double(), moved(EFFECTS[name], w.double())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", [*EFFECTS, "weight_decay", "l2 by the optimizer"])
def test_complex_and_integer_parameters_are_refused(name: str) -> None:
    others = {"weight_decay": fxreg.weight_decay(0.1), "l2 by the optimizer": fxreg.l2(0.1)}
    rule = fxreg.Rule((EFFECTS | others)[name], via="optimizer" if name in others else None)
    with pytest.raises(fxreg.MatchError, match="'weight': it is complex"):
        fxreg.transform(Holder(torch.ones(4, 4, dtype=torch.complex64)), rule)
    model = Holder(torch.ones(4, 4))
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(fxreg.MatchError, match="'weight': it is not a floating-point tensor"):
        fxreg.transform(model, rule)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 4), (2, 4, 2, 2)])
@pytest.mark.parametrize("name", EFFECTS)
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    w = draw_weight(0, shape)
    least = {"limit_norm": 1, "unit_norm": 1, "min_max_norm": 1, "simplex, dim=0": 1, "n_m_sparsity": 2}.get(
        name, 2 if name.endswith("dim=1") else 0
    )
    if len(shape) < least:
        with pytest.raises(fxreg.RuleError, match="does not fit 'weight'"):
            moved(EFFECTS[name], w)
    else:
        assert moved(EFFECTS[name], w).shape == w.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fxreg.box(1.0, -1.0), r"box\(low=1\.0, high=-1\.0\): nothing is at least 1 and at most -1"),
        (lambda: fxreg.box(float("inf"), float("inf")), "nothing is at least inf"),
        (lambda: fxreg.box(0.0, float("nan")), "expected float, got nan"),
        (lambda: fxreg.limit_norm(-1.0), "finite and not negative"),
        (lambda: fxreg.l1_ball(float("inf")), "finite and not negative"),
        (lambda: fxreg.min_max_norm(low=2.0), "0 ≤ low ≤ high must hold"),
        (lambda: fxreg.min_max_norm(low=-1.0), "0 ≤ low ≤ high must hold"),
        (lambda: fxreg.min_max_norm(rate=1.5), "rate must be from 0 to 1, not 1.5"),
        (lambda: fxreg.simplex(total=0.0), "total must be positive and finite, not 0"),
        (lambda: fxreg.n_m_sparsity(5, 4), "1 ≤ n ≤ m must hold"),
        (lambda: fxreg.n_m_sparsity(0, 4), "1 ≤ n ≤ m must hold"),
    ],
)
def test_the_impossible_is_refused_when_it_is_asked_for(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(fxreg.RuleError, match=message):
        make()


def test_a_size_that_has_no_whole_pattern_is_refused() -> None:
    with pytest.raises(fxreg.RuleError, match="dimension 1 has 6 elements, not a multiple of 4"):
        fxreg.explain(nn.Linear(6, 2), fxreg.Rule(fxreg.n_m_sparsity(), param="weight"))


def _limited(v: Array, limit: float) -> Array:
    return v * min(1.0, limit / float(np.linalg.norm(v)))


def shifted(v: Array, total: float) -> Array:
    """max(v − θ, 0) of that sum, with the θ that bisection finds."""
    low, high = float(v.min()) - total, float(v.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > total else (low, middle)
    return np.maximum(v - low, 0)


def _sparse(v: Array) -> Array:
    """The two largest of four."""
    return np.where(np.argsort(np.argsort(-np.abs(v))) < 2, v, 0)


# The effect, and the same by hand for one row of a Linear(4, 3)'s weight, or for all of it.
BY_HAND: dict[str, tuple[Any, bool, Callable[[Array], Array]]] = {
    "non_negative": (fxreg.non_negative(), False, lambda v: np.where(v > 0, v, 0)),
    "box": (fxreg.box(-0.2, 0.1), False, lambda v: np.minimum(np.maximum(v, -0.2), 0.1)),
    "limit_norm": (fxreg.limit_norm(0.3), True, lambda v: _limited(v, 0.3)),
    "unit_norm": (fxreg.unit_norm(), True, lambda v: v / np.linalg.norm(v)),
    "min_max_norm": (
        fxreg.min_max_norm(low=0.5, high=0.6), True,
        lambda v: v / np.linalg.norm(v) * min(max(float(np.linalg.norm(v)), 0.5), 0.6),
    ),
    "simplex": (fxreg.simplex(total=1.5, dim=0), True, lambda v: shifted(v, 1.5)),
    "l1_ball": (
        fxreg.l1_ball(0.5), False,
        lambda v: np.sign(v) * shifted(np.abs(v), 0.5) if np.abs(v).sum() > 0.5 else v,
    ),
    "l2_ball": (fxreg.l2_ball(0.5), False, lambda v: _limited(v, 0.5)),
    "n_m_sparsity": (fxreg.n_m_sparsity(2, 4), True, _sparse),
}  # fmt: skip


def test_every_constraint_is_here_by_hand() -> None:
    assert BY_HAND.keys() == {effect.name for effect in EFFECTS.values()}


@pytest.mark.parametrize("name", BY_HAND)
def test_training_under_a_constraint_is_projected_gradient_descent(name: str) -> None:
    effect, by_row, project = BY_HAND[name]
    x, y = draw_weight(1, (20, 4)), draw_weight(2, (20, 3))
    torch.manual_seed(0)
    model, reference = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    reference.load_state_dict(model.state_dict())
    gm = fxreg.transform(model, fxreg.Rule(effect, param="weight"))
    optimizer, by_hand = optim.SGD(model.parameters(), lr=0.1), optim.SGD(reference.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    moved_by = 0.0
    for _ in range(20):
        for module, one in ((gm, optimizer), (reference, by_hand)):
            one.zero_grad()
            (module(x) - y).square().mean().backward()
            one.step()
        w = reference.weight.detach().numpy()
        wanted = np.stack([project(row) for row in w]) if by_row else project(w.reshape(-1)).reshape(w.shape)
        moved_by += float(np.abs(wanted - w).max())
        with torch.no_grad():
            reference.weight.copy_(torch.from_numpy(wanted))
        torch.testing.assert_close(model.weight, reference.weight, rtol=1e-12, atol=1e-12)
    assert moved_by > 1e-3


def test_a_limit_that_is_set_while_training_holds_from_the_next_step_on() -> None:
    gm = fxreg.transform(model := nn.Linear(4, 3), fxreg.Rule(fxreg.limit_norm(0.3), param="weight"))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    for limit in (0.3, 0.2):
        fxreg.strengths(gm)["limit_norm"] = limit
        gm(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        assert float(model.weight.detach().norm(dim=1).max()) == pytest.approx(limit)


def test_a_constraint_of_ones_own_with_a_tensor_and_a_strength() -> None:
    @fxreg.constraint
    def constraints_near(weight: Tensor, *, radius: fxreg.Strength, anchor: Tensor) -> Tensor:
        """No element further than the radius from the anchor's."""
        return torch.minimum(torch.maximum(weight, anchor - radius), anchor + radius)

    w = draw_weight(0)
    anchor = torch.ones(3, 4)
    found = moved(constraints_near(0.5, anchor=anchor), w)
    torch.testing.assert_close(found, w.clamp(0.5, 1.5))
    assert constraints_near(0.5, anchor=anchor).definition.vias == ("proximal",)
    with pytest.raises(fxreg.RuleError, match="has no via='penalty'"):
        fxreg.Rule(constraints_near(0.5, anchor=anchor), via="penalty")


def test_a_penalty_in_the_graph_and_a_constraint_on_one_parameter() -> None:
    w = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    rules = [fxreg.Rule(fxreg.l2(0.5)), fxreg.Rule(fxreg.non_negative())]
    gm = fxreg.transform(model := Holder(w), rules)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    (0 * gm(torch.ones(()))).backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.9, 0.0]], dtype=torch.float64))


def test_a_constraint_on_what_a_rule_freezes_is_a_contradiction() -> None:
    with pytest.raises(fxreg.MatchError, match="contradict each other"):
        fxreg.transform(nn.Linear(2, 2), [fxreg.Rule(fxreg.freeze()), fxreg.Rule(fxreg.non_negative())])


def test_sharded_parameters_move_as_whole_ones_do(mesh: Any) -> None:
    w = draw_weight(0).float()
    for effect in EFFECTS.values():
        torch.testing.assert_close(sharded(effect, w, mesh), moved(effect, w))


@pytest.mark.parametrize("name", slow_but(["box", "simplex"], EFFECTS))
def test_the_projection_compiles_into_one_graph(name: str) -> None:
    w = draw_weight(1)
    gm = fxreg.transform(model := Holder(w), fxreg.Rule(EFFECTS[name]))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = fxreg.ProximalStep(optimizer, gm)
    model.weight.grad = torch.zeros_like(w)
    torch.compile(lambda: step._after_step(optimizer), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(model.weight.detach(), moved(EFFECTS[name], w), rtol=1e-14, atol=1e-14)
