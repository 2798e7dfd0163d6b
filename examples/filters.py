"""Remove whole filters of a small CNN for handwritten digits: group lasso, by a proximal step.

    python examples/filters.py [--epochs 20] [--strength 0.02] [--no-compile]

A group is one output channel of a convolution. Trained by a penalty in the loss its weights would become small; by
`via="proximal"` they become exactly 0, all of a filter at once. Filters of zeros are then cut out, and the smaller
network gives the same answers.
"""

import argparse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxreg

BATCH = 32
FILTERS = (16, 32)


class Digits(NamedTuple):
    images: Tensor  # N×1×8×8, between 0 and 1
    labels: Tensor  # N


def load() -> tuple[Digits, Digits]:
    """Three quarters of scikit-learn's 1,797 digits to train on, one quarter to test on."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order.split([1347, 450])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


class CNN(nn.Module):
    """Convolutions without biases: a filter of zeros leaves a channel of zeros, which nothing behind it sees."""

    def __init__(self, first: int = FILTERS[0], second: int = FILTERS[1]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.head = nn.Linear(second * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


def rules(strength: float) -> list[fxreg.Rule]:
    return [
        fxreg.Rule(fxreg.group_lasso(strength, dim=0), layer="Conv2d", via="proximal", label="filters"),
        fxreg.Rule(fxreg.l2(1e-4), name="head", param="weight", label="small"),
    ]


def train(model: CNN, digits: Digits, rules: Sequence[fxreg.Rule], epochs: int, compiled: bool) -> None:
    torch.manual_seed(0)
    gm = fxreg.transform(model, rules, example_inputs=(digits.images[:2],))
    forward = torch.compile(gm, fullgraph=True) if compiled else gm
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.9)
    if any(rule.via == "proximal" for rule in rules):
        fxreg.ProximalStep(optimizer, gm)
    for _ in tqdm(range(epochs), disable=None, leave=False):  # None: no bar where there is no terminal
        for batch in torch.randperm(len(digits.labels)).split(BATCH)[:-1]:  # the last is smaller
            optimizer.zero_grad()
            F.cross_entropy(forward(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: CNN, digits: Digits) -> float:
    return (model(digits.images).argmax(1) == digits.labels).float().mean().item()


def filters_left(model: CNN) -> tuple[Tensor, Tensor]:
    """The indices of the filters that are not all zeros."""
    first, second = (conv.weight.detach().flatten(1).any(1).nonzero().flatten() for conv in (model.conv1, model.conv2))
    return first, second


@torch.no_grad()
def cut(model: CNN) -> CNN:
    """The same network without its filters of zeros, and without what read them; of none that are left, one stays."""
    first, second = (left if len(left) else torch.tensor([0]) for left in filters_left(model))
    smaller = CNN(len(first), len(second))
    smaller.conv1.weight.copy_(model.conv1.weight[first])
    smaller.conv2.weight.copy_(model.conv2.weight[second][:, first])
    smaller.head.weight.copy_(model.head.weight.view(10, -1, 4)[:, second].flatten(1))
    smaller.head.bias.copy_(model.head.bias)
    return smaller


def row(name: str, model: CNN, unseen: Digits) -> tuple[object, ...]:
    first, second = filters_left(model)
    size = sum(p.numel() for p in model.parameters())
    return name, f"{len(first)} of {FILTERS[0]}", f"{len(second)} of {FILTERS[1]}", f"{size:,}", accuracy(model, unseen)


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--strength", type=float, default=0.02)
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="train in eager mode")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more gain nothing on a model this small

    digits, unseen = load()
    torch.manual_seed(0)
    without, sparse = CNN(), CNN()
    print(f"{fxreg.explain(sparse, rules(options.strength))}\n")
    train(without, digits, [], options.epochs, options.compiled)
    train(sparse, digits, rules(options.strength), options.epochs, options.compiled)
    smaller = cut(sparse)
    models = {"without rules": without, "group lasso": sparse, "filters of zeros cut out": smaller}
    header = ("trained", "conv1", "conv2", "parameters", "accuracy")
    print(tabulate([row(name, model, unseen) for name, model in models.items()], header, floatfmt=".1%"))
    difference = (sparse(unseen.images) - smaller(unseen.images)).abs().max()
    print(f"\nThe smaller network's outputs differ by {difference:.1g}.")


if __name__ == "__main__":
    main()
