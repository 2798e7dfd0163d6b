"""Choose features with l1 and a proximal step, and compare with scikit-learn's Lasso, strength by strength.

    python examples/sparse_features.py [--steps 2000]

Diabetes progression is predicted from ten measurements and their 45 products. fxreg trains a linear layer, from
scratch, by gradient steps and a soft threshold; scikit-learn solves the same problem by coordinate descent. They choose
the same features: those that are left out have weights of exactly 0.
"""

import argparse
from collections.abc import Iterable
from typing import NamedTuple

import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxreg

STRENGTHS = (20.0, 10.0, 5.0, 2.0, 1.0)


class Data(NamedTuple):
    features: Tensor  # N×55, of mean 0 and variance 1
    target: Tensor  # N, of mean 0
    names: list[str]


def load() -> Data:
    """Scikit-learn's 442 patients."""
    bunch = load_diabetes(scaled=False)
    products = PolynomialFeatures(degree=2, interaction_only=True, include_bias=False)
    features = StandardScaler().fit_transform(products.fit_transform(StandardScaler().fit_transform(bunch.data)))
    target = torch.from_numpy(bunch.target)
    names = list(products.get_feature_names_out(bunch.feature_names))
    return Data(torch.from_numpy(features), target - target.mean(), names)


def train(data: Data, strengths: Iterable[float], steps: int) -> Iterable[Tensor]:
    """The weights at each strength: one model, whose strength is lowered while it trains."""
    model = nn.Linear(data.features.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.0), via="proximal"), example_inputs=(data.features[:2],))
    # The loss is ½·mean((y − Xw)²), whose gradient changes at most this fast.
    steepest = torch.linalg.matrix_norm(data.features, 2) ** 2 / len(data.features)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / steepest.item())
    fxreg.ProximalStep(optimizer, gm)
    for strength in strengths:
        fxreg.strengths(gm)["l1"] = strength
        for _ in tqdm(range(steps), disable=None, leave=False):  # None: no bar where there is no terminal
            optimizer.zero_grad()
            (0.5 * (gm(data.features).squeeze(1) - data.target).square().mean()).backward()
            optimizer.step()
        yield model.weight.detach().squeeze(0).clone()


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="gradient steps at each strength")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more gain nothing on a model this small

    data = load()
    rows, chosen = [], {}
    for strength, weights in zip(STRENGTHS, train(data, STRENGTHS, options.steps), strict=True):
        lasso = Lasso(alpha=strength, fit_intercept=False, tol=1e-10, max_iter=100_000)
        theirs = torch.from_numpy(lasso.fit(data.features.numpy(), data.target.numpy()).coef_)
        chosen[strength] = [name for name, weight in zip(data.names, weights, strict=True) if weight]
        same = torch.equal(weights != 0, theirs != 0)
        explained = 1 - (data.features @ weights - data.target).square().sum() / data.target.square().sum()
        rows.append((strength, len(chosen[strength]), int((theirs != 0).sum()), "yes" if same else "no",
                     f"{(weights - theirs).abs().max():.0e}", f"{explained:.1%}"))  # fmt: skip
    header = ("strength", "features", "Lasso's", "the same", "largest difference", "variance explained")
    print(tabulate(rows, header))
    print(f"\nThe features at {STRENGTHS[2]:g}: {', '.join(chosen[STRENGTHS[2]])}")


if __name__ == "__main__":
    main()
