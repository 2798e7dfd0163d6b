"""Keras 3 itself, on its torch backend, as the reference: its regularizers are fxreg's effects, in value, in gradient
and over a training run. Its kernels are (in, out), so that its rows are a Linear weight's columns."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg

pytestmark = pytest.mark.slow  # Keras takes seconds to import

DOUBLE, SINGLE = 1e-13, 16 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Keras, wanting float64, with a home of its own: the user's configuration is of no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "KERAS_BACKEND", "torch")
        patch.setitem(os.environ, "KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        import keras

        assert keras.backend.backend() == "torch"
        keras.config.set_floatx("float64")
        yield keras
        keras.config.set_floatx("float32")


@dataclass(frozen=True)
class Pair:
    """One regularizer: as Keras has it, for its kernel, and as an effect, for the weight.

    Attributes:
        close: the relative error of Keras's own arithmetic: what takes two tensors is float32 there, whatever they are.
        ranks: of the kernels that Keras takes.
    """

    theirs: Callable[[Any], Any]
    ours: Any
    close: float = DOUBLE
    ranks: tuple[int, ...] = (0, 1, 2, 3, 4)


PAIRS = {
    "L1": Pair(lambda keras: keras.regularizers.L1(0.3), fxreg.l1(0.3)),
    "L2": Pair(lambda keras: keras.regularizers.L2(0.3), fxreg.l2(0.3)),
    "L1L2": Pair(lambda keras: keras.regularizers.L1L2(0.3, 0.2), fxreg.elastic_net(0.3, 0.2)),
    "L1L2, only L1": Pair(lambda keras: keras.regularizers.L1L2(l1=0.3), fxreg.elastic_net(0.3, 0.0)),
    "orthogonal rows": Pair(
        lambda keras: keras.regularizers.OrthogonalRegularizer(0.3, mode="rows"),
        fxreg.orthogonal(0.3, mode="columns"),
        close=SINGLE,
        ranks=(2,),
    ),
    "orthogonal columns": Pair(
        lambda keras: keras.regularizers.OrthogonalRegularizer(0.3, mode="columns"),
        fxreg.orthogonal(0.3, mode="rows"),
        close=SINGLE,
        ranks=(2,),
    ),
}
SHAPES = {0: (), 1: (5,), 2: (4, 6), 3: (3, 4, 2), 4: (3, 2, 3, 3)}
CASES = [(name, SHAPES[rank]) for name, pair in PAIRS.items() for rank in pair.ranks]


class Held(nn.Module):
    """A parameter, and a loss that says nothing about it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return (0 * self.weight).sum()


def transposed(kernel: Tensor) -> Tensor:
    """Keras's kernel as torch has it, where it is a matrix."""
    return kernel.detach().mT.clone() if kernel.ndim == 2 else kernel.detach().clone()


def numbers(*shape: int, seed: int = 3) -> Tensor:
    """Normal, in float64, the last of them 0."""
    found = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if found.ndim:
        found.view(-1)[-1] = 0
    return found


def test_every_regularizer_of_keras_has_an_effect(keras: Any) -> None:
    kinds = keras.regularizers.Regularizer.__subclasses__()
    assert {type(pair.theirs(keras)) for pair in PAIRS.values()} == set(kinds)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_regularizers_value_and_gradient_are_keras(name: str, shape: tuple[int, ...], keras: Any) -> None:
    pair = PAIRS[name]
    kernel = numbers(*shape).requires_grad_()
    theirs = pair.theirs(keras)(kernel)
    (slope,) = torch.autograd.grad(theirs, kernel)

    model, rule = Held(transposed(kernel)), fxreg.Rule(pair.ours)
    ours = fxreg.transform(model, rule, emit="output")()[1]
    torch.testing.assert_close(ours, theirs, rtol=pair.close, atol=0)
    for emitted in (ours, fxreg.transform(model, rule)()):
        (found,) = torch.autograd.grad(emitted, model.weight)
        torch.testing.assert_close(found, transposed(slope), rtol=pair.close, atol=pair.close)


