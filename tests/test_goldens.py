"""The emitted code, kind of edit by kind of edit. Goldens show shape; that the shape means the right thing is shown by
the other suites. `python -m tests.test_goldens` writes them anew: read the diff."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxreg

FOLDER = Path(__file__).parent / "goldens"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.decode = nn.Linear(3, 5, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.embed(tokens))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.lin(x).relu())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(x) * self.gain


class Gate(nn.Module):
    """Opaque: it branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.sum() > 0 else x


class Nested(nn.Module):
    def __init__(self, inner: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.body = nn.Sequential(inner(), nn.Dropout(0.5))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.nn.functional.dropout(self.body(self.stem(x)), 0.1, self.training) * scale


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.lin(x).square().mean()}


def leaf() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


L1 = fxreg.Rule(fxreg.l1(0.1), param="weight")
CLIP = fxreg.Rule(fxreg.clip_norm(1.0), param="weight")
GOLDENS: dict[str, Callable[[], torch.fx.GraphModule]] = {
    "penalty_leaf": lambda: fxreg.transform(leaf(), [L1]),
    "penalty_output": lambda: fxreg.transform(leaf(), [L1, fxreg.Rule(fxreg.elastic_net(0.1, 0.2))], emit="output"),
    "penalty_loss": lambda: fxreg.transform(Loss(), [L1], emit="loss"),
    "penalty_tied": lambda: fxreg.transform(Tied(), [L1]),
    "penalty_excluded": lambda: fxreg.transform(leaf(), [fxreg.Rule(fxreg.l1(0.1), exclude=("0.*", "*.bias"))]),
    "gradient_leaf": lambda: fxreg.transform(leaf(), [CLIP]),
    "gradient_tied": lambda: fxreg.transform(Tied(), [CLIP]),
    "gradient_twice": lambda: fxreg.transform(Twice(), [CLIP, fxreg.Rule(fxreg.scale(0.5))]),
    "gradient_joint": lambda: fxreg.transform(
        leaf(), [fxreg.Rule(fxreg.clip_value(0.1), param="bias"), fxreg.Rule(fxreg.clip_global_norm(1.0)), CLIP]
    ),
    "gradient_nested": lambda: fxreg.transform(Nested(), [fxreg.Rule(fxreg.l2(0.1), via="gradient"), CLIP]),
    "gradient_opaque": lambda: fxreg.transform(Nested(Gate), [CLIP, fxreg.Rule(fxreg.freeze(), param="bias")]),
    "gradient_arguments": lambda: fxreg.transform(
        Twice(),
        [fxreg.Rule(fxreg.mask(torch.eye(3)), param="weight"), fxreg.Rule(fxreg.add_noise(0.1), param="weight")],
    ),
    "optimizer": lambda: fxreg.transform(leaf(), [fxreg.Rule(fxreg.l2(0.1), via="optimizer")]),
    "opaque_root": lambda: fxreg.transform(Gate(), [L1, CLIP]),
    "no_rules": lambda: fxreg.transform(Nested(), []),
}


def code_of(name: str) -> str:
    """The code, with the fingerprints of formulas left out: they change with every edit of a formula."""
    return re.sub(r"(torch\.ops\.fxreg\.\w+)\.x[0-9a-f]{8}\(", r"\1(", str(GOLDENS[name]().code)).strip() + "\n"


@pytest.mark.parametrize("name", GOLDENS)
def test_the_emitted_code_is_the_golden_one(name: str) -> None:
    assert code_of(name) == (FOLDER / f"{name}.txt").read_text()


def test_every_golden_is_used() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(GOLDENS)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in GOLDENS:
        (FOLDER / f"{name}.txt").write_text(code_of(name))
