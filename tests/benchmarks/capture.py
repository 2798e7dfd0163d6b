"""What `fxreg.transform` costs beside `torch.fx.symbolic_trace`: `python -m tests.benchmarks.capture`.

Both run on the same model, in turns; the ratio is that of their best times. The numbers and what they mean are in
docs/cost.md.
"""

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

import fxreg

RULE = fxreg.Rule(fxreg.l2(1e-4), layer="Linear", param="weight")


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.linear(x))


class BasicBlock(nn.Module):
    """The block of a small ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    def __init__(self, channels: int = 4, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(BasicBlock(channels) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))


class EncoderLayer(nn.Module):
    """A transformer encoder's layer, or a decoder's without its mask: attention and MLP behind norms."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.activation(self.up(self.norm2(x))))


def stack(blocks: int, nested: int = 1) -> nn.Module:
    """MLP blocks one behind the other, in that many groups."""
    if nested == 1:
        return nn.Sequential(*(Block() for _ in range(blocks)))
    return nn.Sequential(*(stack(blocks // nested) for _ in range(nested)))


def encoder(layers: int, width: int = 8, hidden: int = 16, heads: int = 2) -> nn.Module:
    return nn.Sequential(*(EncoderLayer(width, hidden, heads) for _ in range(layers)))


def huge() -> nn.Module:
    """400 billion parameters that take no memory."""
    with torch.device("meta"):
        return encoder(126, width=16_384, hidden=65_536, heads=128)


@dataclass(frozen=True)
class Case:
    """A model, and the rules on it."""

    name: str
    model: Callable[[], nn.Module]
    rules: list[fxreg.Rule] = field(default_factory=lambda: [RULE])
    repeats: int = 5


def cases() -> list[Case]:
    each = [fxreg.Rule(fxreg.l2(1e-4), name=f"{i}.linear", param="weight") for i in range(200)]
    return [
        Case("MLP, 100 layers", lambda: stack(100), repeats=15),
        Case("MLP, 200 layers, a rule for each", lambda: stack(200), each, repeats=15),
        Case("MLP, 1,000 layers", lambda: stack(1_000), repeats=9),
        Case("MLP, 3,000 layers", lambda: stack(3_000)),
        Case("MLP, 10,000 layers", lambda: stack(10_000)),
        Case("MLP, 100 × 100 layers", lambda: stack(10_000, nested=100)),
        Case("ResNet, 8 blocks", ResNet, repeats=25),
        Case("transformer encoder, 12 layers", lambda: encoder(12), repeats=25),
        Case("transformer, 126 layers on meta", huge, repeats=9),
    ]


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes, without what its garbage costs the next."""
    gc.collect()
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def measure(case: Case) -> list[str]:
    """A row of the table."""
    model = case.model()
    trace, transform = (lambda: fx.symbolic_trace(model)), (lambda: fxreg.transform(model, case.rules))
    trace(), transform()  # imports, caches
    pairs = [(seconds(trace), seconds(transform)) for _ in range(case.repeats)]
    traced, transformed = map(list, zip(*pairs, strict=True))
    best = min(transformed) / min(traced)
    typical = statistics.median(b / a for a, b in pairs)
    size = sum(parameter.numel() for parameter in model.parameters())
    shown = [f"{1000 * time:,.1f}" for time in (min(traced), statistics.median(traced))]
    shown += [f"{1000 * time:,.1f}" for time in (min(transformed), statistics.median(transformed))]
    return [case.name, f"{size:,}", *shown, f"{best:.2f}", f"{typical:.2f}"]


def machine() -> str:
    """Where it runs."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return f"{os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    header = ["model", "parameters", "trace min ms", "median", "transform min ms", "median", "ratio of min", "median"]
    rows = [measure(case) for case in cases() if arguments.only in case.name]
    print(f"{machine()}\n\n{tabulate(rows, header, 'github', disable_numparse=True)}")


if __name__ == "__main__":
    main()