def descend(weight: Tensor, bias: Tensor, loss: Callable[[], Tensor], steps: int = 20) -> None:
    optimizer = torch.optim.SGD([weight, bias], lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
def test_training_through_transform_is_training_a_keras_layer(name: str, keras: Any) -> None:
    pair = PAIRS[name]
    x, y = numbers(8, 4, seed=1), numbers(8, 6, seed=2)
    theirs = keras.layers.Dense(6, kernel_regularizer=pair.theirs(keras), dtype="float64")
    theirs.build((8, 4))
    kernel, bias = theirs.kernel.value, theirs.bias.value
    model = nn.Linear(4, 6, dtype=torch.float64)
    with torch.no_grad():
        kernel.copy_(numbers(4, 6))
        model.weight.copy_(kernel.mT)
        model.bias.copy_(bias)

    # The layer's own product would be one of float32.
    descend(kernel, bias, lambda: (x @ kernel + bias - y).square().mean() + sum(theirs.losses))
    gm = fxreg.transform(model, fxreg.Rule(pair.ours, param="weight"))
    descend(model.weight, model.bias, lambda: (gm(x) - y).square().mean())
    assert (model.weight - numbers(4, 6).mT).abs().max() > 0.1
    torch.testing.assert_close(model.weight, kernel.mT, rtol=20 * pair.close, atol=20 * pair.close)
    torch.testing.assert_close(model.bias, bias, rtol=20 * pair.close, atol=20 * pair.close)


# Activity regularizers.


@pytest.mark.parametrize("name", ["L1", "L2", "L1L2"])
@pytest.mark.parametrize("batch", [1, 5])
def test_training_with_a_penalty_on_activations_is_training_with_an_activity_regularizer(
    name: str, batch: int, keras: Any
) -> None:
    """Keras divides by the batch: `reduction="batch"`."""
    x, y = numbers(batch, 4, seed=1).float(), numbers(batch, 6, seed=2).float()
    theirs = keras.layers.Dense(6, activation="tanh", activity_regularizer=PAIRS[name].theirs(keras), dtype="float32")
    theirs.build((batch, 4))
    kernel, bias = theirs.kernel.value, theirs.bias.value
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    with torch.no_grad():
        kernel.copy_(numbers(4, 6))
        model[0].weight.copy_(kernel.mT)
        model[0].bias.copy_(bias)
    rule = fxreg.Rule(PAIRS[name].ours, layer="Tanh", on="output", reduction="batch")
    gm = fxreg.transform(model, rule, emit="output")

    output, penalty = gm(x)
    torch.testing.assert_close(output, theirs(x), rtol=SINGLE, atol=SINGLE)
    (loss,) = theirs.losses
    torch.testing.assert_close(penalty, loss, rtol=SINGLE, atol=0)
    descend(kernel, bias, lambda: (theirs(x) - y).square().mean() + sum(theirs.losses))
    descend(model[0].weight, model[0].bias, lambda: (gm(x)[0] - y).square().mean() + gm(x)[1])
    torch.testing.assert_close(model[0].weight, kernel.mT, rtol=20 * SINGLE, atol=20 * SINGLE)
    torch.testing.assert_close(model[0].bias, bias, rtol=20 * SINGLE, atol=20 * SINGLE)


# Constraints. Keras's `axis` is what a group reaches over, and `dim` is which groups there are.


@dataclass(frozen=True)
class Constraint:
    theirs: Callable[[Any], Any]
    ours: Any


CONSTRAINTS = {
    "NonNeg": Constraint(lambda keras: keras.constraints.NonNeg(), fxreg.non_negative()),
    "MaxNorm": Constraint(lambda keras: keras.constraints.MaxNorm(1.5), fxreg.limit_norm(1.5)),
    "MaxNorm, other axis": Constraint(
        lambda keras: keras.constraints.MaxNorm(1.5, axis=1), fxreg.limit_norm(1.5, dim=1)
    ),
    "MaxNorm, both axes": Constraint(
        lambda keras: keras.constraints.MaxNorm(1.5, axis=[0, 1]), fxreg.limit_norm(1.5, dim=())
    ),
    "UnitNorm": Constraint(lambda keras: keras.constraints.UnitNorm(), fxreg.unit_norm()),
    "MinMaxNorm": Constraint(lambda keras: keras.constraints.MinMaxNorm(1.5, 2.0), fxreg.min_max_norm(1.5, 2.0)),
    "MinMaxNorm, by and by": Constraint(
        lambda keras: keras.constraints.MinMaxNorm(1.5, 2.0, rate=0.3), fxreg.min_max_norm(1.5, 2.0, rate=0.3)
    ),
}


def test_every_constraint_of_keras_is_here(keras: Any) -> None:
    kinds = keras.constraints.Constraint.__subclasses__()
    assert {type(one.theirs(keras)) for one in CONSTRAINTS.values()} == set(kinds)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_training_with_a_projection_is_training_with_keras_constraint(name: str, keras: Any) -> None:
    constraint, theirs = CONSTRAINTS[name], CONSTRAINTS[name].theirs(keras)
    x, y = numbers(8, 4, seed=1), numbers(8, 6, seed=2)
    kernel, bias = numbers(4, 6).requires_grad_(), numbers(6, seed=4).requires_grad_()
    with torch.no_grad():
        kernel[:, 0] = 0
    model = nn.Linear(4, 6, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(kernel.mT)
        model.bias.copy_(bias)
    by_hand = torch.optim.SGD([kernel, bias], lr=0.1)
    gm = fxreg.transform(model, fxreg.Rule(constraint.ours, param="weight"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    moved = 0.0
    for _ in range(20):
        for one, loss in ((by_hand, (x @ kernel + bias - y)), (optimizer, gm(x) - y)):
            one.zero_grad()
            loss.square().sum().backward()
            one.step()
        with torch.no_grad():
            before = kernel.clone()
            kernel.copy_(theirs(kernel))
            moved += float((kernel - before).abs().max())
        torch.testing.assert_close(model.weight, kernel.mT, rtol=1e-5, atol=1e-5)  # Keras's epsilon, and its float32
    assert moved > 0.1
    torch.testing.assert_close(model.bias, bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_projection_is_keras_but_for_its_epsilon(name: str, keras: Any) -> None:
    """Keras divides by the norm plus 1e-7."""
    effect, weight = CONSTRAINTS[name].ours, numbers(6, 4)
    weight[0] = 0
    theirs = transposed(CONSTRAINTS[name].theirs(keras)(weight.mT))
    model = Held(weight.clone())
    gm = fxreg.transform(model, fxreg.Rule(effect))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    gm().backward()
    optimizer.step()
    factor: Tensor | float = 1.0
    if "dim" in effect.arguments:
        dims = tuple({0, 1} - set(effect.arguments["dim"]))
        norms = weight.square().sum(dims, keepdim=True).sqrt()
        factor = norms / (norms + 1e-7)
    torch.testing.assert_close(theirs.double(), model.weight * factor, rtol=SINGLE, atol=0)
