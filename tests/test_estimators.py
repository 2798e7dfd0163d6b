"""Trained through fxreg, a linear model ends where scikit-learn's solvers end, on scikit-learn's data: with the same
zeros, and the same coefficients to 1e-6.

Lasso and its kin minimize ½/n·‖y − Xw‖² + α·R(w), Ridge ‖y − Xw‖² + α·‖w‖², and logistic regression, over C·n, the mean
loss + R(w)/(C·n).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets, linear_model
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn, optim

import fxreg

from .marks import slow_but

Loss = Callable[[Tensor], Tensor]


def diabetes(targets: int = 1) -> tuple[Tensor, Tensor]:
    """Standardised; of its columns the last ones are what to predict."""
    data = StandardScaler().fit_transform(np.column_stack(datasets.load_diabetes(return_X_y=True)))
    return torch.tensor(data[:, :-targets]), torch.tensor(data[:, -targets:])


def cancer() -> tuple[Tensor, Tensor]:
    x, y = datasets.load_breast_cancer(return_X_y=True)
    return torch.tensor(StandardScaler().fit_transform(x)), torch.tensor(y, dtype=torch.float64)[:, None]


def curvature(x: Tensor) -> float:
    """The largest eigenvalue of XᵀX/n."""
    return float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])


def descend(
    gm: nn.Module, x: Tensor, loss: Loss, curvature: float, steps: int, momentum: float = 0.0, groups: Any = None
) -> None:
    """Full-batch descent with a step of 1/L; by its companion where there are proximal rules."""
    lr = 1 / curvature / (1 - momentum)
    optimizer = optim.SGD(groups or gm.parameters(), lr=lr, momentum=momentum, dampening=momentum)
    if fxreg.explain(getattr(gm, "_orig_mod", gm)).plan.companions("proximal"):
        fxreg.ProximalStep(optimizer, gm)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(gm(x)).backward()
        optimizer.step()


def half_mean_square(y: Tensor) -> Loss:
    return lambda output: 0.5 * (output - y).square().sum() / len(y)


def assert_is(model: nn.Module, coefficients: np.ndarray, sparse: bool = True) -> None:
    found = model.weight.detach().numpy()
    coefficients = np.atleast_2d(coefficients)
    np.testing.assert_array_equal(found == 0, coefficients == 0)
    assert (found == 0).any() == sparse
    np.testing.assert_allclose(found, coefficients, rtol=0, atol=1e-6)


compiled = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])


def emitted(model: nn.Module, rule: fxreg.Rule, compiled: bool) -> nn.Module:
    gm = fxreg.transform(model, rule)
    torch._dynamo.reset()
    return torch.compile(gm, fullgraph=True) if compiled else gm


def linear(x: Tensor, y: Tensor, bias: bool = False) -> nn.Linear:
    return nn.Linear(x.shape[1], y.shape[1], bias=bias).double()


@pytest.mark.parametrize(
    ("momentum", "steps", "compiled"),
    [(0.0, 1000, False), (0.8, 300, False), pytest.param(0.8, 300, True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("alpha", [0.02, 0.1])
def test_lasso(alpha: float, momentum: float, steps: int, compiled: bool) -> None:
    x, y = diabetes()
    model = linear(x, y)
    gm = emitted(model, fxreg.Rule(fxreg.l1(alpha), via="proximal"), compiled)
    descend(gm, x, half_mean_square(y), curvature(x), steps, momentum)
    theirs = linear_model.Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000)
    assert_is(model, theirs.fit(x.numpy(), y.numpy().ravel()).coef_)


@pytest.mark.slow
def test_a_path_of_lassos_along_a_schedule_of_strengths() -> None:
    """One module, warm from one strength to the next, as scikit-learn's path is."""
    x, y = diabetes()
    model = linear(x, y)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.4), via="proximal"))
    optimizer = optim.SGD(model.parameters(), lr=5 / curvature(x), momentum=0.8, dampening=0.8)
    fxreg.ProximalStep(optimizer, gm)
    scheduler = fxreg.StrengthScheduler(gm, {"l1": lambda step: 0.5**step})
    alphas = [0.4 * 0.5**k for k in range(4)]
    _, path, _ = linear_model.lasso_path(x.numpy(), y.numpy().ravel(), alphas=alphas, tol=1e-14, max_iter=100_000)
    for theirs in path.T:
        for _ in range(300):
            optimizer.zero_grad()
            half_mean_square(y)(gm(x)).backward()
            optimizer.step()
        assert_is(model, theirs)
        scheduler.step()


