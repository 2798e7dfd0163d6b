"""Train an autoencoder whose hidden units are rarely active: kl_sparsity on the outputs of its sigmoid.

    python examples/autoencoder.py [--epochs 100] [--strength 0.02] [--rho 0.05] [--no-compile]

It has more hidden units than a digit has pixels, so that nothing but the rule keeps it from copying. The rule pulls the
mean activation of each unit towards rho: for most digits most units are as good as off. The model has no line about it:
the rule finds the activations.
"""

import argparse
from collections.abc import Iterable, Sequence

import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import fxreg

BATCH = 128
UNITS = 100


def load() -> tuple[Tensor, Tensor]:
    """Three quarters of scikit-learn's 1,797 digits to train on, one quarter to test on: 64 pixels between 0 and 1."""
    images = torch.from_numpy(load_digits().data).float() / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order.split([1347, 450])
    return images[train], images[test]


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, UNITS), nn.Sigmoid())
        self.decode = nn.Linear(UNITS, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


def rules(strength: float, rho: float) -> list[fxreg.Rule]:
    return [fxreg.Rule(fxreg.kl_sparsity(strength, rho=rho), layer="Sigmoid", on="output", label="sparse")]


def error(output: Tensor, images: Tensor) -> Tensor:
    """Half the squared error of an image, on average."""
    return 0.5 * (output - images).square().sum(1).mean()


def train(images: Tensor, rules: Sequence[fxreg.Rule], epochs: int, compiled: bool) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder()
    gm = fxreg.transform(model, rules, example_inputs=(images[:2],))
    forward = torch.compile(gm, fullgraph=True) if compiled else gm
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in tqdm(range(epochs), disable=None, leave=False):  # None: no bar where there is no terminal
        for batch in torch.randperm(len(images)).split(BATCH)[:-1]:  # the last is smaller
            optimizer.zero_grad()
            error(forward(images[batch]), images[batch]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def row(name: str, model: Autoencoder, images: Tensor) -> tuple[object, ...]:
    active = model.encode(images)
    return name, float(error(model(images), images)), float(active.mean()), f"{(active < 0.1).float().mean():.0%}"


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--strength", type=float, default=0.02)
    parser.add_argument("--rho", type=float, default=0.05, help="the mean activation that each unit is to have")
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="train in eager mode")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more gain nothing on a model this small

    images, unseen = load()
    sparse = rules(options.strength, options.rho)
    print(f"{fxreg.explain(Autoencoder(), sparse)}\n")
    models = {
        "without rules": train(images, [], options.epochs, options.compiled),
        "kl_sparsity": train(images, sparse, options.epochs, options.compiled),
    }
    header = ("trained", "error", "mean activation", "units below 0.1")
    print(tabulate([row(name, model, unseen) for name, model in models.items()], header, floatfmt=".3f"))


if __name__ == "__main__":
    main()
