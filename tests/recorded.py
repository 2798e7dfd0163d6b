"""Models whose forward a symbolic tracer must leave whole, and a recorder can see into: one for each way in which a
recording could hold more than the example says.

Each is called otherwise than the example afterwards: other sizes, values, kinds of arguments and modes. What each
entry demands is the same: the emitted module is the model plus its penalty, or, where the entry says why that is
right, there is an `FxregError`.
"""

import collections
import contextlib
import copy
import dataclasses
import enum
import functools
import itertools
import logging
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Call = tuple[Any, ...] | Callable[[nn.Module, nn.Module], Any]
"""Positional arguments, or what is done with the module to call and the model that it comes from."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        make: makes the model.
        note: what a recording could get wrong about it.
        example: what it is captured with.
        later: the calls to make afterwards.
        is_recorded: whether it is recorded at all; None where either is right.
        refusal: why an `FxregError` is as right as the model's own result; "" where it is not.
        state: the Python state that the calls must leave as the model's own calls do.
    """

    make: Callable[[], nn.Module]
    note: str
    example: Callable[[], tuple[Any, ...]]
    later: Callable[[], tuple[Call, ...]]
    is_recorded: bool | None = True
    refusal: str = ""
    state: Callable[[Any], Any] = lambda model: None


CASES: dict[str, Case] = {}


def batch(n: int = 4) -> tuple[Tensor]:
    return (torch.randn(n, 3) + 0.5,)


def batches() -> tuple[Call, ...]:
    return (batch(6), batch(1), batch(5), (-torch.ones(4, 3),))


def case(
    note: str, example: Any = batch, later: Any = batches, table: dict[str, Case] = CASES, **fields: Any
) -> Callable[[Any], Any]:
    """Enter a model into a table, by its method `run`."""

    def enter(cls: Any) -> Any:
        assert cls.__name__ not in table
        cls.forward = _untraced(cls.run)
        table[cls.__name__] = Case(cls, note, example, later, **fields)
        return cls

    return enter


def _untraced(run: Any) -> Any:
    """A forward that a symbolic tracer must leave whole, for the sake of a branch that is never taken."""

    @functools.wraps(run)
    def forward(self: Any, *args: Any) -> Any:
        return type(args) if self.is_odd else run(self, *args)

    return forward


