"""`via="proximal"`: each operator against the minimum that defines it, and the step against the loop by hand."""

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch._dynamo.testing import CompileCounterWithBackend

import fxreg
from fxreg.effects import Penalty, registry

from .test_registry import BUILT_IN

briefly = settings(max_examples=25, deadline=None, derandomize=True)

# The operators, each by the R that it minimizes with, written in NumPy.

Array = np.ndarray


def _groups(u: Array, dim: int) -> Array:
    return np.sqrt((np.moveaxis(u, dim, 0).reshape(u.shape[dim], -1) ** 2).sum(1))


def _huber(u: Array, beta: float) -> float:
    return sum(x * x / (2 * beta) if abs(x) < beta else abs(x) - beta / 2 for x in u.flat)


CONVEX: dict[str, tuple[Any, Callable[[Array], float]]] = {
    "l1": (fxreg.l1(0.7), lambda u: 0.7 * np.abs(u).sum()),
    "l2": (fxreg.l2(0.7), lambda u: 0.7 * (u**2).sum()),
    "elastic_net": (fxreg.elastic_net(0.7, 0.4), lambda u: 0.7 * np.abs(u).sum() + 0.4 * (u**2).sum()),
    "group_lasso": (fxreg.group_lasso(0.7, dim=1), lambda u: 0.7 * _groups(u, 1).sum()),
    "sparse_group_lasso": (
        fxreg.sparse_group_lasso(0.3, 0.7),
        lambda u: 0.3 * np.abs(u).sum() + 0.7 * _groups(u, 0).sum(),
    ),
    "max_norm": (fxreg.max_norm(0.7, limit=1.1), lambda u: 0.7 * np.maximum(_groups(u, 0) - 1.1, 0).sum()),
    "nuclear_norm": (fxreg.nuclear_norm(0.7), lambda u: 0.7 * np.linalg.svd(u.reshape(len(u), -1))[1].sum()),
    "smooth_l1": (fxreg.smooth_l1(0.7, beta=0.5), lambda u: 0.7 * _huber(u, 0.5)),
}


