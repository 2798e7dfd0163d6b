"""Train a small CNN on handwritten digits, without and with rules, and see what the rules did.

    python examples/quickstart.py [--epochs 20] [--no-compile]

The rules thin out the convolutions and keep the head small and its gradient bounded. An L1 gradient oscillates around
zero and reaches no exact zeros, so *sparsity* here is the share of convolution weights smaller than 0.001.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fxreg

L1 = 2e-3
WARM_UP = 5  # epochs until the L1 strength is reached
BATCH = 32

RULES = [
    fxreg.Rule(fxreg.l1(L1), layer="Conv2d", param="weight", label="sparse"),
    fxreg.Rule(fxreg.l2(1e-3), name="head", param="weight", label="small"),
    fxreg.Rule(fxreg.clip_norm(1.0), name="head", label="clip"),
]


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
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(F.dropout(x.flatten(1), 0.2, self.training))


@dataclass(frozen=True)
class Epoch:
    """What a model is like after an epoch; `loss` is the cross entropy of the epoch, without penalties."""

    loss: float
    accuracy: float
    sparsity: float
    penalties: dict[str, float]

    def __str__(self) -> str:
        penalties = "".join(f"  {label} {value:.3f}" for label, value in self.penalties.items())
        return f"loss {self.loss:.3f}  accuracy {self.accuracy:.1%}  sparsity {self.sparsity:5.1%}{penalties}"


@torch.no_grad()
def accuracy(model: CNN, digits: Digits) -> float:
    return (model.eval()(digits.images).argmax(1) == digits.labels).float().mean().item()


@torch.no_grad()
def sparsity(model: CNN) -> float:
    weights = torch.cat([model.conv1.weight.flatten(), model.conv2.weight.flatten()])
    return (weights.abs() < 1e-3).float().mean().item()


def train(rules: Sequence[fxreg.Rule], epochs: int, compiled: bool = True) -> list[Epoch]:
    """Train a CNN under the rules: the emitted module is trained, the model itself is evaluated."""
    digits, unseen = load()
    torch.manual_seed(0)
    model = CNN()
    gm = fxreg.transform(model, rules, example_inputs=(digits.images[:2],))
    forward = torch.compile(gm, fullgraph=True) if compiled else gm
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    for epoch in tqdm(range(1, epochs + 1), disable=None, leave=False):  # None: no bar where there is no terminal
        if rules:
            fxreg.strengths(gm)["sparse"] = L1 * min(1, epoch / WARM_UP)  # live: nothing is compiled again
        model.train()
        losses = []
        for batch in torch.randperm(len(digits.labels)).split(BATCH)[:-1]:  # the last is smaller
            loss = F.cross_entropy(forward(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        penalties = {label: value.item() for label, value in fxreg.penalties(gm).items()}
        history.append(Epoch(sum(losses) / len(losses), accuracy(model, unseen), sparsity(model), penalties))
        tqdm.write(f"{epoch:3}  {history[-1]}")
    return history


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--no-compile", dest="compiled", action="store_false", help="train in eager mode")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more gain nothing on a model this small

    print("Without rules\n")
    without = train([], options.epochs, options.compiled)
    print(f"\nWith rules\n\n{fxreg.explain(CNN(), RULES)}\n")
    under = train(RULES, options.epochs, options.compiled)
    print(f"\nThe rewritten graph\n\n{fxreg.diff(fxreg.transform(CNN(), RULES))}")
    print(f"\nIn the end\n\nwithout rules  {without[-1]}\nwith rules     {under[-1]}")


if __name__ == "__main__":
    main()
