"""Models that a tracer gets wrong: one for each way in which a forward pass can be more than a graph.

Plain `torch.fx.symbolic_trace` refuses every one of them or, worse, returns something else without a word; the suite
checks that it does, so that no entry is here by mistake. What each entry demands of fxreg is the same: the emitted
module is the model plus its penalty, or there is an `FxregError`, and then the entry says why that is right.
"""

import array
import collections.abc
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import importlib
import itertools
import math
import os
import random
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import is_grad_enabled as grad_mode_bound_at_import
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from . import settings

Call = tuple[Any, ...] | dict[str, Any]
"""Positional or keyword arguments."""


def batches() -> list[Call]:
    """Two batches that differ in size and in the sign of their sum, the first one twice."""
    first = torch.randn(4, 3) + 2
    return [(first,), (torch.randn(2, 3) - 2,), (first,)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One adversarial model.

    Attributes:
        make: makes the model.
        note: what is adversarial about it.
        inputs: the calls to make, in this order, in train and then in eval mode; the first one is the example.
        refusal: why an `FxregError` is as right as the model's own result; "" where it is not.
        hides: why refusing to transform its gradients is right; "" where it is not.
        state: the Python state that the calls must leave as the model's own calls do.
        later: what the user does to the model after it was transformed.
        unverifiable: why verification is right to refuse; "" where it is not.
        reset: puts what is kept outside the model back to the start.
        nests: whether it maps (n, 3) to a differentiable (n, 3), so that it can stand inside another model.
    """

    make: Callable[[], nn.Module]
    note: str
    inputs: Callable[[], Sequence[Call]] = batches
    refusal: str = ""
    hides: str = ""
    unverifiable: str = ""
    state: Callable[[nn.Module], Any] = lambda model: None
    later: Callable[[nn.Module], object] = lambda model: None
    reset: Callable[[], object] = lambda: None
    remembers: bool = dataclasses.field(init=False)
    nests: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "remembers", self.state is not Case.state)


CASES: dict[str, Case] = {}


def case(note: str, **fields: Any) -> Callable[[Any], Any]:
    """Enter a model, or a function that makes one, into the table."""

    def enter(make: Any) -> Any:
        assert make.__name__ not in CASES
        CASES[make.__name__] = Case(make, note, **fields)
        return make

    return enter


class Net(nn.Module):
    """What the models have in common; they differ in what their forward does with it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.w = nn.Parameter(torch.randn(3))
        self.register_buffer("buf", torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.bn = nn.BatchNorm1d(3)


class Block(nn.Module):
    """A child that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


class Branching(Block):
    """A child that cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x) if x.sum() > 0 else torch.tanh(self.lin(x))


# The training flag.


@case("training as an argument")
class TrainingArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w


@case("training as a branch")
class TrainingBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.training:
            x = x * self.w
        return x


@case("the training flag of a child")
class ChildsTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.3, self.drop.training) * self.w


@case("the training flag of a child, as a branch")
class ChildsTrainingBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.w if self.bn.training else 2.0)


@case("the training flag of a child that is set otherwise than its parent's", later=lambda m: m.drop.eval())
class ChildsTrainingChanged(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.3, self.drop.training) * self.w


@case("training as a key")
class TrainingKey(Net):
    def forward(self, x: Tensor) -> Tensor:
        return {True: torch.relu, False: torch.tanh}[self.training](self.fc(x)) * self.w


@case("training as a key, with a default")
class TrainingKeyDefault(Net):
    def forward(self, x: Tensor) -> Tensor:
        return {True: torch.relu}.get(self.training, torch.tanh)(self.fc(x)) * self.w


@case("training as part of a name")
class TrainingName(Net):
    def run_True(self, x: Tensor) -> Tensor:  # noqa: N802
        return x * self.w

    def run_False(self, x: Tensor) -> Tensor:  # noqa: N802
        return x

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "run_%s" % self.training)(self.fc(x))  # noqa: UP031


@case("training as part of a name, with a default")
class TrainingNameDefault(TrainingName):
    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "run_" + str(self.training), self.fc)(self.fc(x))


@case("not training")
class NotTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if not self.training else self.fc(x) * self.w


@case("training and something")
class TrainingAnd(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * ((self.training and 3.0) or self.w)


@case("training compared by identity")
class TrainingIsTrue(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.w if self.training is True else 2.0)


@case("training as a number")
class TrainingNumber(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (1.0 + self.training * self.w)


@case("training as an index")
class TrainingIndex(Net):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh, torch.relu)[self.training](self.fc(x)) * self.w


@case("training read past the class")
class TrainingInDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.w if vars(self)["training"] else 2.0)


@case("stochastic depth")
class StochasticDepth(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if not self.training:
            return x + y * self.w
        return x + y * self.w * x.new_empty(x.shape[0], 1).bernoulli_(0.2)


@case("a child switched to eval mode by the forward")
class EvalInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.eval()
        return self.bn(self.fc(x)) * self.w


@case("train() overridden: batch statistics stay frozen")
class FrozenNorm(Net):
    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) * self.w * F.dropout(x.new_ones(3), 0.5, self.training)


# Gradient mode, autocast, and other modes.


@case("no_grad as a context")
class NoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.sigmoid(self.fc(x))
        return gate * self.fc(x) * self.w


@case("no_grad as a decorator")
class NoGradMethod(Net):
    @torch.no_grad()
    def gate(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.fc(x) * self.w


@case("no_grad around a child")
class NoGradChild(Net):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = Block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x)
        return self.fc(x) * self.w


@case("set_grad_enabled")
class SetGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            y = self.fc(x)
        return y * self.w


@case("set_grad_enabled without a context")
class SetGradCall(Net):
    def forward(self, x: Tensor) -> Tensor:
        before = grad_mode_bound_at_import()
        torch._C._set_grad_enabled(False)
        gate = self.fc(x)
        torch._C._set_grad_enabled(before)
        return gate * self.w


@case("enable_grad inside no_grad")
class EnableGrad(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc(x))
        with torch.enable_grad():
            return gate * self.fc(x) * self.w