class Holder(nn.Module):
    """One parameter, and nothing to learn."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.sum() * x


def moved(effect: Any, weight: Tensor, lr: Any = 1.0) -> Tensor:
    """What one step makes of a weight whose gradient is zero."""
    model = Holder(weight)
    gm = fxreg.transform(model, fxreg.Rule(effect, via="proximal"))
    optimizer = optim.SGD(model.parameters(), lr=lr)
    fxreg.ProximalStep(optimizer, gm)
    model.weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return model.weight.detach()


def draw_weight(seed: int, shape: tuple[int, ...] = (3, 4), size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_every_operator_that_a_penalty_has_is_here() -> None:
    built_in = {name for name, definition in BUILT_IN.items() if isinstance(definition, Penalty)}
    here = {*CONVEX, "mcp", "scad", "l2_sp", "ewc"}
    assert {name for name in built_in if "proximal" in registry[name].vias} == here


@pytest.mark.parametrize("name", CONVEX)
@briefly
@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 5.0]), lr=st.sampled_from([0.01, 0.5, 2.0]))
def test_the_operator_minimizes_half_the_squared_distance_plus_the_penalty(
    name: str, seed: int, size: float, lr: float
) -> None:
    """The minimum p of a function F with F(u) − F(p) ≥ ½‖u − p‖², for F − ½‖u‖² is convex, is where that holds."""
    effect, penalty = CONVEX[name]
    w = draw_weight(seed, size=size)
    found = moved(effect, w, lr).numpy()

    def objective(u: Array) -> float:
        return float(0.5 * ((u - w.numpy()) ** 2).sum() + lr * penalty(u))

    random = np.random.default_rng(seed)
    others = [w.numpy(), 0 * found, *(found + s * random.standard_normal(found.shape) for s in (1e-4, 1e-2, 1, 10))]
    for i in range(found.size):  # also one element at a time: towards its kink
        other = found.copy()
        other.flat[i] = 0
        others += [other, found + 1e-3 * (np.arange(found.size) == i).reshape(found.shape)]
    for other in others:
        gain = objective(other) - objective(found)
        assert gain >= 0.5 * ((other - found) ** 2).sum() - 1e-12 * (1 + size * size)


NONCONVEX = {"mcp": (fxreg.mcp(0.5, gamma=2.0), 2.0), "scad": (fxreg.scad(0.5, a=3.0), 2.0)}


def _piecewise(name: str, x: Array) -> Array:
    x = np.abs(x)
    if name == "mcp":  # λ = 0.5, γ = 2
        return np.where(x <= 1.0, 0.5 * x - x * x / 4, 0.25)
    return np.where(x <= 0.5, 0.5 * x, np.where(x <= 1.5, (3 * x - x * x - 0.25) / 4, 0.5))  # λ = 0.5, a = 3


@pytest.mark.parametrize("lr", [0.1, 1.0, 1.9, 2.0, 2.5, 3.9, 4.0, 6.0])
@pytest.mark.parametrize("name", NONCONVEX)
def test_the_operator_of_a_nonconvex_penalty_is_a_global_minimum_also_where_there_is_no_local_one_between(
    name: str, lr: float
) -> None:
    effect, _ = NONCONVEX[name]
    w = torch.linspace(-4, 4, 401, dtype=torch.float64) + 1e-3
    found = moved(effect, w, lr).numpy()
    grid = np.linspace(-4.5, 4.5, 18001)

    def objective(u: Array, at: Array) -> Array:
        return 0.5 * (u - at) ** 2 + lr * _piecewise(name, u)

    best = objective(grid[None], w.numpy()[:, None]).min(1)
    assert (objective(found, w.numpy()) <= best + 1e-9).all()
    assert (objective(found, w.numpy()) >= best - 1e-6).all()  # the reference is no worse
    if lr < NONCONVEX[name][1]:  # single-valued, so that the place counts too
        nearest = grid[objective(grid[None], w.numpy()[:, None]).argmin(1)]
        assert np.abs(found - nearest).max() < 4e-2


def test_closed_forms() -> None:
    w = torch.tensor([[3.0, -4.0], [0.3, 0.4]], dtype=torch.float64)
    t = torch.testing.assert_close
    t(moved(fxreg.l1(0.7), w, 0.5), torch.tensor([[2.65, -3.65], [0.0, 0.05]], dtype=torch.float64))
    t(moved(fxreg.l2(0.7), w, 0.5), w / (1 + 2 * 0.5 * 0.7))
    t(moved(fxreg.elastic_net(0.2, 0.7), w, 0.5), w.sign() * (w.abs() - 0.1) / 1.7)
    t(moved(fxreg.group_lasso(1.2), w, 0.5), w * torch.tensor([[1 - 0.6 / 5], [0.0]]))
    t(moved(fxreg.max_norm(2.0, limit=0.4), w, 0.5), w * torch.tensor([[0.8], [0.8]]))
    t(moved(fxreg.nuclear_norm(1.2), torch.diag(w[0]), 0.5), torch.diag(torch.tensor([2.4, -3.4])).double())


@pytest.mark.parametrize("name", [*CONVEX, *NONCONVEX])
def test_zeros_stay_zero_and_finite_and_no_strength_moves_nothing(name: str) -> None:
    effect = (CONVEX | NONCONVEX)[name][0]  # type: ignore[operator]
    assert torch.equal(moved(effect, torch.zeros(3, 4)), torch.zeros(3, 4))
    w = draw_weight(0)
    w[0] = 0
    gm = fxreg.transform(model := Holder(w), fxreg.Rule(effect, via="proximal"))
    for strength in fxreg.strengths(gm).values():
        strength.fill_(0)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    fxreg.ProximalStep(optimizer, gm)
    model.weight.grad = torch.zeros_like(w)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), w, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CONVEX, *NONCONVEX])
def test_16_bit_parameters_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    effect = (CONVEX | NONCONVEX)[name][0]  # type: ignore[operator]
    w = draw_weight(0, (3, 400), 4.0).to(dtype)
    assert torch.equal(moved(effect, w, 0.5), moved(effect, w.float(), 0.5).to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 2, 2)])
@pytest.mark.parametrize("name", [*CONVEX, *NONCONVEX])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    effect = (CONVEX | NONCONVEX)[name][0]  # type: ignore[operator]
    w = draw_weight(0, shape)
    if len(shape) < {"nuclear_norm": 2, "group_lasso": 2, "sparse_group_lasso": 1, "max_norm": 1}.get(name, 0):
        with pytest.raises(fxreg.RuleError, match="does not fit 'weight'"):
            moved(effect, w)
    else:
        assert moved(effect, w).shape == w.shape
        assert moved(effect, w).isfinite().all()


@pytest.mark.parametrize("name", ["l2_sp", "ewc"])
def test_an_anchor_pulls_each_parameter_towards_its_own(name: str) -> None:
    model = make()
    anchors = {n: torch.full_like(p, k) for k, (n, p) in enumerate(model.named_parameters())}
    fisher = {n: torch.full_like(p, 0.5 + k) for k, (n, p) in enumerate(model.named_parameters())}
    effect = fxreg.l2_sp(0.3, anchors) if name == "l2_sp" else fxreg.ewc(0.3, fisher, anchors)
    start = copy.deepcopy(model)
    gm = fxreg.transform(model, fxreg.Rule(effect, via="proximal"))
    assert fxreg.penalties(gm)[name] > 0
    fxreg.load_state_dict(gm, fxreg.state_dict(gm))
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    fxreg.ProximalStep(optimizer, gm)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        # 0 = (u − w) + 2·lr·s·F·(u − a)
        pull = 2 * 0.5 * 0.3 * (1 if name == "l2_sp" else fisher[n])
        w = start.get_parameter(n).detach()
        torch.testing.assert_close(p.detach() - w + pull * (p.detach() - anchors[n]), torch.zeros_like(w))


# The step, by hand.

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(16, 3).sin()
Y = torch.linspace(1, -1, 16, dtype=torch.float64).reshape(16, 1).cos()
LAM = 0.08


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - Y).square().mean()


def soft(w: Tensor, threshold: float) -> Tensor:
    return w.sign() * (w.abs() - threshold).clamp_min(0)


def train(module: nn.Module, optimizer: optim.Optimizer, steps: int = 20, after: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()
        if after is not None:
            after()


def by_hand(
    model: nn.Module, prox: Callable[[Tensor, float], Tensor], optimizer: optim.Optimizer
) -> Callable[[], None]:
    """Soft thresholds, say, of the weights, with the learning rate of their group."""

    @torch.no_grad()
    def after() -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.ndim == 2:
                    p.copy_(prox(p, float(group["lr"])))

    return after


def regularized(effect: Any = None, **keys: Any) -> tuple[nn.Module, nn.Module]:
    model = make()
    effect = fxreg.l1(LAM) if effect is None else effect
    return model, fxreg.transform(model, fxreg.Rule(effect, param="weight", via="proximal", **keys))


def assert_same(model: nn.Module, reference: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters())


OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd, foreach": (optim.SGD, {"lr": 0.1, "foreach": True}),
    "sgd, fused": (optim.SGD, {"lr": 0.1, "fused": True}),
    "sgd, momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd, nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (optim.Adam, {"lr": 0.05}),
    "adam, fused": (optim.Adam, {"lr": 0.05, "fused": True}),
    "adam, tensor lr": (optim.Adam, {"lr": torch.tensor(0.05, dtype=torch.float64), "foreach": False}),
    "adamw, capturable form": (optim.AdamW, {"lr": torch.tensor(0.05, dtype=torch.float64), "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "nadam": (optim.NAdam, {"lr": 0.05}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_are_those_of_the_loop_by_hand(name: str) -> None:
    cls, options = OPTIMIZERS[name]
    reference = make()
    optimizer = cls(reference.parameters(), **options)
    train(reference, optimizer, after=by_hand(reference, lambda w, lr: soft(w, lr * LAM), optimizer))
    model, gm = regularized()
    optimizer = cls(model.parameters(), **options)
    fxreg.ProximalStep(optimizer, gm)
    train(gm, optimizer)
    assert_same(model, reference)
    plain = make()
    train(plain, cls(plain.parameters(), **options))
    assert (plain[0].weight - model[0].weight).abs().max() > 1e-3
    assert zeros(plain) == 0


def rows(w: Tensor) -> Tensor:
    return w.square().sum(1, keepdim=True).sqrt()


def _nuclear(w: Tensor, threshold: float) -> Tensor:
    left, values, right = torch.linalg.svd(w, full_matrices=False)
    return left @ torch.diag((values - threshold).relu()) @ right


def _mcp(w: Tensor, lr: float) -> Tensor:
    """With λ = 0.3 and γ = 3."""
    return torch.where(w.abs() <= 0.9, soft(w, lr * 0.3) / (1 - lr / 3), w)


def _scad(w: Tensor, lr: float) -> Tensor:
    """With λ = 0.15 and a = 3."""
    middle = (2 * w - 3 * lr * 0.15 * w.sign()) / (2 - lr)
    return torch.where(w.abs() <= 0.15 * (1 + lr), soft(w, lr * 0.15), torch.where(w.abs() <= 0.45, middle, w))


OTHERS: dict[str, tuple[Any, Callable[[Tensor, float], Tensor]]] = {
    "l2": (fxreg.l2(LAM), lambda w, lr: w / (1 + 2 * lr * LAM)),
    "elastic_net": (fxreg.elastic_net(LAM, 0.3), lambda w, lr: soft(w, lr * LAM) / (1 + 2 * lr * 0.3)),
    "group_lasso": (fxreg.group_lasso(3 * LAM, dim=0), lambda w, lr: w * (1 - 3 * lr * LAM / rows(w)).relu()),
    "sparse_group_lasso": (
        fxreg.sparse_group_lasso(LAM, 2 * LAM),
        lambda w, lr: (v := soft(w, lr * LAM)) * (1 - 2 * lr * LAM / rows(v).clamp_min(1e-30)).relu(),
    ),
    "max_norm": (
        fxreg.max_norm(0.5, limit=0.6),
        lambda w, lr: torch.where(rows(w) > 0.6, w / rows(w) * (rows(w) - lr * 0.5).clamp_min(0.6), w),
    ),
    "nuclear_norm": (fxreg.nuclear_norm(LAM), lambda w, lr: _nuclear(w, lr * LAM)),
    "smooth_l1": (
        fxreg.smooth_l1(LAM, beta=0.2),
        lambda w, lr: torch.where(w.abs() <= 0.2 + lr * LAM, w / (1 + lr * LAM / 0.2), w - lr * LAM * w.sign()),
    ),
    "mcp": (fxreg.mcp(0.3), _mcp),
    "scad": (fxreg.scad(0.15, a=3.0), _scad),
}


def assert_steps_are(effect: Any, prox: Callable[[Tensor, float], Tensor]) -> None:
    """Twenty steps of SGD end where those with the operator by hand do, and not where those without it do."""
    reference, plain, (model, gm) = make(), make(), regularized(effect)
    optimizer = optim.SGD(reference.parameters(), lr=0.1)
    train(reference, optimizer, after=by_hand(reference, prox, optimizer))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    train(gm, optimizer)
    assert_same(model, reference)
    train(plain, optim.SGD(plain.parameters(), lr=0.1))
    assert (plain[0].weight - model[0].weight).abs().max() > 1e-3


def test_every_operator_takes_twenty_steps_here() -> None:
    """Those of anchors have a test of their own."""
    assert {"l1", *OTHERS} == {*CONVEX, *NONCONVEX}


FISHER = {name: weight.detach().sin().square() for name, weight in make().named_parameters() if weight.ndim == 2}


@pytest.mark.parametrize(
    ("effect", "fisher"),
    [(fxreg.l2_sp(LAM), {name: torch.ones_like(f) for name, f in FISHER.items()}), (fxreg.ewc(LAM, FISHER), FISHER)],
    ids=["l2_sp", "ewc"],
)
def test_effects_with_anchors_over_twenty_steps(effect: Any, fisher: dict[str, Tensor]) -> None:
    start = {w.shape: (w.detach(), fisher[n]) for n, w in make().named_parameters() if n in fisher}

    def prox(w: Tensor, lr: float) -> Tensor:
        anchor, f = start[w.shape]
        return (w + 2 * lr * LAM * f * anchor) / (1 + 2 * lr * LAM * f)

    assert_steps_are(effect, prox)


@pytest.mark.parametrize(("effect", "prox"), OTHERS.values(), ids=OTHERS)
def test_other_effects_over_twenty_steps(effect: Any, prox: Any) -> None:
    assert_steps_are(effect, prox)


def test_zeros_are_exact_and_stay_while_the_penalty_in_the_graph_has_none() -> None:
    model, gm = regularized()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    train(gm, optimizer, 200)
    assert zeros(model) >= 10
    other = make()
    train(fxreg.transform(other, fxreg.Rule(fxreg.l1(LAM), param="weight")), optim.SGD(other.parameters(), lr=0.1), 200)
    assert zeros(other) == 0


def end_of(via: Any, strength: float, steps: int = 600, **options: Any) -> Tensor:
    """Where linear regression ends."""
    model = nn.Linear(3, 1, bias=False).double()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(strength), via=via))
    optimizer = optim.SGD(model.parameters(), **options)
    if via == "proximal":
        fxreg.ProximalStep(optimizer, gm)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 250, 0.25)
    for _ in range(steps):
        optimizer.zero_grad()
        (gm(X + torch.eye(16, 3)) - Y).square().sum().backward()
        optimizer.step()
        scheduler.step() if via == "penalty" else None
    return model.weight.detach()


@pytest.mark.slow
def test_penalty_and_proximal_step_end_in_the_same_place_which_only_one_of_them_reaches() -> None:
    reached, near = end_of("proximal", 2.0, lr=0.02), end_of("penalty", 2.0, 2000, lr=0.02)
    torch.testing.assert_close(near, reached, rtol=0, atol=1e-3)
    assert 0 < int((reached == 0).sum()) < 3
    assert not (near == 0).any()


@pytest.mark.parametrize(("dampening", "nesterov", "factor"), [(0.9, False, 1.0), (0.0, False, 0.1), (0.0, True, 0.1)])
@pytest.mark.slow
def test_momentum_leaves_a_share_of_the_strength_unless_it_is_damped(
    dampening: float, nesterov: bool, factor: float
) -> None:
    """Where it stands still, the velocity is (1 − dampening)/(1 − momentum) gradients."""
    options = {"momentum": 0.9, "dampening": dampening, "nesterov": nesterov}
    found = end_of("proximal", 2.0, lr=0.01, **options)
    torch.testing.assert_close(found, end_of("proximal", factor * 2.0, lr=0.02), rtol=1e-9, atol=1e-9)


# What it is asked with.


def test_each_group_has_its_own_learning_rate_and_a_scheduler_moves_it() -> None:
    def optimizer_of(model: Any) -> tuple[optim.Optimizer, Any]:
        groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 0.02}]
        optimizer = optim.SGD(groups)
        return optimizer, optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    reference, (model, gm) = make(), regularized()
    optimizer, scheduler = optimizer_of(reference)
    hand = by_hand(reference, lambda w, lr: soft(w, lr * LAM), optimizer)
    train(reference, optimizer, after=lambda: (hand(), scheduler.step()))
    optimizer, scheduler = optimizer_of(model)
    fxreg.ProximalStep(optimizer, gm)
    train(gm, optimizer, after=scheduler.step)
    assert_same(model, reference)


def test_a_group_that_is_added_later_takes_part() -> None:
    model, gm = regularized()
    model[2].requires_grad_(False)
    optimizer = optim.SGD(model[0].parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.2})
    before = copy.deepcopy(model)
    train(gm, optimizer, 1)
    for layer, lr in ((0, 0.1), (2, 0.2)):
        wanted = soft(before[layer].weight - lr * model[layer].weight.grad, lr * LAM)
        torch.testing.assert_close(model[layer].weight.detach(), wanted.detach())


def test_strengths_are_live_and_follow_schedules() -> None:
    reference, (model, gm) = make(), regularized()
    optimizer = optim.SGD(reference.parameters(), lr=0.1)
    strength = LAM

    def advance() -> None:
        nonlocal strength
        by_hand(reference, lambda w, lr: soft(w, lr * strength), optimizer)()
        strength = 2 * strength

    train(reference, optimizer, 6, after=advance)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    scheduler = fxreg.StrengthScheduler(gm, {"l1": lambda step: 2.0**step})
    train(gm, optimizer, 6, after=scheduler.step)
    assert_same(model, reference)
    fxreg.strengths(gm)["l1"] = 1e9
    train(gm, optimizer, 1)
    assert (model[0].weight == 0).all()


def test_strengths_of_every_proximal_rule_are_registered_and_saved() -> None:
    rules = [
        fxreg.Rule(fxreg.elastic_net(0.1, 0.2), via="proximal", param="weight", label="sparse"),
        fxreg.Rule(fxreg.limit_norm(3.0), param="weight"),
        fxreg.Rule(fxreg.l2(0.5), via="optimizer", param="bias"),
    ]
    gm = fxreg.transform(make(), rules)
    assert {name: float(value) for name, value in fxreg.strengths(gm).items()} == {
        "sparse.l1": 0.1, "sparse.l2": 0.2, "limit_norm": 3.0
    }  # fmt: skip
    fxreg.strengths(gm)["limit_norm"] = 2.0
    other = fxreg.transform(make(), rules)
    fxreg.load_state_dict(other, fxreg.state_dict(gm))
    assert float(fxreg.strengths(other)["limit_norm"]) == 2.0


def test_a_resumed_run_goes_on_as_the_first_would_have() -> None:
    def start() -> tuple[nn.Module, nn.Module, optim.Optimizer, Any]:
        model, gm = regularized()
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        fxreg.ProximalStep(optimizer, gm)
        return model, gm, optimizer, fxreg.StrengthScheduler(gm, {"l1": fxreg.schedules.linear(20)})

    model, gm, optimizer, scheduler = start()
    train(gm, optimizer, 7, after=scheduler.step)
    saved = copy.deepcopy((model.state_dict(), fxreg.state_dict(gm), optimizer.state_dict(), scheduler.state_dict()))
    train(gm, optimizer, 7, after=scheduler.step)
    again, gm, optimizer, scheduler = start()
    for target, state in zip((again, None, optimizer, scheduler), saved, strict=True):
        if target is None:
            fxreg.load_state_dict(gm, state)
        else:
            target.load_state_dict(state)
    train(gm, optimizer, 7, after=scheduler.step)
    assert_same(again, model, 0)


def test_rules_on_one_parameter_act_in_their_order() -> None:
    w = torch.tensor([[3.0, -0.5], [0.2, 0.1]], dtype=torch.float64)
    rules = [fxreg.Rule(fxreg.l1(0.3), via="proximal"), fxreg.Rule(fxreg.group_lasso(0.5), via="proximal")]

    def after(order: list[fxreg.Rule]) -> Tensor:
        gm = fxreg.transform(model := Holder(w), order)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        fxreg.ProximalStep(optimizer, gm)
        model.weight.grad = torch.zeros_like(w)
        optimizer.step()
        return model.weight.detach()

    # First l1, then the groups: that is the operator of both together.
    torch.testing.assert_close(after(rules), moved(fxreg.sparse_group_lasso(0.3, 0.5), w), rtol=0, atol=0)
    assert not torch.allclose(after(rules[::-1]), after(rules))


@pytest.mark.parametrize("together", [1, 20, 1 << 20])
def test_however_many_are_computed_at_once_and_of_which_dtypes(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fxreg.proximal, "_TOGETHER", together)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float64)
    model = nn.ParameterList([nn.Parameter(draw_weight(k).to(dtype)) for k, dtype in enumerate(dtypes)])
    start = [p.detach().clone() for p in model]
    model.forward = lambda x: x * sum(p.sum() for p in model)  # type: ignore[method-assign]
    gm = fxreg.transform(model, fxreg.Rule(fxreg.elastic_net(0.3, 0.2), via="proximal"))
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    fxreg.ProximalStep(optimizer, gm)
    for p in model:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, w in zip(model, start, strict=True):
        close = 1e-14 if w.dtype == torch.float64 else 1e-2 if w.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(p.detach(), (soft(w.double(), 0.15) / 1.2).to(w.dtype), rtol=close, atol=close)


def test_a_tied_weight_moves_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.decode = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.decode.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decode(self.embed(tokens))

    model = Tied().double()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.3), via="proximal"))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    before = model.embed.weight.detach().clone()
    gm(torch.tensor([1])).sum().mul(0).backward()
    optimizer.step()
    torch.testing.assert_close(model.embed.weight.detach(), soft(before, 0.03), rtol=1e-14, atol=1e-14)


def test_parameters_without_a_gradient_stay_as_they_do_in_the_optimizer() -> None:
    model, gm = regularized()
    before = copy.deepcopy(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    loss_of(gm).backward()
    model[2].weight.grad = None
    optimizer.step()
    assert torch.equal(model[2].weight, before[2].weight)
    assert (model[0].weight - before[0].weight).abs().max() > 1e-3


def test_a_frozen_parameter_need_not_be_in_the_optimizer() -> None:
    model, gm = regularized()
    model[2].weight.requires_grad_(False)
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    train(gm, optimizer, 3)
    assert torch.equal(model[2].weight, make()[2].weight)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_moves_nothing(fused: bool) -> None:
    model = make().float()
    rules = [
        fxreg.Rule(fxreg.l1(LAM), param="weight", via="proximal"),
        fxreg.Rule(fxreg.min_max_norm(low=2.0, high=3.0, rate=0.5), param="weight"),
    ]
    gm = fxreg.transform(model, rules)
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=fused)
    fxreg.ProximalStep(optimizer, gm)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (True, False):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        scaler.scale((gm(X.float()) - Y.float()).square().mean()).backward()
        if bad:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(p, q) == bad


# Being there and being gone.


def test_removed_it_acts_no_more_and_is_unbound_again() -> None:
    model, gm = regularized()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = fxreg.ProximalStep(optimizer, gm)
    assert fxreg.explain(gm).unbound == ()
    step.remove()
    assert fxreg.explain(gm).unbound == ("l1",)
    plain = make()
    train(plain, optim.SGD(plain.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"rules 'l1' act through the optimizer, but fxreg\.ProximalStep was never"):
        train(gm, optimizer)
    assert_same(model, plain, 0)
    fxreg.ProximalStep(optimizer, gm)


def test_explain_shows_the_lowering_and_that_it_is_unbound_until_the_step_came() -> None:
    model, gm = regularized()
    assert "proximal" in str(fxreg.explain(model, fxreg.Rule(fxreg.l1(0.1), via="proximal")))
    assert "unbound: l1: call fxreg.ProximalStep(optimizer, gm)" in str(fxreg.explain(gm))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    assert "unbound" not in str(fxreg.explain(gm))
    train(gm, optimizer, 1)  # a warning would be an error
    del optimizer
    gc.collect()
    assert fxreg.explain(gm).unbound == ("l1",)


def test_an_optimizer_of_another_module_of_the_same_model_does_not_bind_this_one() -> None:
    model, gm = regularized()
    other = fxreg.transform(model, fxreg.Rule(fxreg.l1(LAM), param="weight", via="proximal"))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, other)
    assert fxreg.explain(gm).unbound == ("l1",)
    assert fxreg.explain(copy.deepcopy(other)).unbound == ("l1",)
    assert fxreg.explain(pickle.loads(pickle.dumps(other))).unbound == ("l1",)
    assert fxreg.explain(other).unbound == ()


def test_there_is_nothing_in_the_graph_and_the_rest_works() -> None:
    model, gm = regularized()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    fxreg.verify(gm, model, (X,))
    assert fxreg.diff(gm) == ""
    assert fxreg.strip(gm).code == gm.code == fxreg.transform(model, []).code
    assert list(gm.state_dict()) == list(model.state_dict())


def test_penalties_have_their_value_and_constraints_none() -> None:
    model = make()
    rules = [
        fxreg.Rule(fxreg.l1(0.5), param="weight", via="proximal"),
        fxreg.Rule(fxreg.non_negative(), param="weight"),
    ]
    gm = fxreg.transform(model, rules)
    fxreg.strengths(gm)["l1"] = 0.25
    found = fxreg.penalties(gm)
    assert found.keys() == {"l1"}
    torch.testing.assert_close(found["l1"], 0.25 * (model[0].weight.abs().sum() + model[2].weight.abs().sum()).detach())


def sharded(effect: Any, weight: Tensor, mesh: Any) -> Tensor:
    """`moved`, of a weight that is sharded."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    gm = fxreg.transform(model := Holder(weight), fxreg.Rule(effect, via="proximal"))
    fully_shard(gm, mesh=mesh)
    optimizer = optim.SGD(gm.parameters(), lr=0.5)
    fxreg.ProximalStep(optimizer, gm)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert isinstance(model.weight, DTensor)
    return model.weight.full_tensor().detach()