class Child(nn.Module):
    """Opaque to everybody: it branches on what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return y if y.sum() > -1e9 else y * 2


class Net(nn.Module):
    """What the models have in common."""

    is_odd = False

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.op = Child()
        self.prepare()

    def prepare(self) -> None:
        """Add what a model has beside that."""


# Sizes. Whether a number is computed from one or asked of it, other batches must get their own.


class OfSize(Net):
    """Something computed from a size, and from the tensor that has it."""

    def __init__(self, compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.compute = compute

    def run(self, x: Tensor) -> Any:
        return self.op(self.fc(x)), self.compute(x.shape[0], x)

    forward = _untraced(run)


_SIZES: dict[str, Callable[[Any, Tensor], Any]] = {
    "half": lambda n, x: n / 2, "floordiv": lambda n, x: n // 3, "negative": lambda n, x: -n // 3,
    "mod": lambda n, x: n % 3, "pow": lambda n, x: n**2, "root": lambda n, x: n**0.5, "inverse": lambda n, x: n**-1,
    "exp2": lambda n, x: 2**n, "ceil": lambda n, x: math.ceil(n / 3), "floor": lambda n, x: math.floor(n / 3),
    "trunc": lambda n, x: math.trunc(n / 3), "sqrt": lambda n, x: math.sqrt(n),
    "abs": lambda n, x: abs(n - 5), "and": lambda n, x: n & 1, "shift": lambda n, x: n << 1, "xor": lambda n, x: n ^ 1,
    "min": lambda n, x: min(n, 5), "max": lambda n, x: max(n, 5), "sym_max": lambda n, x: torch.sym_max(n, 5),
    "string": lambda n, x: f"{n}", "in_tuple": lambda n, x: n in (4, 6), "range": lambda n, x: list(range(n)),
    "bool": lambda n, x: bool(n - 1), "numel": lambda n, x: x.numel(), "size_numel": lambda n, x: x.shape.numel(),
    "len": lambda n, x: len(x), "prod": lambda n, x: math.prod(x.shape), "tuple": lambda n, x: tuple(x.shape),
    "sum": lambda n, x: sum(x.shape), "plus": lambda n, x: (*x.shape[:-1], 7), "equals": lambda n, x: x.shape == (4, 3),
    "repeat": lambda n, x: [0] * n, "tensor": lambda n, x: torch.tensor([n, 2]), "arange": lambda n, x: torch.arange(n),
    "full": lambda n, x: torch.full((2,), n * 1.0), "zeros": lambda n, x: torch.zeros(x.shape),
    "slice": lambda n, x: x[: n // 2], "index": lambda n, x: x[n - 1], "view": lambda n, x: x.view(-1).view(n, 3),
    "interpolate": lambda n, x: F.interpolate(x[None], size=(n * 2,)), "pad": lambda n, x: F.pad(x, (0, n)),
    "islice": lambda n, x: list(itertools.islice(range(100), n)), "sorted": lambda n, x: sorted([n, 5, 2]),
    "chain": lambda n, x: 2 < n < 7, "rdiv": lambda n, x: 12 / n, "rmod": lambda n, x: 17 % n,
    "float_mod": lambda n, x: n % 2.5, "gcd": lambda n, x: math.gcd(n, 4), "float": lambda n, x: float(n),
    "truth": lambda n, x: (n > 4) * 2 + n, "expand": lambda n, x: x[:1].expand(n, 3), "dict": lambda n, x: {"n": n},
    "cat": lambda n, x: torch.cat([x, x]).shape[0], "linspace": lambda n, x: torch.linspace(0, 1, n),
    "branch": lambda n, x: x.mean() if n > 4 else x.sum(), "empty": lambda n, x: x[1:].mean() if n > 1 else x.sum(),
    "rows": lambda n, x: sum(row.sum() for row in x), "of_mask": lambda n, x: x[x > 0].shape[0],
    "of_nonzero": lambda n, x: (x > 0).nonzero().shape[0] * 1.0, "randperm": lambda n, x: torch.randperm(n),
    "size_of_other": lambda n, x: x.t().shape[1], "same_shape": lambda n, x: x.shape == (x + 1).shape,
}  # fmt: skip
_WHOLE = {
    "hash": lambda n, x: {n: 1}, "in_set": lambda n, x: n in {4, 6}, "format": lambda n, x: f"{n:03d}",
    "divmod": lambda n, x: divmod(n, 3), "invert": lambda n, x: ~n, "size": lambda n, x: x.shape,
}  # fmt: skip
for _name, _compute in (_SIZES | _WHOLE).items():
    _make = functools.partial(OfSize, _compute)
    CASES[f"size-{_name}"] = Case(_make, "a size", batch, lambda: batches()[:3], is_recorded=_name in _SIZES)


@case("sizes of what a layer with strides gives", lambda: (torch.randn(2, 3, 8),), lambda: (
    (torch.randn(2, 3, 9),), (torch.randn(1, 3, 12),)))  # fmt: skip
class Strided(Net):
    def prepare(self) -> None:
        self.conv = nn.Conv1d(3, 3, 3, stride=2)

    def run(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.fc(y.transpose(1, 2)) / y.shape[-1], F.interpolate(y, size=x.shape[-1])


@case("sizes of what a recurrent layer gives", lambda: (torch.randn(4, 2, 3),), lambda: ((torch.randn(5, 2, 3),),))
class Recurrent(Net):
    def prepare(self) -> None:
        self.gru = nn.GRU(3, 3)

    def run(self, x: Tensor) -> Any:
        y, h = self.gru(x)
        return self.fc(y) / y.shape[0] + h, y.shape[0]


@case("sizes through broadcasting, views and powers")
class Derived(Net):
    def run(self, x: Tensor) -> Any:
        y = 2 ** (1 - F.softmax(self.fc(self.op(x)), -1).pow(2))
        z = y.view(y.numel() // 3, 3) + self.fc.bias
        return z / z.shape[0], (z[:, :1] + z[:, :1].transpose(0, 1)).shape[1]


@case("the size of what an opaque module gives, asked", refusal="it cannot be known before the opaque module runs")
class AskedLate(Net):
    def run(self, x: Tensor) -> Any:
        y = self.op(x)
        return self.fc(y) * 2 if y.shape[0] > 4 else self.fc(y)


@case("a size passed to an opaque module")
class SizePassed(Net):
    def prepare(self) -> None:
        self.op = Sized()

    def run(self, x: Tensor) -> Any:
        return self.fc(self.op(x, x.shape[0] * 2))


class Sized(Child):
    def forward(self, x: Tensor, n: int) -> Any:
        return super().forward(x) * (n if isinstance(n, int) else 0)


@case("as many parts as the size says")
class Rows(Net):
    def run(self, x: Tensor) -> Any:
        return torch.stack([self.fc(row) for row in x.unbind(0)]) + sum(self.op(row).sum() for row in x)


# Values: what is asked of the arguments alone is asked first; everything else stays whole.


@case("a branch on the values of an argument")
class ValueBranch(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * 2 if (x > 0).any() else self.fc(x)


@case("a branch on what is derived from an argument")
class DerivedBranch(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) if x.abs().sum(-1).amax().gt(1).item() else self.op(x)


@case("a branch on values as long as what a table was cut to", lambda: (torch.ones(4, 3, 3),), lambda: (
    (torch.ones(2, 5, 3),), (-torch.ones(4, 3, 3),), (torch.ones(4, 1, 3),), (torch.ones(1, 4, 3),),
    shortened))  # fmt: skip
class CutTable(Net):
    def prepare(self) -> None:
        self.register_buffer("table", torch.arange(12.0).view(1, 4, 3))

    def run(self, x: Tensor) -> Any:
        h = self.table[:, : x.shape[1]] * 2
        y = self.fc(x) + h.sum()
        return y * h.shape[1] if (x[:, : h.shape[1]].flatten(1) > 0).all() else y


def shortened(called: nn.Module, model: nn.Module) -> Any:
    before, model.table = model.table, model.table[:, :1].clone()
    try:
        return called(torch.ones(4, 3, 3))
    finally:
        model.table = before


@case("cuts that leave little or nothing", lambda: (torch.ones(4, 3),), lambda: (
    (torch.ones(2, 3),), (torch.ones(9, 3),), (torch.zeros(6, 3),)))  # fmt: skip
class CutAway(Net):
    def run(self, x: Tensor) -> Any:
        head, rest = x[: x.shape[0] - 3], x[None, ..., : x.shape[0] // 2]
        y = self.fc(x).sum(0) * head.shape[0] + rest.shape[-1]
        return y * 2 if (x[: head.shape[0]] > 0).all() else y


@case("an assertion about values", later=lambda: (batch(2), (torch.full((2, 3), torch.nan),)))
class Asserted(Net):
    def run(self, x: Tensor) -> Any:
        assert not x.isnan().any(), "nan"
        return self.fc(x)


@case("a distribution that checks its parameters and a value", later=lambda: (
    batch(2), (torch.full((2, 3), torch.nan),), (torch.zeros(2, 3),), batch(1)))  # fmt: skip
class Distributed(Net):
    def run(self, x: Tensor) -> Any:
        y = self.op(self.fc(x))
        return -torch.distributions.LogNormal(y, y.exp(), validate_args=True).log_prob(x.abs())


@case("a write through the name that is asked later", later=lambda: ((torch.full((4, 3), 0.2),), batch(2)),
      is_recorded=False)  # fmt: skip
class WrittenThenAsked(Net):
    def run(self, x: Tensor) -> Any:
        y = x.clone()
        y.sub_(1)
        return self.fc(y) * 2 if (y > 0).any() else self.fc(y)


@case("a random branch", is_recorded=False)
class RandomBranch(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) if torch.rand(()) < 0.5 else self.op(x)


@case("a layer dropped by Python's generator", is_recorded=False)
class LayerDrop(Net):
    def run(self, x: Tensor) -> Any:
        y = self.op(x)
        return self.fc(y) if random.random() < 0.5 else y


def counts(*rows: int) -> tuple[Tensor]:
    return (torch.tensor([[1.0] * n + [-1.0] * (3 - n) for n in rows]),)


@case("a count of an argument's values, compared and used", lambda: counts(1, 2), lambda: (
    counts(2, 2, 1), counts(1, 1), counts(3, 0), counts(0, 0)))  # fmt: skip
class Counts(Net):
    def run(self, x: Tensor) -> Any:
        n = (x > 0).sum(1).max().item()
        return self.fc(x) * n + torch.arange(n).sum() if 0 < n < x.shape[1] else self.fc(x)


@case("a value as a Python number", is_recorded=False)
class Itemized(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * x.sum().item()


@case("a round trip through NumPy", is_recorded=False)
class ThroughNumPy(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * torch.from_numpy(x.detach().numpy()).sum()


@case("sizes that depend on the data")
class Unique(Net):
    def run(self, x: Tensor) -> Any:
        values, index = torch.unique((x > 0).long(), return_inverse=True)
        return self.fc(self.op(x)) * values.numel() + index


# Arguments: their kinds, and plain values among them.


class Color(enum.IntEnum):
    RED = 1
    BLUE = 2


class Pair(NamedTuple):
    x: Tensor
    n: float = 1.0


@dataclasses.dataclass
class Record:
    x: Tensor
    n: float = 1.0
    extra: Any = None


def with_x(*values: Any) -> Callable[[], tuple[Call, ...]]:
    """Calls with each of some values as the second argument."""
    return lambda: tuple((*batch(2), value) for value in values)


class Scaled(Net):
    def run(self, x: Tensor, k: Any) -> Any:
        return self.op(self.fc(x)) * k


for _name, _example, _others in (
    ("float", 2.0, (3.0, 2, True, 0.0, -0.0)), ("int", 2, (3, 2.0)), ("bool", True, (False, 1)),
    ("enum", Color.RED, (Color.BLUE, 1)),
):  # fmt: skip
    case("a number as an argument", lambda e=_example: (*batch(), e), with_x(*_others), is_recorded=_name != "enum")(
        type(f"Scaled_{_name}", (Scaled,), {"run": Scaled.run})
    )


@case("a string as an argument", lambda: (*batch(), "a"), with_x("b", "c"))
class StringArgument(Net):
    def run(self, x: Tensor, k: str) -> Any:
        return self.fc(x) * {"a": 1, "b": 2, "c": 3}[k]


@case("None as an argument", lambda: (*batch(), None), with_x(torch.ones(3), 2.0))
class NoneArgument(Net):
    def run(self, x: Tensor, k: Any) -> Any:
        return self.fc(x) * (2 if k is None else k)


@case("a list of tensors", lambda: (*batch(), [torch.ones(3)] * 2), with_x([torch.ones(3)] * 2, [torch.ones(3)], []))
class ListArgument(Net):
    def run(self, x: Tensor, k: list[Tensor]) -> Any:
        return self.fc(sum(k, x))


@case("a dict of tensors", lambda: (*batch(), {"a": torch.ones(3)}), with_x(
    {"a": torch.ones(3)}, {"b": torch.ones(3)}, {}, collections.OrderedDict(a=torch.ones(3))))  # fmt: skip
class DictArgument(Net):
    def run(self, x: Tensor, k: dict[str, Tensor]) -> Any:
        return self.fc(sum(k.values(), x)) * (1 + ("b" in k))


@case("a list that the forward changes", lambda: (*batch(), []), with_x([]), is_recorded=False)
class ListChanged(Net):
    def run(self, x: Tensor, k: list[Tensor]) -> Any:
        k.append(self.fc(x))
        return k[-1] * 2


@case("a dict that the forward changes", lambda: ({"x": torch.randn(4, 3)},), lambda: (({"x": torch.randn(2, 3)},),),
      is_recorded=False)  # fmt: skip
class DictChanged(Net):
    def run(self, k: dict[str, Tensor]) -> Any:
        k["y"] = self.fc(k["x"])
        return k


@case("a dataclass with a number", lambda: (Record(torch.randn(4, 3), 2.0),), lambda: (
    (Record(torch.randn(2, 3), 3.0),), (Record(torch.randn(2, 3), 2.0, "more"),)), is_recorded=False)  # fmt: skip
class RecordArgument(Net):
    def run(self, k: Record) -> Any:
        return self.fc(k.x) * k.n + (k.extra is None)


@case("a named tuple with a number", lambda: (Pair(torch.randn(4, 3), 2.0),), lambda: (
    (Pair(torch.randn(2, 3), 3.0),),), is_recorded=False)  # fmt: skip
class PairArgument(Net):
    def run(self, k: Pair) -> Any:
        return self.fc(k.x) * k.n


@case("a write to an argument", later=lambda: (batch(6), lambda called, model: _kept(called)))
class InputWritten(Net):
    def run(self, x: Tensor) -> Any:
        x += 1
        return self.fc(x).detach() * 2, self.op(x.clone()), x


def _kept(called: nn.Module) -> Any:
    (x,) = batch()
    return called(x), x


@case("outputs that are an argument", later=lambda: (batch(2), lambda called, model: _kept(called)))
class InputReturned(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x), x.contiguous(), x.to(torch.float32), F.dropout(x, 0.5, self.training), x.view(-1)


# Modes, kinds and contexts.


def partly(called: nn.Module, model: nn.Module) -> Any:
    model.train()
    model.block.eval()
    return called(torch.ones(4, 3))


class Block(Child):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(self.lin(x), 0.25 if self.training else 0.0, self.training)


@case("a mode of its own for a part", later=lambda: (partly, batch(2)))
class Parts(Net):
    def prepare(self) -> None:
        self.block = Block()

    def run(self, x: Tensor) -> Any:
        return self.fc(self.block(x)) * (3 if self.training else 2)


@case("other operations in evaluation")
class OtherMode(Net):
    def prepare(self) -> None:
        self.block = ModeBlock()

    def run(self, x: Tensor) -> Any:
        return self.fc(self.block(x))


class ModeBlock(Child):
    def forward(self, x: Tensor) -> Any:
        return self.lin(x).tanh() if self.training else self.lin(x)


@case(
    "two forwards in one, with objects, questions and draws of their own",
    later=lambda: (batch(2), (-torch.ones(4, 3),), partly),
)
class ByMode(Net):
    def prepare(self) -> None:
        self.block = Block()

    def run(self, x: Tensor) -> Any:
        if self.training:
            h = F.dropout(self.fc(x), 0.5)
            return {"made": Named(h, "train"), "y": self.block(h) * (2 if (x > 0).all() else 1)}
        h = self.block(x)
        return [Named(h, "eval"), self.fc(h) * x.shape[0] if x.shape[0] > 3 else h]


@case("a draw that decides, in training only", later=lambda: (batch(2), batch(7)))
class DropsInTraining(Net):
    def prepare(self) -> None:
        self.block = DropsItself()

    def run(self, x: Tensor) -> Any:
        return self.fc(self.block(x))


class DropsItself(Child):
    def forward(self, x: Tensor) -> Any:
        return x if self.training and torch.rand(()) < 0.5 else self.lin(x)


@case("an input that is to have a gradient, in training", later=lambda: (batch(2), lambda called, model: _kept(called)))
class WantsGradient(Net):
    def run(self, x: Tensor) -> Any:
        y = x * 2
        if self.training:
            y.requires_grad = True
        return self.fc(y), y.requires_grad_()


@case("a data type that is asked", later=lambda: (batch(2), (torch.ones(2, 3, dtype=torch.float64),)))
class AskedKind(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x.float()) * (2 if x.dtype == torch.float64 else 1)


def autocasting(called: nn.Module, model: nn.Module) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return called(torch.ones(4, 3))


@case("a data type that autocast decides", later=lambda: (autocasting, batch(2)))
class Autocast(Net):
    def run(self, x: Tensor) -> Any:
        y = self.fc(x)
        return y * 2 if y.dtype == torch.bfloat16 else y


@case("a part without gradients", is_recorded=False)
class NoGrad(Net):
    def run(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.fc(x)
        return self.op(x) + y


@case("a part without gradients, by a stack of contexts", is_recorded=False)
class NoGradStack(Net):
    def run(self, x: Tensor) -> Any:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        y = self.fc(x)
        stack.close()
        return self.op(x) + y


@case("a checkpoint", is_recorded=False)
class Checkpointed(Net):
    def run(self, x: Tensor) -> Any:
        return self.op(x) + checkpoint(self.fc, x, use_reentrant=False)


@case("an exception that is caught", later=lambda: (batch(2), (-torch.ones(4, 3),)), is_recorded=False)
class Caught(Net):
    def run(self, x: Tensor) -> Any:
        try:
            if (x > 0).any():
                raise ValueError
            return self.fc(x)
        except ValueError:
            return self.fc(x) * 3


# State and what opaque modules do.


@case("a table that is moved to where it is", later=lambda: (batch(2), (torch.ones(2, 3, dtype=torch.float64),)),
      state=lambda model: (model.table.dtype, model.other.dtype))  # fmt: skip
class Moved(Net):
    def prepare(self) -> None:
        self.table = torch.arange(3.0)
        self.register_buffer("other", torch.arange(3.0))

    def run(self, x: Tensor) -> Any:
        self.table = self.table.to(x.device, x.dtype)
        self.other = self.other.to(dtype=x.dtype)
        return self.fc(x.float()) * self.table + self.other


@case("a counter", is_recorded=False, state=lambda model: model.calls)
class Counted(Net):
    def prepare(self) -> None:
        self.calls = 0

    def run(self, x: Tensor) -> Any:
        try:
            return self.fc(x)
        finally:
            self.calls += 1


@case("a list of what was seen", is_recorded=False, state=lambda model: model.seen)
class Seen(Net):
    def prepare(self) -> None:
        self.seen: list[int] = []

    def run(self, x: Tensor) -> Any:
        self.seen.append(len(x))
        return self.fc(x)


@case("buffers written in place", later=lambda: (batch(6), batch(5)))
class Buffers(Net):
    def prepare(self) -> None:
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("mean", torch.zeros(3))

    def run(self, x: Tensor) -> Any:
        y = self.bn(self.fc(x))
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.mean[0] = 2 * self.mean[0]
        return self.op(y) + self.mean.clone()


@case("a buffer that is replaced", is_recorded=False)
class Rebound(Net):
    def prepare(self) -> None:
        self.register_buffer("mean", torch.zeros(3))

    def run(self, x: Tensor) -> Any:
        self.mean = 0.9 * self.mean + x.detach().mean(0)
        return self.fc(x) + self.mean


@case("a module used three times, and one made on the way")
class Reused(Net):
    def run(self, x: Tensor) -> Any:
        return nn.Sequential(self.fc, nn.ReLU(), self.fc)(self.op(x)) + self.op(self.fc(x))


@case("a generator function")
class Generating(Net):
    def rows(self, x: Tensor) -> Any:
        yield from (x * k for k in (1, 2))

    def run(self, x: Tensor) -> Any:
        return sum(self.fc(self.op(row)) for row in self.rows(x))


class Sometimes(Child):
    """Gives something else for other inputs."""

    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return (y, y * 2) if x.sum() + 0 * y.sum() > 0 else (y, None)


_KIND = "only the opaque module knows, once it has run, that it gives something of another kind"


@case("an opaque module that returns None sometimes", refusal=_KIND)
class NoneSometimes(Net):
    def prepare(self) -> None:
        self.op = Sometimes()

    def run(self, x: Tensor) -> Any:
        y, z = self.op(x)
        return self.fc(y if z is None else y + z)


class Numbered(Child):
    def forward(self, x: Tensor) -> Any:
        y = self.lin(x)
        return y, len(x), float(y.sum() > 0)


@case("an opaque module that returns numbers", is_recorded=False)
class Numbers(Net):
    def prepare(self) -> None:
        self.op = Numbered()

    def run(self, x: Tensor) -> Any:
        y, n, k = self.op(x)
        return self.fc(y) * n + k


class Remembering(Child):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {"k": torch.zeros(3)}

    def forward(self, x: Tensor) -> Any:
        y = self.lin(x) + self.kept["k"]
        return (y if y.sum() > -1e9 else y * 2), self.kept


@case("a container of an opaque module's that its parent writes", is_recorded=False)
class WritesIntoChild(Net):
    def prepare(self) -> None:
        self.op = Remembering()

    def run(self, x: Tensor) -> Any:
        y, kept = self.op(x)
        kept["k"] = torch.ones(3)
        return self.fc(y)


@case("a tensor that stands on a tensor", is_recorded=False)
class OnTensor(Net):
    def run(self, x: Tensor) -> Any:
        y = self.fc(x)
        y.mask = x > 0
        return y * y.mask


# Outputs.


@case("a dataclass as an output")
class Records(Net):
    def run(self, x: Tensor) -> Any:
        return Record(self.fc(x), x.shape[0] / 2, [self.op(x)])


@case("a named tuple and an ordered dict as outputs", is_recorded=None)
class Tuples(Net):
    def run(self, x: Tensor) -> Any:
        return Pair(self.fc(x), x.shape[0] / 2), collections.OrderedDict(y=self.op(x), n=len(x))


@dataclasses.dataclass
class Named:
    """A recipe of its own needs more than tensors."""

    y: Tensor
    name: str


class Plain:
    """An object of the user's."""

    def __init__(self, y: Tensor, n: int) -> None:
        self.y, self.more = y, {"n": n, "two": [y, y * 2]}


