"""The models that the suite regularizes, each with inputs: small, and one for each thing that goes wrong elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = torch.tanh(self.fc2(self.fc2(x)))  # called twice
        return self.fc3(x)


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.features(x), 0.25, self.training)
        return self.head(self.drop(x.flatten(1)))


class Transformer(nn.Module):
    """A block with tied embeddings, of our own making: attention by hand, pre-norm, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(0.1 * torch.randn(5, 8))
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.decode = nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.decode(x)


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x)
        return self.head(h[-1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.mha(x, x, x, need_weights=False)
        return self.norm(x + y)


class Opaque(nn.Module):
    """A root that cannot be traced: it loops over a size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for step in range(x.shape[1]):
            h = torch.tanh(self.cell(h + self.gain * x[:, step]))
        return self.head(h)


@dataclass(frozen=True)
class Case:
    """A model, how to make it and its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    vmaps: bool = True
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.make.__name__.lower()


CASES = {
    case.name: case
    for case in (
        Case(MLP, lambda: (torch.randn(5, 6),)),
        Case(CNN, lambda: (torch.randn(4, 1, 8, 8),), vmaps=False),
        Case(Transformer, lambda: (torch.randint(0, 11, (2, 5)),)),
        Case(LSTM, lambda: (torch.randn(3, 4, 4),), vmaps=False),
        Case(Attention, lambda: (torch.randn(2, 3, 8),)),
        Case(Opaque, lambda: (torch.randn(3, 4, 4),)),
    )
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """The model and its inputs, the same for the same seed."""
    torch.manual_seed(seed)
    case = CASES[name]
    model = case.make().to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in case.inputs())
    return model, inputs