def test_sharded_parameters_move_as_whole_ones_do(mesh: Any) -> None:
    w = draw_weight(0).float()
    for effect, _ in (CONVEX | NONCONVEX).values():  # type: ignore[operator]
        torch.testing.assert_close(sharded(effect, w, mesh), moved(effect, w, 0.5))


# Refused.


def refused(message: str, optimizer: Any, gm: nn.Module) -> None:
    hooks = len(getattr(optimizer, "_optimizer_step_post_hooks", ()))
    with pytest.raises(fxreg.RuleError, match=message):
        fxreg.ProximalStep(optimizer, gm)
    assert len(getattr(optimizer, "_optimizer_step_post_hooks", ())) == hooks


def test_an_optimizer_that_lacks_a_parameter_is_refused_with_its_name() -> None:
    model, gm = regularized(label="sparse")
    refused(r"rule 'sparse' acts on '2\.weight', which is not among", optim.SGD(model[0].parameters(), lr=0.1), gm)
    assert fxreg.explain(gm).unbound == ("sparse",)


@pytest.mark.parametrize("cls", [optim.LBFGS, optim.Rprop, optim.ASGD, optim.Adafactor])
def test_an_optimizer_whose_steps_are_not_of_the_learning_rate_is_refused(cls: Any) -> None:
    model, gm = regularized()
    refused(f"rule 'l1' .*{cls.__name__}'s steps are of other sizes.*via='penalty'", cls(model.parameters()), gm)


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    class Own(optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            pass

    model, gm = regularized()
    refused(r"Own's group of '0\.weight' has no 'lr'", Own(model.parameters(), {}), gm)


def test_a_second_step_of_the_same_two_is_refused() -> None:
    model, gm = regularized()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    refused("would act twice", optimizer, gm)
    fxreg.ProximalStep(optim.SGD(model.parameters(), lr=0.1), gm)  # another phase of training, say


def test_what_is_no_optimizer_or_no_emitted_module_or_has_no_such_rule_is_refused() -> None:
    model, gm = regularized()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    refused(r"must be a torch\.optim\.Optimizer, got 'SGD'", "SGD", gm)
    refused("no rule of this module has via='proximal'", optimizer, fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1))))
    with pytest.raises(fxreg.FxregError, match=r"expected a module that fxreg\.transform returned"):
        fxreg.ProximalStep(optimizer, model)


