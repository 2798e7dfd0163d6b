"""Fine-tune a small CNN for handwritten digits on a few that lie on their side, and see what it still knows.

    python examples/finetuning.py [--shots 100] [--epochs 40] [--pretraining 20]

The network learns upright digits first. Then it is fine-tuned on a few that are turned by a quarter, without a rule;
with l2, which pulls the weights to zero; with l2_sp, which pulls them to where fine-tuning began; and with ewc, which
does so where the upright digits need it: where the diagonal of their Fisher information is large.
"""

import argparse
import copy
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


class Digits(NamedTuple):
    images: Tensor  # N×1×8×8, between 0 and 1
    labels: Tensor  # N

    def turned(self) -> "Digits":
        """The same by a quarter to the left."""
        return Digits(self.images.rot90(1, (2, 3)), self.labels)


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
        return self.head(x.flatten(1))


def fisher(model: CNN, digits: Digits) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: the mean over images, and over labels as the model expects them, of the
    squared gradient of the label's log-likelihood."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    log_likelihoods = F.log_softmax(model(digits.images), 1).detach()

    def log_likelihood(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return F.log_softmax(logits, 1)[0].gather(0, label[None])[0]

    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    gradients = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))
    for label in range(10):
        found = gradients(parameters, digits.images, torch.full_like(digits.labels, label))
        shares = log_likelihoods[:, label].exp() / len(digits.labels)
        for name, gradient in found.items():
            squares[name] += torch.tensordot(shares, gradient.square(), 1)
    return squares


def train(model: CNN, digits: Digits, rules: Sequence[fxreg.Rule], lr: float, epochs: int) -> None:
    """Train a model, from where it is, under the rules."""
    torch.manual_seed(0)
    gm = fxreg.transform(model, rules, example_inputs=(digits.images[:2],))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in tqdm(range(epochs), disable=None, leave=False):  # None: no bar where there is no terminal
        for batch in torch.randperm(len(digits.labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(gm(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: CNN, digits: Digits) -> float:
    return (model(digits.images).argmax(1) == digits.labels).float().mean().item()


def distance(model: CNN, start: CNN) -> float:
    """How far fine-tuning moved the weights, in the 2-norm."""
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return torch.cat([(one - other).detach().flatten() for one, other in pairs]).norm().item()


def row(name: str, model: CNN, start: CNN, unseen: Digits) -> tuple[object, ...]:
    return name, accuracy(model, unseen), accuracy(model, unseen.turned()), distance(model, start)


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=int, default=100, help="turned digits to fine-tune on")
    parser.add_argument("--epochs", type=int, default=40, help="of fine-tuning")
    parser.add_argument("--pretraining", type=int, default=20, help="epochs on upright digits")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # more gain nothing on a model this small

    digits, unseen = load()
    few = Digits(digits.images[: options.shots], digits.labels[: options.shots]).turned()
    torch.manual_seed(0)
    start = CNN()
    train(start, digits, [], 0.05, options.pretraining)
    effects = {
        "no rule": [],
        "l2": [fxreg.l2(0.01)],
        "l2_sp": [fxreg.l2_sp(0.01)],
        "ewc": [fxreg.ewc(10.0, fisher(start, digits))],
    }
    rows: list[tuple[object, ...]] = [row("before", start, start, unseen)]
    for name, effect in effects.items():
        model = copy.deepcopy(start)
        train(model, few, [*map(fxreg.Rule, effect)], 0.02, options.epochs)
        rows.append(row(name, model, start, unseen))
    print(tabulate(rows, ("fine-tuned with", "upright", "turned", "moved by"), floatfmt=("", ".1%", ".1%", ".2f")))


if __name__ == "__main__":
    main()