@case("inference mode inside")
class Inference(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = float(self.fc(x).detach().sum())
        return self.fc(x) * scale * self.w


@case("no gradient at all", refusal="there is no backward pass for the penalty to ride on", nests=False)
class AllNoGrad(Net):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@case("the grad mode read")
class ReadsGradMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * self.w if torch.is_grad_enabled() else y


@case("the grad mode read through a name bound at import")
class ReadsGradModeBound(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y * self.w if grad_mode_bound_at_import() else y


@case("autocast inside")
class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc(x)
        return y.float() * self.w


@case("saved tensors changed on their way to the backward pass")
class SavedTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
            return y.square() * self.w


class _DoubledTanh(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.tanh.default else result


@case("a dispatch mode inside")
class DispatchMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        with _DoubledTanh():
            return torch.tanh(self.fc(x)) * self.w


@case("hooks on what is saved for the backward pass, set without a with statement")
class SavedTensorsByHand(Net):
    def forward(self, x: Tensor) -> Tensor:
        halving = torch.autograd.graph.saved_tensors_hooks(lambda t: t * 0.5, lambda t: t)
        halving.__enter__()
        y = torch.tanh(self.fc(x))
        halving.__exit__()
        return y * self.w


@case("a dispatch mode, set by a stack of contexts")
class DispatchModeOnStack(Net):
    def forward(self, x: Tensor) -> Tensor:
        stack = contextlib.ExitStack()
        stack.enter_context(_DoubledTanh())
        y = torch.tanh(self.fc(x))
        stack.close()
        return y * self.w


@case("another default data type for a while")
class DefaultDtype(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        y = torch.zeros(x.shape[0], 3)
        torch.set_default_dtype(torch.float32)
        return self.fc(x) * self.w + y


@case("a parametrization cached over two calls")
class CachedParametrization(nn.Module):
    class DropConnect(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return F.dropout(weight, 0.5, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)
        parametrize.register_parametrization(self.lin, "weight", self.DropConnect())

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.lin(torch.tanh(self.lin(x)))


@case("checkpointing", hides="recomputation may run when the substitution is over")
class Checkpointed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = TrainingArgument()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.fc(x), use_reentrant=False) * self.w


@case("reentrant checkpointing", hides="the recomputation uses the parameters themselves")
class CheckpointedReentrant(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = TrainingArgument()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.fc(x), use_reentrant=True) * self.w


# Functions with a backward of their own, and hooks.


class _Reverse(Function):
    """Gradient reversal, whose forward returns a view of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class _Straight(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class _Split(Function):
    """With setup_context, as torch.func wants it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


class _Inherited(_Reverse):
    pass


_reverse = _Reverse.apply


@case("gradient reversal")
class Reversal(Net):
    def forward(self, x: Tensor) -> Tensor:
        return _Reverse.apply(self.fc(x)) * self.w


@case("an autograd Function bound at import")
class BoundFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return _reverse(self.fc(x)) * self.w


@case("an autograd Function on a weight")
class QuantizedWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Straight.apply(self.fc.weight * 4), self.fc.bias) * self.w


@case("an autograd Function with setup_context")
class SetupContext(Net):
    def forward(self, x: Tensor) -> Tensor:
        return _Split.apply(self.fc(x)) * self.w


@case("an inherited autograd Function, kept as an attribute")
class KeptFunction(Net):
    def __init__(self) -> None:
        super().__init__()
        self.f = _Inherited.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.fc(x)) * self.w


@case("an autograd Function applied past its own apply")
class BareFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super(Function, _Reverse).apply(self.fc(x)) * self.w


@case("a tensor hook registered by the forward")
class TensorHook(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 3)
        return y * self.w


@case("a tensor hook registered by the forward without asking")
class TensorHookAlways(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.register_hook(torch.neg)
        return y * self.w


def _hooked(register: Callable[[nn.Module], object]) -> nn.Module:
    model = nn.Sequential(Block(), Block())
    register(model)
    return model


@case("a forward hook on the root")
def root_hook() -> nn.Module:
    return _hooked(lambda m: m.register_forward_hook(lambda _, args, out: out * 2))


@case("a forward pre-hook on the root")
def root_pre_hook() -> nn.Module:
    return _hooked(lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)))


@case("a backward hook on the root")
def root_backward_hook() -> nn.Module:
    return _hooked(lambda m: m.register_full_backward_pre_hook(lambda _, gout: (gout[0] * 2,)))


@case("a forward hook on a container")
def container_hook() -> nn.Module:
    return _hooked(lambda m: m[0].register_forward_hook(lambda m, args, out: out * 2 if m.training else out))


@case("a backward hook on a container")
def container_backward_hook() -> nn.Module:
    return _hooked(lambda m: m[1].register_full_backward_pre_hook(lambda _, gout: (gout[0] * 2,)))


@case("a hook on a layer that leaves features to the parent")
class FeatureHook(Net):
    """Reads what a hook on a layer of torch's own put aside."""

    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []
        self.fc.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.features.append(out)

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        y = self.fc(x) * self.w
        y = y + sum(feature.square().mean() for feature in self.features)
        self.features.clear()
        return y


@case("a hook registered by the forward")
class HookInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        handle = self.fc.register_forward_hook(lambda _, args, out: out * 2)
        y = self.fc(x) * self.w
        handle.remove()
        return y


# Randomness.


@case("random.random() as a factor")
class PythonFactor(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * random.random()


@case("random.random() as a branch")
class PythonBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w if random.random() < 0.5 else self.fc(x)


@case("random.random() in one child of several")
class PythonInChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), PythonFactor()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@case("NumPy's random numbers")
class NumpyFactor(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * float(np.random.rand())


@case("a generator of Python's own")
class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * self.rng.random()


@case("a generator of NumPy's own")
class OwnNumpyGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * float(self.rng.random())


@case("torch.rand(())")
class TorchFactor(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * torch.rand(())


@case("torch.randn of a fixed size")
class TorchNoise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.randn(3) * self.w


@case("a random branch of torch's")
class TorchBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if torch.rand(1).item() < 0.5 else self.fc(x) * self.w


@case("noise like a value, in training")
class NoiseLike(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.randn_like(x) * self.w * self.training


@case("noise of a value's shape; dropout by default; a random permutation")
class NoiseShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        mixed = x[torch.randperm(x.shape[0])]
        return self.fc(x + mixed) + F.dropout(torch.rand(x.shape)) * self.w * self.training


@case("a generator as an argument")
class GeneratorArgument(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.rand(x.shape, generator=self.generator) * self.w


@case("a seed set by the forward")
class Seeds(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.dropout(self.fc(x), 0.5) * self.w


@case("a fork of the random state")
class Forks(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.random.fork_rng(devices=[]):
            y = F.dropout(y, 0.5) * self.w
        return F.dropout(y, 0.5)


# Tensors made in the forward.


@case("zeros and ones")
class Zeros(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w + torch.zeros(3) + torch.ones(1)


@case("torch.arange of a length")
class Positions(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w + torch.arange(x.shape[1]) * (self.buf if self.training else 2)


@case("torch.tensor of Python numbers")
class Literal(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gains = [1.0, 2.0, 3.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * torch.tensor(self.gains)


@case("a tensor made by the old constructor")
class OldConstructor(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * torch.Tensor([1.0, 2.0, 3.0])


@case("an array")
class Array(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * torch.from_numpy(np.arange(3.0, dtype=np.float32))


@case("a number of NumPy's that is a Python float")
class NumpyFloat(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * np.float64(0.5) * self.w


@case("weights made by the forward")
class Initialized(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x) * self.w, nn.init.orthogonal_(torch.empty(3, 3)))


# Python state.

_OUTSIDE = "what is kept outside the model cannot be put back"


@case("a counter", state=lambda m: m.n)
class Counter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.fc(x) * self.w * self.n


class Slotted:
    __slots__ = ("__n", "last")

    def __init__(self) -> None:
        self.__n = 0

    def count(self) -> int:
        self.__n += 1
        return self.__n

    def counted(self) -> int:
        return self.__n


@case("a counter in a slot", state=lambda m: m.slotted.counted())
class CounterInSlot(Net):
    def __init__(self) -> None:
        super().__init__()
        self.slotted = Slotted()

    def forward(self, x: Tensor) -> Any:
        self.slotted.last = x
        return self.fc(x) * self.w * self.slotted.count()


class Owner:
    def __init__(self) -> None:
        self.n = 0


settings.owner = Owner()  # which is no global variable of any function's


@case(
    "a write to one of two objects",
    state=lambda m: settings.owner.n,
    reset=lambda: setattr(settings.owner, "n", 0),
)
class WritesOneOfTwo(Net):
    def __init__(self) -> None:
        super().__init__()
        self.is_kept = True

    def forward(self, x: Tensor) -> Any:
        made = Owner()
        (settings.owner if self.is_kept else made).n = x.shape[0]
        return self.fc(x) * self.w


@case("a counter written past the class", state=lambda m: m.n)
class CounterInDict(Counter):
    def forward(self, x: Tensor) -> Tensor:
        vars(self)["n"] += 1
        return self.fc(x) * self.w * self.n


@case("a list that grows", state=lambda m: len(m.log))
class Log(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1)
        return self.fc(x) * self.w * len(self.log)


@case("an array of Python's as a log", state=lambda m: list(getattr(m, "inner", m).log))
class ArrayLog(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log = array.array("d")

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(1.0)
        return self.fc(x) * len(self.log)


_KEPT = "what is taken from an iterator cannot be put back"


@case("an iterator in a list", unverifiable=_KEPT)
class ListedIterator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [iter(range(1, 100))]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(self.kept[0])


@case("an iterator that a function closes over", unverifiable=_KEPT)
class ClosedIterator(Net):
    def __init__(self) -> None:
        super().__init__()
        kept = itertools.count(1)
        self.count = lambda: next(kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.count()


_counted = itertools.count(1)


def _count_anew() -> None:
    global _counted
    _counted = itertools.count(1)


@case("a global iterator", reset=_count_anew, unverifiable=_KEPT)
class GlobalIterator(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(_counted)


_registry: dict[str, Any] = {}


class _Registry:
    count: Any


class _Counter:
    count: Any


_program: Any = types.ModuleType("program")


_registered = _Registry()


def _closing_over(count: Any) -> Any:
    return lambda: next(count)


_counting: Any = None


def _register_anew() -> None:
    global _counting
    _registry["count"] = itertools.count(1)
    _registered.count = itertools.count(1)
    _Counter.count = itertools.count(1)
    _program.count = itertools.count(1)
    _counting = _closing_over(itertools.count(1))


_register_anew()


@case("an iterator in a global dict", reset=_register_anew, unverifiable=_KEPT)
class IteratorInGlobalDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(_registry["count"])


@case("an iterator in a global object", reset=_register_anew, unverifiable=_KEPT)
class IteratorInGlobalObject(Net):
    def forward(self, x: Tensor) -> Tensor:
        for count in _registered.count:
            return self.fc(x) * count
        return x


@case("an iterator in a class", reset=_register_anew, unverifiable=_KEPT)
class IteratorInClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(_Counter.count)


@case("an iterator in a module", reset=_register_anew, unverifiable=_KEPT)
class IteratorInModule(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(_program.count)


@case("an iterator that a global function closes over", reset=_register_anew, unverifiable=_KEPT)
class IteratorInGlobalClosure(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * _counting()


@case("a list inside a dict that grows", state=lambda m: len(m.log["calls"]))
class NestedLog(Net):
    def __init__(self) -> None:
        super().__init__()
        self.log: dict[str, list[int]] = {"calls": []}

    def forward(self, x: Tensor) -> Tensor:
        self.log["calls"].append(1)
        return self.fc(x) * self.w * len(self.log["calls"])


@case("a child's list that grows", state=lambda m: len(m.child.log))
class ChildsLog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Block()
        self.child.log = []

    def forward(self, x: Tensor) -> Tensor:
        self.child.log.append(1)
        return self.child(x) * len(self.child.log)


@case("a collections.Counter", state=lambda m: dict(m.counts))
class Counts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        return self.fc(x) * self.w * self.counts["calls"]


@case("state on a plain object", state=lambda m: m.config.step)
class ObjectState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(step=0)

    def forward(self, x: Tensor) -> Tensor:
        self.config.step += 1
        return self.fc(x) * self.w / self.config.step


@case("state in an array", state=lambda m: m.counts.tolist())
class ArrayState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return self.fc(x) * self.w * float(self.counts[0])


@case("an iterator", unverifiable="an iterator cannot be put back")
class Cycle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scales = itertools.cycle([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * next(self.scales)


@case(
    "state of a class",
    unverifiable=_OUTSIDE,
    state=lambda m: type(m).calls,
    reset=lambda: setattr(ClassState, "calls", 0),
)
class ClassState(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.fc(x) * self.w * self.calls


_calls = 0


def _forget() -> None:
    global _calls
    _calls = 0
    _cache.clear()


@case("a global counter", unverifiable=_OUTSIDE, state=lambda m: _calls, reset=_forget)
class GlobalState(Net):
    def forward(self, x: Tensor) -> Tensor:
        global _calls
        _calls += 1
        return self.fc(x) * self.w * _calls


_cache: dict[int, Any] = {}


@case("a global cache of tensors", state=lambda m: type(_cache.get(3)), reset=_forget)
class GlobalCache(Net):
    def forward(self, x: Tensor) -> Tensor:
        if 3 not in _cache:
            _cache[3] = torch.ones_like(x[0]) * 2
        return self.fc(x) * self.w * _cache[3]


class _Rotary:
    """A plain object that caches what it computes."""

    cached: Any = None

    def __call__(self, x: Tensor) -> Any:
        if self.cached is None:
            self.cached = torch.ones_like(x[0]) * 2
        return self.cached


@case("a helper object that caches a tensor", state=lambda m: type(m.rotary.cached))
class ObjectCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rotary = _Rotary()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * self.rotary(x)


@case("a cache in a dict of the module", state=lambda m: list(m.cache))
class DictCache(Net):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "mask" not in self.cache:
            self.cache["mask"] = torch.ones_like(x[0]) * 2
        return self.fc(x) * self.w * self.cache["mask"]


@case("a cached property", state=lambda m: type(vars(m).get("total")))
class CachedProperty(Net):
    @functools.cached_property
    def total(self) -> Tensor:
        return self.w.detach().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * self.total


_memo: dict[str, int] = {}


@case("a default argument that remembers", unverifiable=_OUTSIDE, reset=_memo.clear, state=lambda m: dict(_memo))
class MutableDefault(Net):
    def forward(self, x: Tensor, memo: dict[str, int] = _memo) -> Tensor:
        memo["n"] = memo.get("n", 0) + 1
        return self.fc(x) * self.w * memo["n"]


@case("a buffer rebound")
class Rebound(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.buf = self.buf * 0.9 + x.detach().mean(0) * 0.1
        return self.fc(x) * self.w * self.buf


@case("a buffer rebound past the class")
class ReboundInDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        self._buffers["buf"] = self.buf * 0.9 + x.detach().mean(0) * 0.1
        return self.fc(x) * self.w * self.buf


@case("a child's buffer rebound by its parent")
class ReboundChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = TrainingArgument()

    def forward(self, x: Tensor) -> Tensor:
        self.child.buf = self.child.buf + 1
        return self.child(x) * self.child.buf


@case("a buffer updated in place in training")
class UpdatedInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.buf.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.fc(x) * self.w * self.buf.clone()


@case("a parameter clamped by the forward", hides="the substitute would be clamped in its place")
class Clamped(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.w.clamp_(0.1, 0.5)
        return self.fc(x) * self.w


@case("a child's attribute set by its parent", state=lambda m: m.child.gain)
class SetsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Block()
        self.child.gain = 0

    def forward(self, x: Tensor) -> Tensor:
        self.child.gain += 1
        return self.child(x) * self.child.gain


class _Gate(Net):
    """Leaves its auxiliary loss in an attribute, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.aux: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.aux = y.square().mean() * self.w.sum()
        return y


@case("an auxiliary loss left in a child's attribute")
class AuxiliaryAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = _Gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) + self.gate.aux


@case("an auxiliary loss left in a grandchild's attribute, collected by type")
class AuxiliaryCollected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(Block(), _Gate())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + sum(m.aux for m in self.modules() if isinstance(m, _Gate))


class _Appends(Net):
    def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:
        y = self.fc(x) * self.w
        losses.append(y.square().mean())
        return y if y.sum() > 0 else torch.tanh(y)


@case("auxiliary losses appended to an argument by an opaque child")
class AuxiliaryArgument(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _Appends(), _Appends()

    def forward(self, x: Tensor) -> Tensor:
        losses: list[Tensor] = []
        x = self.second(self.first(x, losses), losses)
        return x + sum(losses)


class _Flagged(Net):
    def __init__(self, flags: dict[str, bool]) -> None:
        super().__init__()
        self.flags = flags

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) if x.sum() > 0 else x
        return x * self.w if self.flags["on"] else x + self.w


@case("a flag switched on for the time of a child's call")
class Toggled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flags = {"on": False}
        self.child = _Flagged(self.flags)

    def forward(self, x: Tensor) -> Tensor:
        self.flags["on"] = True
        y = self.child(x)
        self.flags["on"] = False
        return y * 2


# Questions about values.


@case(
    "isinstance of an input",
    inputs=lambda: [(torch.ones(2, 3), [2.0]), (torch.ones(2, 3), torch.randn(3))],
    refusal="no example says that the argument is a list",
    nests=False,
)
class InputKind(Net):
    def forward(self, x: Tensor, scale: Any) -> Tensor:
        return self.fc(x) * self.w * (scale if isinstance(scale, Tensor) else scale[0])


@case("the exact type of an input")
class ExactType(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w if type(x) is Tensor else self.fc(x)


@case("the name of an input's type")
class TypeName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w if type(x).__name__ == "Tensor" else self.fc(x)


@case("hasattr of an input")
class HasAttribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.tensors if hasattr(x, "tensors") else x) * self.w * (2 if hasattr(x, "node") else 1)


@case("hasattr of a name that a proxy has and a tensor has not")
class HasKeys(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if hasattr(x, "keys") else self.fc(x) * self.w


@case("callable(x)")
class IsCallable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if callable(x) else self.fc(x) * self.w


@case("whether torch's functions would be overridden for a value")
class AsksForOverrides(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.w if torch.overrides.has_torch_function((x,)) else 2.0)


@case("whether a value can be called, by an abstract class")
class AbstractlyCallable(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.w if isinstance(x, collections.abc.Callable) else 2.0)


@case("a question whether this is being traced")
class AsksForProxies(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if isinstance(x, torch.fx.Proxy) else self.fc(x) * self.w


@case("an attribute with a default")
class AttributeDefault(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * getattr(x, "gain", 2.0)


@case("a branch on a value")
class ValueBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w if x.sum() > 0 else self.fc(x)


@case("a branch on a shape")
class ShapeBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w if x.shape[0] > 3 else self.fc(x)


@case("an assertion on a shape")
class ShapeAssertion(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        return self.fc(x) * self.w


def _dtypes() -> list[Call]:
    return [(torch.randn(2, 3),), (torch.randn(2, 3).double(),)]


@case("a branch on the dtype", inputs=_dtypes)
class DtypeBranch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.dtype == torch.float32 else self.fc(x.float()) * self.w


@case("the dtype as a string", inputs=_dtypes)
class DtypeString(DtypeBranch):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if str(x.dtype) == "torch.float32" else self.fc(x.float()) * self.w


@case("the dtype looked up in a set", inputs=_dtypes)
class DtypeSet(DtypeBranch):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.dtype in {torch.float32, torch.float16} else self.fc(x.float()) * self.w


@case("a value formatted")
class Formatted(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * len(f"{x.device} {x.ndim}")


@case("a value printed into a string by %")
class Percent(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * len("%s" % x.device)  # noqa: UP031


@case(
    "a required argument that may be None",
    inputs=lambda: [(torch.ones(2, 3), torch.ones(3)), (torch.ones(2, 3), None)],
    refusal="it was captured for a tensor",
    nests=False,
)
class RequiredNone(Net):
    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.fc.weight, self.w if bias is None else bias)


@case("an optional argument, not given", inputs=lambda: [(torch.ones(2, 3),), (torch.ones(2, 3) * 2, None)])
class OptionalNone(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones_like(x[0]) * self.w
        return self.fc(x) * mask


@case(
    "an optional argument, given and then not",
    inputs=lambda: [(torch.ones(2, 3), torch.ones(3)), (torch.ones(2, 3),)],
    refusal="it was captured with the argument given, or without",
    nests=False,
)
class OptionalGiven(OptionalNone):
    pass


@case(
    "a default that cannot be written as code",
    refusal="it is fixed at its default",
    nests=False,
    inputs=lambda: [(torch.ones(2, 3, 3),), (torch.ones(2, 3, 3), 2)],
)
class TupleDefault(Net):
    def forward(self, x: Tensor, dims: Any = (1,), factor: int = 2) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training).sum(dims) * self.w * factor


@case("a default that does not equal itself")
class NanDefault(Net):
    def forward(self, x: Tensor, fill: float = math.nan) -> Tensor:
        return self.fc(x) * (self.w if math.isnan(fill) else fill)


@case("what an opaque child returns compared with None", refusal="it was captured for a tensor")
class OpaqueNone(nn.Module):
    class Sometimes(Block):
        def forward(self, x: Tensor) -> Tensor | None:
            return None if x.sum() < 0 else self.lin(x)

    def __init__(self) -> None:
        super().__init__()
        self.child, self.fc = self.Sometimes(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.child(x)
        return self.fc(x) if y is None else F.linear(self.fc(x), self.fc.weight, y.mean(0))


def _with_and_without() -> list[Call]:
    return [((torch.ones(2, 3), torch.ones(3)),), ((torch.ones(2, 3), None),)]


_ITEM = {"refusal": "it was captured for a tensor", "nests": False}


@case("a part of an argument compared with None", inputs=_with_and_without, **_ITEM)
class PairNone(Net):
    def forward(self, pair: Any) -> Tensor:
        y = self.fc(pair[0])
        return y if pair[1] is None else y * self.w


@case("parts of an argument, unpacked, one compared with None", inputs=_with_and_without, **_ITEM)
class UnpackedNone(Net):
    def forward(self, pair: Any) -> Tensor:
        x, weight = pair
        return self.fc(x) if weight is None else self.fc(x) * self.w


@case(
    "an entry of an argument compared with None by a function",
    inputs=lambda: [({"x": x, "mask": mask},) for ((x, mask),) in _with_and_without()],
    **_ITEM,
)
class EntryNone(Net):
    def forward(self, batch: Any) -> Tensor:
        return self.fc(batch["x"]) * (2.0 if is_nothing(batch["mask"]) else self.w)


def is_nothing(value: Any) -> bool:
    return value is None


class _AsksForNone(Net):
    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return self.fc(x) if weight is None else self.fc(x) * self.w


@case("a part of an argument that a child compares with None", inputs=_with_and_without, **_ITEM)
class PairToChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = _AsksForNone()

    def forward(self, pair: Any) -> Tensor:
        return self.child(pair[0], pair[1])


@case("what an opaque child returns, compared with None by another", refusal="it was captured for a tensor")
class OpaqueToChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OpaqueNone.Sometimes(), _AsksForNone()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x, self.first(x))


@case(
    "what a layer that passes everything on returns, compared with None",
    inputs=lambda: [call[0] for call in _with_and_without()],
    **_ITEM,
)
class PassedOnNone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return self.fc(x) if self.shortcut(weight) is None else self.fc(x) * self.w


@case(
    "an index that may be None",
    inputs=lambda: [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.ones(2, 3), None)],
    **_ITEM,
)
class IndexNone(Net):
    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        y = self.fc(x)[index]
        return y if index is None else y * self.w


@case("what one of torch's functions returns, compared with None", refusal="it was captured for a tensor")
class FunctionNone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        found = F.multi_head_attention_forward(
            x, x, x, 3, 1, self.qkv, None, None, None, False, 0.0, self.out, None, need_weights=False
        )
        return found[0] if found[1] is None else found[0] * self.w


@case("whether a value has a gradient function")
class GradientFunctionNone(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if y.grad_fn is None else y * self.w


@case("whether a parameter has a gradient")
class GradientNone(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if self.w.grad is None else self.fc(x) * self.w


@case("whether a value is a view")
class BaseNone(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x._base is None else self.fc(x) * self.w


@case("the identity of what a layer returns")
class SameObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        return self.fc(x) * self.w if y is x else self.fc(x + y)


def _same_twice() -> list[Call]:
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    return [(x, y), (x, x)]


@case("the identity of two arguments", inputs=_same_twice, nests=False)
class SameArguments(Net):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return self.fc(query) * self.w if query is key else self.fc(query + key)


@case("the identity of two parameters")
class TiedQuestion(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.head.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        return self.head(self.fc(x)) * (self.w if self.head.weight is self.fc.weight else 2.0)


@case("a memo keyed by tensors")
class TensorKeys(Net):
    def forward(self, x: Tensor) -> Tensor:
        memo = {self.w: 2.0}
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * memo.get(self.w, 1.0)


@case("values sorted")
class SortedValues(Net):
    def forward(self, x: Tensor) -> Tensor:
        low, high = sorted([x.sum(), -x.sum()])
        return self.fc(x) * self.w * high + low


@case("layers sorted by a value")
class SortedLayers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in sorted(self.layers, key=lambda layer: float(layer.lin(x).detach().sum())):
            x = layer(x)
        return x


@case("pattern matching")
class Matched(Net):
    def forward(self, x: Tensor) -> Tensor:
        match x.ndim:
            case 2:
                return self.fc(x) * self.w
        return x


@case("a loop over a size")
class SizeLoop(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = torch.tanh(self.fc(x))
        return x * self.w


@case("a loop over a value's rows")
class RowLoop(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.fc(row) * self.w for row in x])


# Errors caught.


@case("except Exception around what fails on proxies")
class Excepting(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        try:
            return y * self.w * float(x.detach().sum())
        except Exception:
            return y


@case("a bare except around what fails on proxies")
class BareExcept(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        try:
            return y * self.w * float(x.detach().sum())
        except:  # noqa: E722
            return y


@case("a bare except, and then a child that can be traced")
class BareExceptThenChild(Net):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        try:
            scale = float(x.detach().sum())
        except:  # noqa: E722
            scale = 1.0
        return self.block(self.fc(x)) * self.w * scale


@case("a return in a finally")
class Finally(Net):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0
        try:
            scale = float(x.detach().sum())
        finally:
            return self.fc(x) * self.w * scale  # noqa: B012


@case("except TypeError around torch.finfo")
class FloatInfo(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        try:
            tiny = torch.finfo(y.dtype).eps
        except TypeError:
            tiny = 1.0
        return y * self.w + tiny


@case("except Exception around an argument that no graph holds")
class ExceptArgument(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.w
        try:
            y = y + y.new_empty(3).normal_(generator=self.generator)
        except Exception:
            return y
        return y


@case("suppressed errors")
class Suppressed(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with contextlib.suppress(Exception):
            y = y * {torch.float32: 2.0}[y.dtype]
        return y * self.w


@case("an operation that fails for some inputs, and a way around it")
class Cholesky(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.w
        matrix = y.detach().T @ y.detach() + torch.diag(self.buf) * x.detach().sum()
        try:
            return y @ torch.linalg.cholesky(matrix)
        except RuntimeError:
            return y


@case("a child that fails for some inputs, and a way around it")
class FailingChild(nn.Module):
    class Positive(Block):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() < 0:
                raise ValueError("negative")
            return self.lin(x)

    def __init__(self) -> None:
        super().__init__()
        self.child, self.fc = self.Positive(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.child(x)
        except ValueError:
            return self.fc(x)


# In-place operations and aliases.


@case("an input changed in place")
class ChangesInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.fc(x) * self.w * (2 if self.training else 1)


@case("a view saved before the base changes")
class SavedView(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).clone()
        view = y[:, :2]
        y += self.w
        y[:, 0] = 0
        y[y < 0] = 0.5
        return y * (view.sum() + self.training)


@case("out= and in-place methods")
class OutArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).clone().mul_(2).relu_()
        torch.add(x.detach().mean(0), 1, out=self.buf)
        return y * self.w * self.buf.clone() + torch.zeros(3)


@case("an attribute set on a value")
class SetsAttribute(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.fc(x), 0.5, self.training)
        y.scale = 2.0
        return y * self.w * y.scale


@case("the data of a value replaced")
class SetsData(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.data = y.data * 2
        return y * self.w


@case("a value copied by copy.copy")
class Copied(Net):
    def forward(self, x: Tensor) -> Tensor:
        return copy.copy(self.fc(x)) * self.w + self.fc(x)


@case("an input copied by copy.deepcopy", nests=False)
class DeepCopied(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = copy.deepcopy(x)
        y += 1
        return self.fc(x + y) * self.w


# The forms of arguments and results.


@case(
    "star arguments",
    inputs=lambda: [(torch.ones(2, 3), torch.ones(3)), (torch.randn(4, 3), torch.ones(3))],
    nests=False,
)
class StarArguments(Net):
    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.fc(sum(xs)) * self.w + sum(more.values())


@case(
    "keyword-only arguments and defaults",
    inputs=lambda: [{"x": torch.ones(2, 3), "scale": torch.ones(3)}, {"scale": torch.ones(3), "x": torch.ones(1, 3)}],
    nests=False,
)
class KeywordOnly(Net):
    def forward(self, x: Tensor, power: int = 2, *, scale: Tensor, flip: bool = False) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) ** power * scale * (-self.w if flip else self.w)


@case(
    "a dict as the input",
    nests=False,
    inputs=lambda: [({"a": torch.ones(2, 3)},), ({"a": torch.ones(1, 3), "b": torch.ones(3)},)],
)
class DictInput(Net):
    def forward(self, batch: Any) -> Tensor:
        return self.fc(batch["a"]) * (batch["b"] if len(batch) > 1 else self.w)


@case("a list as the input", nests=False, inputs=lambda: [([torch.ones(2, 3)] * 2,), ([torch.ones(1, 3)] * 3,)])
class ListInput(Net):
    def forward(self, xs: Any) -> Tensor:
        return torch.stack([self.fc(x) for x in xs]).sum(0) * self.w * len(xs)


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


@case("a named tuple as the input", nests=False, inputs=lambda: [(Batch(torch.ones(2, 3), torch.ones(3)),)])
class BatchInput(Net):
    def forward(self, batch: Any) -> Tensor:
        return F.dropout(self.fc(batch.x), 0.5, self.training) * batch.y * self.w


@case("unpacking of the wrong size", inputs=lambda: [(torch.ones(2, 3),), (torch.ones(3, 3),)], nests=False)
class Unpacks(Net):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x
        return self.fc(first) * self.w + F.dropout(second, 0.5, self.training)


@case("a shape unpacked with a star, and spread")
class SpreadShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        *batch, width = x.shape
        return self.fc(x).view(*batch, width) * self.w


@case("chained iterators unpacked", inputs=lambda: [(torch.ones(2, 3),)], nests=False)
class ChainUnpacked(Net):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = itertools.chain([self.w], x)
        return self.fc(second + third) * first


class Pair(NamedTuple):
    out: Tensor
    count: int


@dataclasses.dataclass
class Result:
    out: Tensor
    count: int = 3
    nothing: Any = None


class Rows(list):  # type: ignore[type-arg]
    pass


@case("a named tuple as the output", nests=False)
class PairOutput(Net):
    def forward(self, x: Tensor) -> Pair:
        return Pair(F.dropout(self.fc(x), 0.5, self.training) * self.w, 3)


@case("a dataclass as the output", nests=False)
class DataclassOutput(Net):
    def forward(self, x: Tensor) -> Result:
        return Result(F.dropout(self.fc(x), 0.5, self.training) * self.w)


@case("an ordered dict as the output", nests=False)
class OrderedOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return collections.OrderedDict(out=F.dropout(self.fc(x), 0.5, self.training) * self.w, n=3)


@case("a subclass of list as the output, inside a tuple", nests=False)
class RowsOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return 1, Rows([F.dropout(self.fc(x), 0.5, self.training) * self.w])


@case("everything as the output", nests=False)
class MixedOutput(Net):
    def forward(self, x: Tensor) -> Any:
        y = F.dropout(self.fc(x), 0.5, self.training) * self.w
        return {"y": [y, (y, None)], 1: x, "n": 3, "s": slice(1, None), "inf": math.inf, "size": torch.Size([3])}


@case("the training flag as an output", nests=False)
class FlagOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.w, self.training


@case("a set of strings as an output", nests=False)
class SetOutput(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * self.w, {"a"}


def _other_gain(model: nn.Module) -> None:
    vars(model)["gain"] = 5.0


class Gained(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain = 2.0


@case("an attribute that no class hears of", later=_other_gain, nests=False)
class AttributeOfObject(Gained):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * object.__getattribute__(self, "gain")


@case("an attribute of the state", later=_other_gain, nests=False)
class AttributeOfState(Gained):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.__getstate__()["gain"]  # type: ignore[operator]


@case("an attribute of a copy", later=_other_gain, nests=False)
class AttributeOfCopy(Gained):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * copy.copy(self).gain


@case("a generator", refusal="a generator's tensors cannot be seen before it is run", nests=False)
class Generates(Net):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield self.fc(x) * self.w


class Axis(enum.IntEnum):
    ROWS = 1


class Named(float):
    """Says another number than it is."""

    def __repr__(self) -> str:
        return "7.0"


@case("a number that is written otherwise than it computes")
class NamedNumber(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Named(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w * self.scale


@case("an enumeration as an argument of an operation", nests=False)
class EnumArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training).sum(Axis.ROWS)


# Modules and parameters in unusual places.


@case("layers in a plain list", hides="an unregistered layer's parameters are not the model's")
class PlainList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(3, 3), Block()]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x) * self.w


@case("a layer in a plain list that shares a parameter", hides="it is reached past its registered name")
class SharedUnregistered(Net):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(3, 3)
        self.weight, self.layers = layer.weight, [layer]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](self.fc(x)) * self.w


@case("a layer made by the forward")
class MadeInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.LayerNorm(3)(self.fc(x)) * self.w


@case(
    "a module under two names, hooked later under the second",
    later=lambda m: m.b.register_forward_hook(lambda _, args, out: out * 2),
    refusal="it changed after the capture",
)
class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.a(self.b(x)), 0.5, self.training)


@case("a parameter in a plain list as well", hides="it would be used untransformed from there")
class ListedParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.listed = [self.w]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.listed[0] if self.training else self.fc(x)


@case("a parameter in a closure", hides="it would be used untransformed from there")
class ClosedParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        w = self.w
        self.scale = lambda x: x * w

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.fc(x)) if self.training else self.fc(x)


@case("a parameter in a partial function", hides="it would be used untransformed from there")
class PartialParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = functools.partial(torch.mul, self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.fc(x)) if self.training else self.fc(x)


@case("a parameter in a weak reference", hides="it would be used untransformed from there")
class WeakParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weak = weakref.ref(self.w)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weak()
        return self.fc(x) * w if self.training and w is not None else self.fc(x)


@case("a parameter kept by a plain object", hides="it would be used untransformed from there")
class HeldParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.held = types.SimpleNamespace(w=self.w)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.held.w if self.training else self.fc(x)


@case("a view of a parameter made at the start", hides="its gradient reaches the parameter past its name")
class ParameterView(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = [self.w[0]]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.first[0] * self.w


@case("a view of a parameter in an attribute", hides="its gradient reaches the parameter past its name")
class ParameterViewAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.w[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.first * self.w


@case("the parameters iterated")
class OwnPenalty(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.w + 0.01 * sum(p.square().sum() for p in self.parameters())


@case("the parameters by name, and lists of parameters")
class ParameterContainers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.ParameterList([torch.ones(3), torch.ones(3)])
        self.named = nn.ParameterDict({"a": torch.ones(3)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x) * dict(self.named_parameters())["w"], 0.5, self.training)
        return sum(x * gain for gain in self.gains) * self.named["a"]


@case("a child run with another's parameters")
class FunctionalCall(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.fc, dict(self.other.named_parameters()), (x,)) * self.w


@case(
    "a child run with an input as its weight",
    inputs=lambda: [(torch.ones(2, 3), torch.randn(3, 3)), (torch.ones(1, 3), torch.randn(3, 3))],
    nests=False,
)
class Hypernetwork(Net):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(self.fc, {"weight": weight}, (x,)) * self.w


@case("a parametrized, a pruned, and two normalized layers")
class Reparametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(3, 3))
        self.b = parametrizations.spectral_norm(nn.Linear(3, 3))
        self.c = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)
        self.block = parametrizations.orthogonal(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.c(self.b(self.a(x))), 0.5, self.training)
        return F.linear(self.block(x), self.a.weight)


@case("layers normalized by hooks, and one read afterwards")
class OldNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a = torch.nn.utils.weight_norm(nn.Linear(3, 3))
            self.b = torch.nn.utils.spectral_norm(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.dropout(self.a(x), 0.5, self.training))
        return F.linear(x, self.a.weight)


@case("a layer of the user's own, normalized by a hook")
class OldNormOwn(nn.Module):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.spectral_norm(self.Scaled())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


@case("a forward replaced on the instance")
def replaced_forward() -> nn.Module:
    model = nn.Sequential(Block(), nn.Linear(3, 3))
    block = model[0]
    block.forward = types.MethodType(lambda self, x: self.lin(x) * (2 if self.training else 1), block)
    return model


@case("a builtin as the forward", refusal="no signature says what goes in, and nothing differentiable comes out")
def builtin_forward() -> nn.Module:
    model = Net()
    model.forward = torch.relu
    return model


class _DoublesItself(Block):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


@case("__call__ overridden on a child")
class OverriddenCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.fc = _DoublesItself(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(self.child(x)), 0.5, self.training)


@case("__call__ overridden on the root")
class OverriddenRoot(_DoublesItself):
    pass


@case("a scripted child", hides="what it holds cannot be seen")
class Scripted(Net):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.child = torch.jit.script(Branching())

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(self.child(x)), 0.5, self.training) * self.w


@case("a scripted root", nests=False, refusal="its parameters cannot be shared with another module")
def scripted_root() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Branching())


@case("a compiled child")
class CompiledChild(Net):
    def __init__(self) -> None:
        super().__init__()
        self.child = torch.compile(Branching(), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(self.child(x)), 0.5, self.training) * self.w


@case("a compiled root")
def compiled_root() -> nn.Module:
    return torch.compile(Branching(), backend="eager")


@torch.compile(backend="eager")
def _compiled(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@case("a compiled function")
class CompiledFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return _compiled(self.fc(x)) * self.w


@case("vmap inside")
class Vmapped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * self.w)(self.fc(x))


@case("torch.func.grad inside")
class FunctionalGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: (self.fc(y) * self.w).square().sum())(x)


@case("torch.autograd.grad inside")
class InnerGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = F.dropout((self.fc(x) * self.w).square(), 0.5, self.training)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return slope


@case("threads")
class Threaded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([TrainingArgument(), TrainingArgument()])

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            first, second = pool.map(lambda branch: branch(x), self.branches)
        return self.fc(first + second) * self.w


@case("a module that calls itself")
class Recursive(Net):
    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        if depth == 0:
            return self.fc(x)
        y = self(x * self.w, depth - 1)
        return y if y.sum() > 0 else torch.tanh(y)


@case("children whose names the emitted module has taken", refusal="a GraphModule has no room for these names")
class TakenNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph, self.code = nn.Linear(3, 3), nn.Linear(3, 3)
        self.meta = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.code(self.graph(x)), 0.5, self.training) * self.meta


@case("a plain tensor under two names, one of them rebound later", later=lambda m: setattr(m, "a", torch.zeros(3)))
class AliasRebound(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * (self.a + 2 * self.b)


@case("a plain tensor rebound later", later=lambda m: setattr(m, "mask", torch.zeros(3)))
class PlainTensor(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * self.mask


@case("a number changed later", later=lambda m: setattr(m, "temperature", 3.0), refusal="it changed after the capture")
class Temperature(Net):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w / self.temperature


def _new_head(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.fc = nn.Linear(3, 3)


class _Patched:
    """What is set on a class later, and put back."""

    def __init__(self, name: str, before: Any, behind: Any) -> None:
        self.name, self.before, self.behind = name, before, behind

    def case(self, note: str) -> Any:
        def enter(kind: type[nn.Module]) -> Any:
            def put(value: Any) -> None:
                setattr(kind, self.name, value)

            return case(
                note,
                later=lambda model: put(self.behind),
                reset=lambda: put(self.before),
                refusal="it changed after the capture",
            )(kind)

        return enter


def _by_weight(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.fc(x), 0.5, self.training) * self.w


def _by_twice_the_weight(self: Any, x: Tensor) -> Tensor:
    return F.dropout(self.fc(x), 0.5, self.training) * self.w * 2


@_Patched("forward", _by_weight, _by_twice_the_weight).case("the forward of a class replaced later")
class ForwardReplaced(Net):
    pass


@_Patched("scaled", _by_weight, _by_twice_the_weight).case("a method of a class replaced later")
class MethodReplaced(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(x)


@_Patched("scaled", property(lambda self: self.w), property(lambda self: self.w * 2)).case("a property replaced later")
class PropertyReplaced(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.scaled


@_Patched("scales", [2.0, 3.0], [2.0, 4.0]).case("a list of a class's replaced later")
class ListReplaced(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * self.scales[1]


@_Patched("scale", 2.0, 3.0).case("a number of a class's, by the name that methods have for it")
class OwnClassNumber(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * __class__.scale  # type: ignore[name-defined]


@case(
    "a method replaced later on the instance",
    later=lambda m: setattr(m, "scaled", lambda x: x * 2),
    refusal="it changed after the capture",
)
class MethodOnInstance(Net):
    def scaled(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training) * self.w

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.fc(x))


_SCALE = contextvars.ContextVar("scale", default=2.0)


@case(
    "a context variable set later",
    later=lambda m: _SCALE.set(3.0),
    reset=lambda: _SCALE.set(2.0),
    refusal="it changed after the capture",
)
class ReadsContext(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * _SCALE.get()


@case(
    "the environment, changed later",
    later=lambda m: os.environ.update(FXREG_TEST_SCALE="3"),
    reset=lambda: os.environ.update(FXREG_TEST_SCALE="2"),
)
class ReadsEnvironment(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * float(os.environ["FXREG_TEST_SCALE"])


class _Held:
    scale = 2.0


@case(
    "an object behind a weak reference, changed later",
    later=lambda m: setattr(m.kept[0], "scale", 3.0),
    refusal="it changed after the capture",
)
class WeaklyHeld(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [_Held()]
        self.held = weakref.ref(self.kept[0])

    def forward(self, x: Tensor) -> Tensor:
        held = self.held()
        return F.dropout(self.fc(x), 0.5, self.training) * self.w * held.scale


@case("a child replaced later", later=_new_head, refusal="it changed after the capture")
class ReplacedChild(TrainingArgument):
    pass


@case(
    "a hook registered later",
    later=lambda m: m.register_forward_hook(lambda _, args, out: out * 2),
    refusal="it changed after the capture",
)
class HookedLater(TrainingArgument):
    pass


@case(
    "a parameter that was None, set later",
    later=lambda m: setattr(m, "bias", nn.Parameter(torch.ones(3))),
    refusal="it changed after the capture",
)
class LateParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.fc(x), 0.5, self.training) * self.w
        return y if self.bias is None else y + self.bias


# Roots of torch's own, and plain Python on the way.


@case("an LSTM as the root", inputs=lambda: [(torch.randn(2, 4, 3),), (torch.randn(1, 2, 3),)], nests=False)
def lstm_root() -> nn.Module:
    return nn.LSTM(3, 4, batch_first=True)


@case("a normalization as the root")
def norm_root() -> nn.Module:
    return nn.BatchNorm1d(3)


@case("a dropout that is not torch's own, as the only layer that tells train from eval")
class OwnDropout(nn.Module):
    class Dropout(nn.Dropout):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(3, 3), self.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop.forward(self.drop(self.fc(x)))


@case("a normalization called past its hooks")
class ForwardCalled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn.forward(self.fc(x)) * self.w


@case("an attention of the user's own that returns one tensor")
class OwnAttention(nn.Module):
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, x, x)[0]

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.Attention(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


@case("attention weights, wanted in training only", nests=False)
class AttentionWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=self.training)


@case("lambdas, properties, super() and dispatch by name")
class Pythonic(TrainingArgument):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.kind = (lambda x: torch.tanh(x)), "relu"
        self.layers = nn.ModuleList([Block(), Block()])

    @property
    def gain(self) -> Tensor:
        return self.w.exp()

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(torch, self.kind)(self.act(super().forward(x))) * self.gain
        for i, (layer, other) in enumerate(zip(self.layers, reversed(self.layers), strict=True)):
            x = layer(other(x)) / (i + 1)
        return functools.reduce(lambda y, layer: layer(y), self.layers, x)


# Ways to a function that asks what a proxy cannot answer.


class Asking(Net):
    """Forwards that symbolic tracing must not go through, for others to get to."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.w
        return y * 2 if type(x) is Tensor else y


@case("a question in a forward of a base class")
class BySuper(Asking):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@case("a question in a forward of a base class, by the name of that")
class ByBase(Asking):
    def forward(self, x: Tensor) -> Tensor:
        return Asking.forward(self, x)


@case("a question in a function of another module")
class ByModule(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(settings.doubled(x)) * self.w


@case("a question in a function that is imported where it is called")
class ByImport(Net):
    def forward(self, x: Tensor) -> Any:
        from .settings import doubled

        return self.fc(doubled(x)) * self.w


@case("a question in a function in a list")
class ByList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.functions = [settings.doubled]

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.functions[0](x)) * self.w


DOUBLINGS = {"it": settings.Doubling()}


@case("a question in a method of an object in a global dict")
class ByDict(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(DOUBLINGS["it"].of(x)) * self.w


@case("a question in an object that is called")
class ByMade(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(settings.Doubling()(x)) * self.w


class Labels(torch.Tensor):
    """A kind of tensor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Labels":
        return self.as_subclass(Tensor).detach().clone().as_subclass(Labels)


def _of_kinds() -> list[Call]:
    x = torch.randn(4, 3)
    return [(x,), (x.clone().as_subclass(Labels),), (x,)]


@case("whether an argument is of some kind of tensor", inputs=_of_kinds, nests=False)
class AskingForKind(Net):
    def forward(self, x: Tensor) -> Any:
        plain = x.as_subclass(Tensor)
        return self.fc(plain) * (2.0 if isinstance(x, Labels) else self.w)


def _tagged() -> list[Call]:
    x, tagged = torch.randn(4, 3), torch.randn(4, 3)
    tagged.gain = 3.0  # type: ignore[attr-defined]
    return [(x,), (tagged,), (x,)]


@case("an attribute of an argument, which the first has not", inputs=_tagged, nests=False)
class AskingForTag(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * getattr(x, "gain", self.w)


@case("whether a parameter is the one in a list", hides="it is in a list, too")
class InList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tied = [self.w]

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) * (self.w if self.w is self.tied[0] else 2.0)


@case("a module that is imported by its name")
class ByName(Net):
    def forward(self, x: Tensor) -> Any:
        return self.fc(importlib.import_module("tests.settings").doubled(x)) * self.w