@pytest.mark.parametrize("effect", [fxreg.hoyer(0.1), fxreg.lp(0.1), fxreg.clip_norm(1.0), fxreg.weight_decay(0.1)])
def test_an_effect_without_an_operator_is_refused_when_the_rule_is_made(effect: Any) -> None:
    with pytest.raises(fxreg.RuleError, match="has no via='proximal'"):
        fxreg.Rule(effect, via="proximal")


# One's own.


def test_an_operator_of_ones_own() -> None:
    @fxreg.penalty
    def proximal_half(weight: Tensor) -> Tensor:
        return 0.5 * weight.square().sum()

    assert proximal_half.vias == ("penalty",)

    @proximal_half.proximal
    def _(weight: Tensor, step: Tensor) -> Tensor:
        return weight / (1 + step)

    assert proximal_half.vias == ("penalty", "proximal")
    w = draw_weight(0)
    torch.testing.assert_close(moved(proximal_half(3.0), w, 0.5), w / 2.5)


def test_an_operator_that_gives_another_shape_is_refused_and_moves_nothing() -> None:
    @fxreg.penalty
    def proximal_wrong(weight: Tensor) -> Tensor:
        return weight.sum()

    @proximal_wrong.proximal
    def _(weight: Tensor, step: Tensor) -> Tensor:
        return weight.sum()

    with pytest.raises(fxreg.RuleError, match=r"rule 'proximal_wrong'.*at 'weight': the new weight has shape \(\)"):
        moved(proximal_wrong(3.0), draw_weight(0))


