"""What every effect must hold, whichever it is: all of the registry, with the arguments of its example, and nothing
written for one of them. Where something must be compared, it is with the example's formula by hand, with finite
differences, or with float64."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxreg
from fxreg.effects import registry

from .marks import in_turn, slow_but
from .test_effects import Dot
from .test_registry import EXAMPLES, QUICK

EMITS = ("backward", "output", "loss")
EFFECTS = [name for name in EXAMPLES if not getattr(registry[name], "detach", False)]
"""All but those that leave no gradient, of which there is nothing to say here."""
PENALTIES = [name for name in EFFECTS if "penalty" in registry[name].vias]
WITH_PROXIMAL = [name for name in PENALTIES if "proximal" in registry[name].vias]
TRANSFORMS = [name for name in EFFECTS if registry[name].default_via == "gradient"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fitted(effect: Any, weight: Tensor) -> Any:
    """The effect for a `Dot`: the tensors that it has for each parameter, repeated or cut to the weight's shape."""

    def cut(tensor: Tensor) -> Tensor:
        repeats = -(-weight.numel() // tensor.numel())
        return tensor.flatten().repeat(repeats)[: weight.numel()].reshape(weight.shape)

    own = {
        name: {"weight": cut(next(iter(effect.arguments[name].tensors.values())))} for name in effect.definition.anchors
    }
    return effect.definition(**effect.strengths, **(dict(effect.arguments) | own))


def value(effect: Any, weight: Tensor) -> Tensor:
    """s·R(w)."""
    effect = fitted(effect, weight)
    return fxreg.transform(Dot(weight), fxreg.Rule(effect), emit="output")(torch.zeros_like(weight))[1].detach()


def gradient(effect: Any, weight: Tensor, grad: Tensor | None = None, via: Any = None, emit: Any = "backward") -> Any:
    """What training sees, where the loss alone gives `grad`: a tensor, or None where there is none."""
    model = Dot(weight)
    output = fxreg.transform(model, fxreg.Rule(fitted(effect, weight), via=via), emit=emit)(
        torch.zeros_like(weight) if grad is None else grad
    )
    (output[0] + output[1] if emit == "output" else output).backward()
    return model.weight.grad


def vias(name: str) -> list[Any]:
    """The lowerings that are in the graph."""
    return [via for via in registry[name].vias if via in ("penalty", "gradient")]


def ways(name: str) -> Iterator[tuple[Any, Any]]:
    """Every way into the graph."""
    return itertools.product(vias(name), EMITS)


# Penalties: derivatives.


@pytest.mark.parametrize("name", PENALTIES)
def test_values_are_differentiable_as_finite_differences_say(name: str) -> None:
    weight = random(4, 4, seed=5)
    weight = weight + 0.2 * weight.sign()  # away from the kinks
    gm = fxreg.transform(Dot(weight), fxreg.Rule(fitted(EXAMPLES[name].effect, weight)), emit="output")

    def at(w: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(gm, {"weight": w}, (torch.zeros(4, 4),))[1]
        return result

    assert torch.autograd.gradcheck(at, weight.requires_grad_())
    assert torch.autograd.gradgradcheck(at, weight)


def _kinks() -> Tensor:
    """Numbers at which some example bends, in rows of which one has norm 0.4 and one is 0."""
    return torch.tensor(
        [[0.4, 0, 0, 0], [0, 0, 0, 0], [0.1, -0.1, 0.2, 0.3], [-0.3, 0.3, -0.2, 0.2]], dtype=torch.float64
    )


POINTS: dict[str, Tensor] = {
    "zero": torch.zeros(4, 4, dtype=torch.float64),
    "minus zero": -torch.zeros(4, 4, dtype=torch.float64),
    "equal entries": torch.full((4, 4), -0.5, dtype=torch.float64),
    "equal singular values": torch.eye(4, dtype=torch.float64),
    "one row": torch.cat([torch.ones(1, 4), torch.zeros(3, 4)]).double(),
    "one column": torch.cat([torch.ones(4, 1), torch.zeros(4, 3)], 1).double(),
    "kinks": _kinks(),
    "kinks, transposed": _kinks().mT.contiguous(),
}


@pytest.mark.parametrize("point", slow_but(["kinks"], POINTS))
@pytest.mark.parametrize("name", PENALTIES)
def test_at_zeros_ties_and_kinks_all_ways_have_one_gradient_between_the_slopes_on_either_side(
    name: str, point: str
) -> None:
    example, weight = EXAMPLES[name], POINTS[point]
    by_hand = example.penalty or (lambda w: value(example.effect, w))
    here = float(by_hand(weight))
    assert float(value(example.effect, weight)) == pytest.approx(here, rel=1e-12, abs=1e-15)

    found = [gradient(example.effect, weight, via=via, emit=emit) for via, emit in ways(name)]
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=1e-12, atol=1e-12)
    step = 1e-6
    for index in itertools.product(range(4), repeat=2):
        aside = torch.zeros_like(weight)
        aside[index] = step
        slopes = [(float(by_hand(weight + aside)) - here) / step, (here - float(by_hand(weight - aside))) / step]
        assert min(slopes) - 1e-4 <= float(found[0][index]) <= max(slopes) + 1e-4, index


# Penalties: numbers of all sizes.


@pytest.mark.parametrize("size", slow_but([1e30], [1e30, 1e-30]))
@pytest.mark.parametrize("name", PENALTIES)
def test_at_the_ends_of_float32_penalties_are_what_they_are_in_float64(name: str, size: float) -> None:
    effect = EXAMPLES[name].effect
    weight = (size * random(4, 4, seed=2)).float()
    largest = torch.finfo(torch.float32).max
    expected = value(effect, weight.double())
    if abs(expected) < largest:
        torch.testing.assert_close(value(effect, weight).double(), expected, rtol=1e-4, atol=1e-37)
    for via, emit in ways(name):
        wanted = gradient(effect, weight.double(), via=via, emit=emit)
        if wanted.abs().max() < largest:
            found = gradient(effect, weight, via=via, emit=emit)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-16)