@case("an object with tensors inside as an output")
class Objects(Net):
    def run(self, x: Tensor) -> Any:
        return {"out": Plain(self.fc(x), x.shape[0]), "more": self.op(x)}


def appended(called: nn.Module, model: nn.Module) -> Any:
    first = called(torch.ones(2, 3))
    first["all"].append(first["y"])
    first["y"] = None
    return called(torch.ones(2, 3))


@case("containers that the caller changes", later=lambda: (appended, batch(2)))
class Containers(Net):
    def run(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"y": y, "all": [y, self.op(x)], "none": None, "n": len(x)}


# What a forward does beside computing, and that means nothing to a graph.


@case("hooks that a first call registers")
class HooksAtFirst(Net):
    is_ready = False

    def run(self, x: Tensor) -> Any:
        if not self.is_ready:
            self.is_ready = True
            self.fc.register_forward_hook(lambda module, args, output: output * 2)
        return self.fc(x)


class Making(collections.OrderedDict[str, Any]):
    """Makes a module of what is in it."""

    def __getitem__(self, name: str) -> nn.Module:
        make: type[nn.Module] = super().__getitem__(name)
        return make()


ACTIVATIONS = Making(prelu=nn.PReLU, relu=nn.ReLU)


@case("a global dict that makes what it gives")
class FromMaking(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) if "relu" in ACTIVATIONS else x