# Compiled.


@pytest.mark.parametrize("effect", [fxreg.l1(LAM), fxreg.group_lasso(LAM), fxreg.mcp(LAM)], ids=repr)
def test_the_hook_compiles_into_one_graph_and_not_again_when_strengths_change(effect: Any) -> None:
    reference, (model, gm) = regularized(effect), regularized(effect)
    optimizer = optim.SGD(reference[0].parameters(), lr=torch.tensor(0.1))
    fxreg.ProximalStep(optimizer, reference[1])
    compiled = optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    step = fxreg.ProximalStep(compiled, gm)
    step._handle.remove()
    run = torch.compile(lambda: step._after_step(compiled), backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.08, 0.2, 0.0):
            for module in (gm, reference[1]):
                fxreg.strengths(module)[effect.name] = strength
            train(gm, compiled, 1, after=run)
            train(reference[1], optimizer, 1)
            assert_same(model, reference[0], 1e-12)


@pytest.mark.slow
def test_an_optimizer_step_compiled_by_inductor_takes_the_hook_along() -> None:
    reference, (model, gm) = make(), regularized()
    optimizer = optim.SGD(reference.parameters(), lr=0.125)
    train(reference, optimizer, after=by_hand(reference, lambda w, lr: soft(w, lr * LAM), optimizer))
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.125))
    fxreg.ProximalStep(optimizer, gm)
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(lambda: optimizer.step(), backend=counter)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(gm).backward()
        step()
    assert_same(model, reference, 1e-10)
    assert zeros(model) == zeros(reference) > 0
    assert counter.frame_count == 2  # the optimizer's, which itself breaks off behind it, and this