@pytest.mark.parametrize(("name", "dtype"), in_turn([*itertools.product(PENALTIES, DTYPES)]), ids=str)
@pytest.mark.slow
def test_of_a_million_elements_penalties_are_what_they_are_in_float64(name: str, dtype: torch.dtype) -> None:
    """Those of 16 bits too: they accumulate in float32."""
    effect = EXAMPLES[name].effect
    weight = random(4, 250_000, dtype=dtype)
    found = value(effect, weight)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(value(effect, weight.double())), rel=1e-4)
    for via in vias(name):
        slope = gradient(effect, weight, via=via)
        assert slope.dtype == dtype
        wanted = gradient(effect, weight.double(), via=via)
        assert_close_in(dtype, slope, wanted)


def assert_close_in(dtype: torch.dtype, found: Tensor, wanted: Tensor) -> None:
    """As close as the dtype's numbers are, and sums of a million of float32's."""
    info = torch.finfo(dtype)
    close = max(2 * info.eps, 1e-4)
    least = info.smallest_normal * info.eps
    found, wanted = (one.double().clamp(info.min, info.max) for one in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=close, atol=close * float(wanted.abs().max()) + least)


SHAPES = [(), (0,), (1,), (0, 3), (3, 0), (1, 1), (2, 0, 3), (1, 4, 1, 1)]


def _taken(effect: Any, shape: tuple[int, ...]) -> bool:
    """Whether an effect takes a parameter of that shape; if not, it says so."""
    try:
        fxreg.explain(Dot(torch.zeros(shape)), fxreg.Rule(fitted(effect, torch.zeros(shape)), label="mine"))
    except (fxreg.RuleError, fxreg.MatchError) as error:
        refusal = str(error)
    else:
        return True
    assert "'mine'" in refusal
    assert "'weight'" in refusal
    return False


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.slow
def test_of_any_shape_and_emptiness_numbers_are_finite_or_the_shape_is_refused(name: str) -> None:
    effect = EXAMPLES[name].effect
    for shape in (shape for shape in SHAPES if _taken(effect, shape)):
        grad = random(*shape, seed=1).float()
        for weight in (torch.zeros(shape), random(*shape).float()):
            if name in PENALTIES:
                penalty = value(effect, weight)
                assert penalty.shape == ()
                assert penalty.isfinite()
            for via in vias(name):
                found = gradient(effect, weight, grad, via=via)
                assert found.shape == shape
                assert found.isfinite().all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_complex_and_integer_parameters_are_refused(name: str) -> None:
    model = Dot(torch.ones(4, 4, dtype=torch.complex64))
    with pytest.raises(fxreg.MatchError, match="'weight': it is complex"):
        fxreg.transform(model, fxreg.Rule(EXAMPLES[name].effect))
    model.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(fxreg.MatchError, match="'weight': it is not a floating-point tensor"):
        fxreg.transform(model, fxreg.Rule(EXAMPLES[name].effect))