@compiled
def test_elastic_net(compiled: bool) -> None:
    x, y = diabetes()
    model = linear(x, y)
    gm = emitted(model, fxreg.Rule(fxreg.elastic_net(l1=0.1 * 0.7, l2=0.1 * 0.3 / 2), via="proximal"), compiled)
    descend(gm, x, half_mean_square(y), curvature(x), 300, 0.8)
    theirs = linear_model.ElasticNet(alpha=0.1, l1_ratio=0.7, fit_intercept=False, tol=1e-14, max_iter=100_000)
    assert_is(model, theirs.fit(x.numpy(), y.numpy().ravel()).coef_)


@pytest.mark.slow
def test_elastic_net_of_two_rules_with_its_l2_in_the_graph() -> None:
    x, y = diabetes()
    model = linear(x, y)
    rules = [fxreg.Rule(fxreg.l1(0.07), via="proximal"), fxreg.Rule(fxreg.l2(0.015))]
    descend(fxreg.transform(model, rules), x, half_mean_square(y), curvature(x) + 0.03, 1000)
    theirs = linear_model.ElasticNet(alpha=0.1, l1_ratio=0.7, fit_intercept=False, tol=1e-14, max_iter=100_000)
    assert_is(model, theirs.fit(x.numpy(), y.numpy().ravel()).coef_)


@compiled
def test_multi_task_lasso_is_a_group_of_each_input(compiled: bool) -> None:
    x, y = diabetes(targets=3)
    model = linear(x, y)
    gm = emitted(model, fxreg.Rule(fxreg.group_lasso(0.3, dim=1), via="proximal"), compiled)
    descend(gm, x, half_mean_square(y), curvature(x), 300)
    theirs = linear_model.MultiTaskLasso(alpha=0.3, fit_intercept=False, tol=1e-14, max_iter=100_000)
    assert_is(model, theirs.fit(x.numpy(), y.numpy()).coef_)
    assert 0 < int((model.weight == 0).all(0).sum()) < x.shape[1]


@pytest.mark.slow
def test_non_negative_least_squares() -> None:
    x, y = diabetes()
    model = linear(x, y)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.non_negative()))
    descend(gm, x, half_mean_square(y), curvature(x), 1500)
    theirs = linear_model.LinearRegression(positive=True, fit_intercept=False, tol=1e-14)
    assert_is(model, theirs.fit(x.numpy(), y.numpy().ravel()).coef_)


@pytest.mark.parametrize(
    ("solver", "compiled"),
    [("saga", False), ("liblinear", False), pytest.param("liblinear", True, marks=pytest.mark.slow)],
)
def test_logistic_regression_with_l1(solver: str, compiled: bool) -> None:
    """liblinear takes the intercept for one more weight, and penalizes it; saga leaves it alone."""
    x, y = cancer()
    model, c = linear(x, y, bias=True), 0.02
    keys = {"param": "weight"} if solver == "saga" else {}
    gm = emitted(model, fxreg.Rule(fxreg.l1(1 / (c * len(x))), via="proximal", **keys), compiled)
    loss = nn.BCEWithLogitsLoss()
    descend(gm, x, lambda output: loss(output, y), curvature(torch.cat([x, 1 + 0 * y], 1)) / 4, 1200, 0.95)
    theirs = linear_model.LogisticRegression(
        C=c, l1_ratio=1.0, solver=solver, tol=1e-11, max_iter=5000, random_state=0
    ).fit(x.numpy(), y.numpy().ravel())
    assert_is(model, theirs.coef_)
    assert model.bias.item() == pytest.approx(float(theirs.intercept_[0]), abs=1e-6)


@pytest.mark.parametrize("via", slow_but(["optimizer"], ["penalty", "gradient", "optimizer", "proximal"]))
def test_ridge_by_every_lowering(via: Any) -> None:
    x, y = diabetes()
    alpha = 40.0
    model = linear(x, y)
    rule = fxreg.Rule(fxreg.l2(alpha / (2 * len(x))), via=via)
    groups = fxreg.param_groups(model, rule) if via == "optimizer" else None
    gm = fxreg.transform(model, rule)
    descend(gm, x, half_mean_square(y), curvature(x) + alpha / len(x), 1000, groups=groups)
    theirs = linear_model.Ridge(alpha=alpha, fit_intercept=False, solver="cholesky")
    assert_is(model, theirs.fit(x.numpy(), y.numpy().ravel()).coef_, sparse=False)
