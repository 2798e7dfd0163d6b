"""Where the columns of X are orthonormal, the minimizer of ½‖Y − X·Wᵀ‖² + s·R(W) is the proximal operator of R at
(XᵀY)ᵀ, in closed form: the convex reference for what scikit-learn has no solver of. The data are scikit-learn's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import datasets, linear_model
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import fxreg

Array = np.ndarray[Any, np.dtype[np.float64]]


def problem() -> tuple[Tensor, Tensor]:
    """Ten measurements of 569 tumours from twenty others, made orthonormal."""
    data = StandardScaler().fit_transform(datasets.load_breast_cancer().data)
    return torch.from_numpy(np.linalg.qr(data[:, :20])[0].copy()), torch.from_numpy(data[:, 20:].copy())


def soft(w: Array, threshold: float) -> Array:
    return np.sign(w) * np.maximum(np.abs(w) - threshold, 0)


def by_rows(w: Array, threshold: float) -> Array:
    norms = np.sqrt((w**2).sum(1, keepdims=True))
    return w * np.maximum(0, 1 - threshold / norms)


def singular(w: Array, threshold: float) -> Array:
    left, values, right = np.linalg.svd(w, full_matrices=False)
    return left @ np.diag(np.maximum(values - threshold, 0)) @ right


CASES: dict[str, tuple[Any, Callable[[Array], Array]]] = {
    "l1": (fxreg.l1(3.0), lambda w: soft(w, 3.0)),
    "elastic_net": (fxreg.elastic_net(3.0, 0.5), lambda w: soft(w, 3.0) / 2),
    "group_lasso of the outputs": (fxreg.group_lasso(22.5), lambda w: by_rows(w, 22.5)),
    "group_lasso of the inputs": (fxreg.group_lasso(5.0, dim=1), lambda w: by_rows(w.T, 5.0).T),
    "sparse_group_lasso": (fxreg.sparse_group_lasso(l1=2.0, group=17.0), lambda w: by_rows(soft(w, 2.0), 17.0)),
    "nuclear_norm": (fxreg.nuclear_norm(12.0), lambda w: singular(w, 12.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_training_ends_at_the_minimizer_with_its_zeros_and_its_rank(name: str) -> None:
    effect, prox = CASES[name]
    x, y = problem()
    without = (x.T @ y).T.numpy()
    wanted = prox(without)
    model = nn.Linear(20, 10, bias=False, dtype=torch.float64)
    gm = fxreg.transform(model, fxreg.Rule(effect, via="proximal"), example_inputs=(x[:2],))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fxreg.ProximalStep(optimizer, gm)
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (gm(x) - y).square().sum()).backward()
        optimizer.step()
    found = model.weight.detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
    rank = np.linalg.matrix_rank(wanted)
    zeros = int((wanted == 0).sum())
    if name == "nuclear_norm":
        assert 0 < rank < np.linalg.matrix_rank(without)
    else:
        assert 0 < zeros < wanted.size
        np.testing.assert_array_equal(found == 0, wanted == 0)
    assert np.linalg.matrix_rank(found) == rank


@pytest.mark.parametrize(
    ("via", "backend"),
    [
        ("penalty", "aot_eager"), ("gradient", "aot_eager"), ("optimizer", "aot_eager"),
        pytest.param("penalty", "inductor", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_ridge_by_every_lowering_under_compile(via: Any, backend: str) -> None:
    """Of any design: scikit-learn's own solver has it. It minimizes ‖y − Xw‖² + α·‖w‖²."""
    torch._dynamo.reset()
    data = StandardScaler().fit_transform(np.column_stack(datasets.load_diabetes(return_X_y=True)))
    x, y = torch.from_numpy(data[:, :-1].copy()), torch.from_numpy(data[:, -1:].copy())
    alpha = 30.0
    wanted = linear_model.Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(x.numpy(), y.numpy()).coef_
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    rule = fxreg.Rule(fxreg.l2(alpha), via=via)
    compiled = torch.compile(fxreg.transform(model, rule, example_inputs=(x[:2],)), backend=backend, fullgraph=True)
    steepest = 2 * (float(torch.linalg.matrix_norm(x, 2)) ** 2 + alpha)
    optimizer = torch.optim.SGD(fxreg.param_groups(model, rule), lr=1 / steepest)
    for _ in range(1500):
        optimizer.zero_grad()
        (compiled(x) - y).square().sum().backward()
        optimizer.step()
    np.testing.assert_allclose(model.weight.detach().numpy()[0], np.ravel(wanted), rtol=0, atol=1e-6)