# Penalties on activations.


class Hidden(nn.Module):
    """Something that is called between the input and the output, and a weight whose gradient says what it got."""

    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of
        self.linear, self.inner = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        self.inner(self.of(h))
        return h


ON_ACTIVATIONS = [name for name in PENALTIES if not registry[name].anchors]


@pytest.mark.parametrize("name", slow_but(QUICK, ON_ACTIVATIONS))
def test_on_batches_of_any_size_activations_are_penalized_by_finite_numbers_or_refused(name: str) -> None:
    rule = fxreg.Rule(EXAMPLES[name].effect, layer="Linear", on="output", reduction="batch")
    for shape, dtype in itertools.product([(0, 4), (1, 4), (2, 0, 4), (2, 3, 4)], [torch.float32, torch.bfloat16]):
        model = Hidden(torch.tanh).to(dtype)
        x = random(*shape, dtype=dtype)
        try:
            output, penalty = fxreg.transform(model, rule, emit="output")(x)
        except fxreg.FxregError as error:
            refusal = str(error)
            assert name in refusal
            continue
        assert penalty.dtype == torch.float32
        (slope,) = torch.autograd.grad(penalty, model.linear.weight, retain_graph=True)
        (plain,) = torch.autograd.grad(output.sum(), model.linear.weight)
        (injected,) = torch.autograd.grad(fxreg.transform(model, rule)(x).sum(), model.linear.weight)
        assert penalty.isfinite()
        assert slope.isfinite().all()
        torch.testing.assert_close(injected, plain + slope, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("of", [lambda h: torch.complex(h, h), lambda h: h.argmax(1)], ids=["complex", "integer"])
@pytest.mark.parametrize("name", slow_but(QUICK, ON_ACTIVATIONS))
def test_activations_without_a_gradient_of_the_formula_are_refused(name: str, of: Any) -> None:
    rule = fxreg.Rule(EXAMPLES[name].effect, layer="Identity", on="output")
    for emit in ("backward", "output"):
        with pytest.raises(fxreg.FxregError, match="there is no floating-point tensor to penalize"):
            fxreg.transform(Hidden(of), rule, emit=emit)(torch.ones(2, 4))


def test_the_output_of_a_complex_layer_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), torch.ones(2, 4, dtype=torch.complex64)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), layer="Linear", on="output"))
    with pytest.raises(fxreg.RuleError, match=r"l1 penalizes floating-point tensors, and met one of torch\.complex64"):
        gm(x)


# Proximal steps.