class Length:
    def __init__(self) -> None:
        self.total = 0

    def extend(self, by: int) -> int:
        self.total += by
        return self.total


@case("a counter of the call's own")
class OwnCounter(Net):
    def run(self, x: Tensor) -> Any:
        seen = Length()
        seen.extend(x.shape[0])
        return self.fc(x) * seen.extend(x.shape[1])


@case("an attribute of an object that a comprehension also sees")
class SeenInside(Net):
    def run(self, x: Tensor) -> Any:
        seen = Length()
        seen.total = x.shape[0]
        return [self.fc(x) * one.total for one in (seen, seen) if seen.total]


@case("an attribute of a copy")
class OfCopy(Net):
    def prepare(self) -> None:
        self.length = Length()

    def run(self, x: Tensor) -> Any:
        mine = copy.deepcopy(self.length)
        mine.total = x.shape[0]
        return self.fc(x) * mine.total + self.length.total


SHARED = Length()


@case("a counter of everybody's", is_recorded=False)
class GlobalCounter(Net):
    def run(self, x: Tensor) -> Any:
        SHARED.total += 4
        return self.fc(x)


@case("whether it is compiled")
class AsksWhetherCompiled(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * 2 if torch.compiler.is_compiling() else self.fc(x) + x.shape[0]


@case("whether it is compiled, by a name of its own")
class AsksByName(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * 2 if is_compiling() else self.fc(x) + x.shape[0]


@case("whether it is compiled, for nothing")
class AsksForNothing(Net):
    def run(self, x: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.fc(x) * 2
        return self.fc(x) * 2


@case("values, but where it is compiled")
class AsksValuesInEager(Net):
    def run(self, x: Tensor) -> Any:
        if not torch.compiler.is_compiling() and not (x.abs() < 1e9).all():
            raise ValueError("too much")
        return self.fc(x)


@case("whether it is traced")
class AsksWhetherTraced(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * (1 if torch.jit.is_tracing() else 3)  # type: ignore[no-untyped-call]


@case("the type of a device, beside a size")
class DeviceType(Net):
    def run(self, x: Tensor) -> Any:
        n = x.shape[0]
        return self.fc(x) * n if x.device.type == "cpu" else x


@case("a mark for Dynamo, whose settings code may ask for as well", is_recorded=False)
class Marked(Net):
    def run(self, x: Tensor) -> Any:
        h = self.fc(x)
        torch._dynamo.mark_static_address(h)
        return h * 2


@case("the data type of its own parameters", later=lambda: (autocasting, batch(2)))
class OwnKind(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x.to(next(p.dtype for p in self.parameters())))


LOGGER = logging.getLogger(__name__)


@case("a logger, whose level may be another later", is_recorded=False)
class Logged(Net):
    def run(self, x: Tensor) -> Any:
        LOGGER.debug("not shown")
        return self.fc(x)


class WithSizes:
    """What a model returns beside a tensor: sizes, in an object."""

    def __init__(self, y: Tensor, sizes: Any) -> None:
        self.y, self.sizes = y, sizes


@case("sizes in an object that it returns")
class SizesInObject(Net):
    def run(self, x: Tensor) -> Any:
        return WithSizes(self.fc(x), {"all": x.shape, "some": [x.shape[:1], (slice(0, x.shape[0]), x.shape[0])]})


@case("a distribution that it returns")
class Drawable(Net):
    def run(self, x: Tensor) -> Any:
        return torch.distributions.Normal(self.fc(x), self.fc(x).exp())


@case("an attribute that tensors may have", is_recorded=False)
class AskedTag(Net):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * getattr(x, "gain", 2.0)