def stepped(effect: Any, weight: Tensor) -> Tensor:
    """The weight after one step that is all the proximal operator's: the loss's gradient is 0."""
    model = Dot(weight)
    gm = fxreg.transform(model, fxreg.Rule(fitted(effect, weight), via="proximal"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxreg.ProximalStep(optimizer, gm)
    gm(torch.zeros_like(weight)).backward()
    optimizer.step()
    return model.weight.detach()


@pytest.mark.parametrize("size", slow_but([1e30], [1e30, 1.0, 1e-30]))
@pytest.mark.parametrize("name", WITH_PROXIMAL)
def test_at_the_ends_of_float32_proximal_steps_are_what_they_are_in_float64(name: str, size: float) -> None:
    effect, weight = EXAMPLES[name].effect, (size * random(4, 4, seed=2)).float()
    torch.testing.assert_close(
        stepped(effect, weight).double(), stepped(effect, weight.double()), rtol=1e-4, atol=1e-6 * size
    )


@pytest.mark.parametrize("name", WITH_PROXIMAL)
def test_at_zeros_ties_and_kinks_and_of_any_shape_proximal_steps_are_finite(name: str) -> None:
    effect = EXAMPLES[name].effect
    for point in POINTS.values():
        wanted = stepped(effect, point)
        assert wanted.isfinite().all()
        torch.testing.assert_close(stepped(effect, point.float()).double(), wanted, rtol=1e-4, atol=1e-6)
    for shape in (shape for shape in SHAPES if _taken(effect, shape)):
        assert stepped(effect, random(*shape)).isfinite().all()


# Gradient transforms.


@pytest.mark.parametrize(("weights", "grads"), [(1, 1e30), (1, 1e-30), (1e30, 1), (1e-30, 1), (1e30, 1e30), (0, 1)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_at_the_ends_of_float32_transforms_are_what_they_are_in_float64(
    name: str, weights: float, grads: float
) -> None:
    effect = EXAMPLES[name].effect
    weight, grad = (weights * random(4, 4)).float(), (grads * random(4, 4, seed=1)).float()
    found = gradient(effect, weight, grad)
    wanted = gradient(effect, weight.double(), grad.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("name", [one for one in TRANSFORMS if one not in ("add_noise", "registry_homing")])
def test_a_gradient_of_zeros_stays_one(name: str) -> None:
    """But for what adds to it."""
    for shape, dtype in itertools.product([(4, 4), (1, 1)], [torch.float64, torch.float32, torch.bfloat16]):
        for weight in (torch.zeros(shape, dtype=dtype), random(*shape, dtype=dtype)):
            if _taken(EXAMPLES[name].effect, shape):
                assert not gradient(EXAMPLES[name].effect, weight, torch.zeros_like(weight)).any()


@pytest.mark.parametrize(("name", "dtype"), in_turn([*itertools.product(TRANSFORMS, DTYPES)]), ids=str)
@pytest.mark.slow
def test_of_a_million_elements_transforms_are_what_they_are_in_float64(name: str, dtype: torch.dtype) -> None:
    effect = EXAMPLES[name].effect
    weight, grad = random(4, 250_000, dtype=dtype), random(4, 250_000, seed=1, dtype=dtype)
    found = gradient(effect, weight, grad)
    wanted = gradient(effect, weight.double(), grad.double())
    assert found.dtype == dtype
    assert_close_in(dtype, found, wanted)


# Lowerings.


class Layers(nn.Module):
    """Two layers, of which one is called twice, and their loss: it reaches every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.second(torch.tanh(self.second(torch.tanh(self.first(x))))) - x.flip(1)).square().mean()


def trained(effect: Any, via: Any, emit: Any) -> list[Tensor]:
    """The parameters after 20 steps of SGD."""
    torch.manual_seed(0)
    model = Layers().double()
    rule = fxreg.Rule(effect, param="weight", via=via)
    gm = fxreg.transform(model, rule, emit=emit)
    optimizer = torch.optim.SGD(fxreg.param_groups(model, rule), lr=0.01)
    for x in random(20, 8, 4, seed=3):
        optimizer.zero_grad()
        output = gm(x)
        (output[0] + output[1] if emit == "output" else output).backward()
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", slow_but(QUICK, EXAMPLES))
def test_twenty_steps_by_every_lowering_end_at_the_same_weights(name: str) -> None:
    effect = EXAMPLES[name].effect
    lowerings = [via for via in registry[name].vias if via != "proximal"]
    first, *others = itertools.product(lowerings, EMITS)
    reference = trained(effect, *first)
    start, plain = trained(fxreg.scale(0.0), "gradient", "output"), trained(fxreg.scale(1.0), "gradient", "output")
    if name != "zero_nans":
        assert (reference[0] - plain[0]).abs().max() > 1e-6
    assert name == "freeze" or not torch.equal(reference[0], start[0])
    for way in others:
        for one, other in zip(trained(effect, *way), reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")
