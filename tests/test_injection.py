"""What injected gradients can and cannot see: every row of docs/injection.md, in numbers, and every output structure.

The reference is always the sum written by hand on the original model, in float64.
"""

import collections
import copy
import dataclasses
import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxreg
from fxreg.effects import registry

from .marks import slow_but

STRENGTH = 0.25
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}

INJECTED: dict[str, dict[str, Any]] = {"emit='backward'": {}, "via='gradient'": {"via": "gradient"}}
"""The two lowerings this file is about, as arguments of a rule."""


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
Y = torch.linspace(1, -1, 16, dtype=torch.float64).reshape(8, 2)


def loss_of(output: Tensor, target: Tensor = Y) -> Tensor:
    return (output - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: nn.Module) -> Tensor:
    """s·Σ|w| over every parameter."""
    return STRENGTH * sum((p.abs().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))


def assert_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def hand_gradients(factor: float = 1.0, times: float = 1.0) -> dict[str, Tensor]:
    """Gradients of factor·loss + times·penalty on the plain model."""
    model = make()
    (factor * loss_of(model(X)) + times * by_hand(model)).backward()
    return gradients(model)


def regularized(**kwargs: Any) -> tuple[nn.Module, torch.fx.GraphModule]:
    model = make()
    emit = kwargs.pop("emit", "backward")
    return model, fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH), **kwargs), emit=emit)


injected = pytest.mark.parametrize("rule", INJECTED.values(), ids=INJECTED)


# A factor on the loss.


@injected
def test_without_a_factor_the_gradients_are_those_of_the_hand_written_sum(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    loss_of(gm(X)).backward()
    assert_gradients(model, hand_gradients())


@injected
def test_a_factor_on_the_loss_is_not_seen(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    (1024 * loss_of(gm(X))).backward()
    assert_gradients(model, hand_gradients(factor=1024, times=1))


@injected
@pytest.mark.parametrize("factor", [1024.0, 0.25, 3.0])
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda s: torch.tensor(s, dtype=torch.float16)])
def test_set_loss_scale_makes_the_penalty_follow_the_factor(
    rule: dict[str, Any], factor: float, kind: Callable[[float], Any]
) -> None:
    model, gm = regularized(**rule)
    fxreg.set_loss_scale(gm, kind(factor))
    (factor * loss_of(gm(X))).backward()
    assert_gradients(model, hand_gradients(factor=factor, times=factor))


@injected
def test_set_loss_scale_counts_from_the_next_forward_call(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    loss = loss_of(gm(X))
    fxreg.set_loss_scale(gm, 8.0)
    loss.backward()
    assert_gradients(model, hand_gradients())
    model.zero_grad()
    (8 * loss_of(gm(X))).backward()
    assert_gradients(model, hand_gradients(8, 8))


@injected
def test_the_loss_scale_works_in_compiled_code_and_does_not_recompile(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gm, backend=counter, fullgraph=True)
    compiled(X)
    compilations = counter.frame_count
    for factor in (1.0, 4.0, 1024.0, 1 / 3):
        fxreg.set_loss_scale(compiled, factor)
        model.zero_grad()
        (factor * loss_of(compiled(X))).backward()
        assert_gradients(model, hand_gradients(factor, factor))
    assert counter.frame_count == compilations


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), "1", None, True, torch.ones(2)], ids=repr)
def test_the_loss_scale_is_finite_and_positive(scale: Any) -> None:
    _, gm = regularized()
    with pytest.raises(fxreg.FxregError, match="finite positive number"):
        fxreg.set_loss_scale(gm, scale)


@pytest.mark.parametrize("emit", ["output", "loss"])
@pytest.mark.parametrize("factor", [1024.0, 0.25])
def test_a_penalty_in_the_loss_needs_no_loss_scale(emit: str, factor: float) -> None:
    model, loss = loss_from(emit)
    (factor * loss(X, Y)).backward()
    assert_gradients(model, hand_gradients(factor, factor))


class Losing(nn.Module):
    """Returns its own loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(self.inner(x), y)


def loss_from(emit: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The plain model, and its regularized loss with the penalty in it."""
    rule = fxreg.Rule(fxreg.l1(STRENGTH))
    model = make()
    if emit == "loss":
        return model, fxreg.transform(Losing(model), rule, emit="loss")
    gm = fxreg.transform(model, rule, emit="output")

    def loss(x: Tensor, y: Tensor) -> Tensor:
        output, penalty = gm(x)
        return loss_of(output, y) + penalty

    return model, loss


# Accumulation.


def accumulate(step: Callable[[Tensor, Tensor], Tensor], parts: int = 4) -> None:
    for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
        (step(x, y) / parts).backward()


@injected
@pytest.mark.filterwarnings("ignore:fxreg. gradients accumulate")
def test_over_four_micro_batches_the_penalty_counts_four_times(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    accumulate(lambda x, y: loss_of(gm(x), y))
    assert_gradients(model, hand_gradients(times=4))


@injected
def test_set_loss_scale_repairs_accumulation(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    fxreg.set_loss_scale(gm, 1 / 4)
    accumulate(lambda x, y: loss_of(gm(x), y))
    assert_gradients(model, hand_gradients())


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_a_penalty_in_the_loss_needs_nothing_to_accumulate(emit: str) -> None:
    model, loss = loss_from(emit)
    accumulate(loss)
    assert_gradients(model, hand_gradients())


def test_a_clipped_gradient_is_clipped_in_every_micro_batch() -> None:
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.clip_norm(1e-3), param="weight"))
    fxreg.set_loss_scale(gm, 1 / 4)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(X.chunk(4), Y.chunk(4), strict=True):
        plain = make()
        loss_of(plain(x), y).backward()
        for name, g in gradients(plain).items():
            clipped = g * min(1.0, 1e-3 / (g.norm().item() + 1e-6)) if name.endswith("weight") else g
            expected[name] += clipped / 4
    accumulate(lambda x, y: loss_of(gm(x), y))
    assert_gradients(model, expected)


# GradScaler.


def scaled_step(
    model: nn.Module, loss: Callable[[], Tensor], before: Callable[[Any], None] = lambda scaler: None
) -> tuple[dict[str, Tensor], float]:
    """The gradients after `unscale_`, and the scaler's scale after the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before(scaler)
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    found = gradients(model)
    scaler.step(optimizer)
    scaler.update()
    return found, scaler.get_scale()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **TOLERANCE)


@injected
def test_under_a_grad_scaler_of_1024_the_penalty_is_off_by_1_over_1024(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    found, _ = scaled_step(model, lambda: loss_of(gm(X)))
    assert_same(found, hand_gradients(times=1 / 1024))


WAYS: dict[str, Callable[[Any, nn.Module], None]] = {
    "get_scale": lambda scaler, gm: fxreg.set_loss_scale(gm, scaler.get_scale()),
    "scale(1)": lambda scaler, gm: fxreg.set_loss_scale(gm, scaler.scale(torch.ones(()))),
}


@injected
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_told_the_scale_the_unscaled_gradients_are_those_of_the_hand_written_sum(
    rule: dict[str, Any], way: Callable[[Any, nn.Module], None]
) -> None:
    model, gm = regularized(**rule)
    found, _ = scaled_step(model, lambda: loss_of(gm(X)), lambda scaler: way(scaler, gm))
    assert_same(found, hand_gradients())


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_under_a_grad_scaler_a_penalty_in_the_loss_needs_nothing(emit: str) -> None:
    model, loss = loss_from(emit)
    found, _ = scaled_step(model, lambda: loss(X, Y))
    assert_same(found, hand_gradients())


@injected
def test_scaler_and_accumulation_multiply(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fxreg.set_loss_scale(gm, scaler.get_scale() / 4)
    accumulate(lambda x, y: scaler.scale(loss_of(gm(x), y)))
    scaler.unscale_(optimizer)
    assert_gradients(model, hand_gradients())


TRANSFORMS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "clip_norm": (fxreg.clip_norm(0.01), lambda g: g * min(1.0, 0.01 / (g.norm().item() + 1e-6))),
    "clip_value": (fxreg.clip_value(0.01), lambda g: g.clamp(-0.01, 0.01)),
    "centralize": (fxreg.centralize(), lambda g: g - g.mean(1, keepdim=True) if g.ndim > 1 else g),
    "scale": (fxreg.scale(0.5), lambda g: 0.5 * g),
    "mask": (fxreg.mask(torch.zeros(1)), torch.zeros_like),
    "zero_nans": (fxreg.zero_nans(), lambda g: g),
}
"""Effects and what they do to a finite gradient, written by hand."""


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("factor", [1024.0, 0.25, 3.0])
def test_a_transform_computes_s_f_of_g_over_s(name: str, factor: float) -> None:
    effect, f = TRANSFORMS[name]
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(effect))
    fxreg.set_loss_scale(gm, factor)
    (factor * loss_of(gm(X))).backward()
    plain = hand_gradients(times=0)
    assert_gradients(model, {n: factor * f(g) for n, g in plain.items()})


@pytest.mark.parametrize("name", ["clip_norm", "clip_value", "centralize"])
def test_without_the_loss_scale_a_transform_sees_the_scaled_gradient(name: str) -> None:
    effect, f = TRANSFORMS[name]
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(effect))
    (1024 * loss_of(gm(X))).backward()
    plain = hand_gradients(times=0)
    assert_gradients(model, {n: f(1024 * g) for n, g in plain.items()})


OVERFLOWS = {"inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("bad", OVERFLOWS.values(), ids=OVERFLOWS)
def test_scaled_a_gradient_that_is_not_finite_passes_unchanged(name: str, bad: float) -> None:
    effect, _ = TRANSFORMS[name]
    model, plain = make(), make()
    gm = fxreg.transform(model, fxreg.Rule(effect))
    fxreg.set_loss_scale(gm, 1024.0)
    (bad * loss_of(gm(X))).backward()
    (bad * loss_of(plain(X))).backward()
    for g, expected in zip(gradients(model).values(), gradients(plain).values(), strict=True):
        assert not g.isfinite().all()
        torch.testing.assert_close(g, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["clip_value", "mask", "zero_nans"])
def test_so_a_grad_scaler_still_skips_the_step(name: str) -> None:
    effect, _ = TRANSFORMS[name]
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(effect))
    _, scale = scaled_step(
        model, lambda: float("nan") * loss_of(gm(X)), lambda scaler: fxreg.set_loss_scale(gm, scaler.get_scale())
    )
    assert scale == 512.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make().parameters(), strict=True))


@injected
def test_a_penalty_leaves_an_overflow_to_be_seen(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    _, scale = scaled_step(
        model, lambda: float("inf") * loss_of(gm(X)), lambda scaler: fxreg.set_loss_scale(gm, scaler.get_scale())
    )
    assert scale == 512.0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), make().parameters(), strict=True))


def test_unscaled_zero_nans_does_its_work() -> None:
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.zero_nans()))
    (float("nan") * loss_of(gm(X))).backward()
    assert all(not g.any() for g in gradients(model).values())


# How often.


@injected
@pytest.mark.filterwarnings("ignore:fxreg. gradients accumulate")
def test_a_second_backward_adds_the_penalty_again(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    loss = loss_of(gm(X))
    loss.backward(retain_graph=True)
    loss.backward()
    assert_gradients(model, hand_gradients(factor=2, times=2))
    model.zero_grad()
    output = gm(X)
    output[:, 0].sum().backward(retain_graph=True)
    output[:, 1].sum().backward()
    plain = make()
    (plain(X).sum() + 2 * by_hand(plain)).backward()
    assert_gradients(model, gradients(plain))


def test_with_emit_output_a_penalty_counts_in_the_backward_that_it_is_in() -> None:
    model, gm = regularized(emit="output")
    output, penalty = gm(X)
    (output[:, 0].sum() + penalty).backward(retain_graph=True)
    output[:, 1].sum().backward()
    plain = make()
    (plain(X).sum() + by_hand(plain)).backward()
    assert_gradients(model, gradients(plain))


@injected
def test_two_forward_calls_count_twice(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    (gm(X[:4]).square().mean() + gm(X[4:]).square().mean()).backward()
    plain = make()
    (plain(X[:4]).square().mean() + plain(X[4:]).square().mean() + 2 * by_hand(plain)).backward()
    assert_gradients(model, gradients(plain))


def test_with_emit_output_one_penalty_of_two_calls_is_one_penalty() -> None:
    model, gm = regularized(emit="output")
    (first, penalty), (second, _) = gm(X[:4]), gm(X[4:])
    (first.square().mean() + second.square().mean() + penalty).backward()
    plain = make()
    (plain(X[:4]).square().mean() + plain(X[4:]).square().mean() + by_hand(plain)).backward()
    assert_gradients(model, gradients(plain))


@injected
def test_a_loss_times_zero_still_adds_the_penalty(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    (0 * loss_of(gm(X))).backward()
    assert_gradients(model, hand_gradients(factor=0))


@injected
def test_a_forward_call_that_the_backward_does_not_reach_adds_nothing(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    head = nn.Linear(2, 1, dtype=torch.float64)
    head(gm(X).detach()).sum().backward()
    assert not gradients(model)


def test_with_emit_output_the_penalty_counts_though_the_output_is_detached() -> None:
    model, gm = regularized(emit="output")
    output, penalty = gm(X)
    (output.detach().sum() + penalty).backward()
    assert_gradients(model, {name: STRENGTH * p.detach().sign() for name, p in model.named_parameters()})


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_a_penalty_in_the_loss_is_what_the_loss_makes_of_it(emit: str) -> None:
    model, loss = loss_from(emit)
    (0 * loss(X, Y)).backward()
    assert not any(g.any() for g in gradients(model).values())


class Half(nn.Module):
    """Two layers, of which the loss reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_via_gradient_reaches_only_what_the_backward_reaches() -> None:
    for via, reached in (("penalty", True), ("gradient", False)):
        model = Half().double()
        gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH), via=via))
        gm(X).sum().backward()
        expected = STRENGTH * model.unused.weight.sign()
        assert (model.unused.weight.grad is not None) is reached
        assert not reached or torch.equal(model.unused.weight.grad, expected)


# Higher order and forward mode.


@injected
def test_a_second_order_pass_misses_the_penaltys_curvature_and_adds_its_gradient_once_more(
    rule: dict[str, Any],
) -> None:
    model = make()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l2(STRENGTH), **rule))
    grads = torch.autograd.grad(loss_of(gm(X)), list(model.parameters()), create_graph=True)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    plain = make()
    parameters = list(plain.parameters())
    first = torch.autograd.grad(loss_of(plain(X)), parameters, create_graph=True)
    constant = [2 * STRENGTH * p.detach() for p in parameters]
    once_more = STRENGTH * torch.stack([p.square().sum() for p in parameters]).sum()
    squares = torch.stack([(g + c).square().sum() for g, c in zip(first, constant, strict=True)]).sum()
    (squares + once_more).backward()
    assert_gradients(model, gradients(plain))


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_a_penalty_in_the_loss_is_there_in_a_second_order_pass(emit: str) -> None:
    model, loss = loss_from(emit)
    grads = torch.autograd.grad(loss(X, Y), list(model.parameters()), create_graph=True)
    torch.stack([g.square().sum() for g in grads]).sum().backward()
    plain = make()
    first = torch.autograd.grad(loss_of(plain(X)) + by_hand(plain), list(plain.parameters()), create_graph=True)
    torch.stack([g.square().sum() for g in first]).sum().backward()
    assert_gradients(model, gradients(plain))


scripted = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
"""What `torch.func.jvp` itself says when it is first used."""


def tangents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, {name: torch.full_like(p, 0.5) for name, p in parameters.items()}


@scripted
@injected
def test_jvp_sees_the_unpenalized_function(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    plain = make()
    parameters, tangent = tangents(model)
    found = torch.func.jvp(lambda p: loss_of(torch.func.functional_call(gm, p, X)), (parameters,), (tangent,))
    expected = torch.func.jvp(lambda p: loss_of(torch.func.functional_call(plain, p, X)), (parameters,), (tangent,))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@scripted
@injected
def test_forward_mode_with_respect_to_the_input_is_the_models(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    found = torch.func.jvp(gm, (X,), (X.flip(0),))
    expected = torch.func.jvp(model, (X,), (X.flip(0),))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(gm(forward_ad.make_dual(X, X.flip(0))))
        torch.testing.assert_close((dual.primal, dual.tangent), expected, **TOLERANCE)


@scripted
def test_with_emit_output_jvp_sees_the_penalty() -> None:
    model, gm = regularized(emit="output")
    parameters, tangent = tangents(model)
    _, (_, found) = torch.func.jvp(lambda p: torch.func.functional_call(gm, p, X), (parameters,), (tangent,))
    expected = STRENGTH * sum((p.sign() * tangent[name]).sum() for name, p in parameters.items())
    torch.testing.assert_close(found, expected, **TOLERANCE)


# Under no_grad.


class Counting(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators_of(call: Callable[[], Any]) -> list[str]:
    with torch.no_grad(), Counting() as counting:
        call()
    return counting.names


@pytest.fixture
def recorded() -> Iterator[tuple[Any, list[torch.device]]]:
    """A penalty without closed form that notes where it is computed, and its notes."""
    notes: list[torch.device] = []

    @fxreg.penalty
    def recorded_quartic(weight: Tensor) -> Tensor:
        notes.append(weight.device)
        return weight.pow(4).sum()

    yield recorded_quartic, notes
    del registry["recorded_quartic"]


def test_under_no_grad_emit_backward_computes_nothing(recorded: tuple[Any, list[torch.device]]) -> None:
    effect, notes = recorded
    model = make()
    rules = [fxreg.Rule(effect(STRENGTH)), fxreg.Rule(fxreg.l1(STRENGTH)), fxreg.Rule(fxreg.group_lasso(STRENGTH))]
    gm = fxreg.transform(model, rules)
    notes.clear()  # matching tries the formula
    expected = operators_of(lambda: model(X))
    assert expected
    more = collections.Counter(operators_of(lambda: gm(X))) - collections.Counter(expected)
    assert set(more) <= {"aten.new_zeros.default"}  # 0-d, instead of the penalty
    assert notes == []
    gm(X)
    assert len(notes) == 4  # with gradients on: once for each parameter


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_under_no_grad_the_value_is_the_true_one(emit: str, recorded: tuple[Any, list[torch.device]]) -> None:
    effect, notes = recorded
    model = make()
    rules = [fxreg.Rule(effect(STRENGTH)), fxreg.Rule(fxreg.l1(STRENGTH))]
    true = by_hand(model).detach() + STRENGTH * sum(p.detach().pow(4).sum() for p in model.parameters())
    if emit == "output":
        gm = fxreg.transform(model, rules, emit=emit)
        notes.clear()
        with torch.no_grad():
            output, penalty = gm(X)
        torch.testing.assert_close(output, model(X).detach(), rtol=0, atol=0)
    else:
        gm = fxreg.transform(Losing(model), rules, emit=emit)
        notes.clear()
        with torch.no_grad():
            penalty = gm(X, Y) - loss_of(model(X))
    assert len(notes) == 4
    torch.testing.assert_close(penalty, true, **TOLERANCE)


@injected
def test_the_output_is_bitwise_the_models(rule: dict[str, Any]) -> None:
    model, gm = regularized(**rule)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(gm(X), model(X))


# The warning.


def warnings_of(run: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught]


@injected
def test_gradients_seen_accumulating_warn_exactly_once(rule: dict[str, Any]) -> None:
    _, gm = regularized(**rule)

    def run() -> None:
        for _ in range(3):
            accumulate(lambda x, y: loss_of(gm(x), y))

    found = warnings_of(run)
    assert len(found) == 1
    assert "fxreg.set_loss_scale(gm, 1 / accumulation_steps)" in found[0]


def test_accumulation_is_seen_also_where_the_first_penalized_parameter_is_frozen() -> None:
    model, gm = regularized()
    model[0].weight.requires_grad_(False)
    assert len(warnings_of(lambda: accumulate(lambda x, y: loss_of(gm(x), y)))) == 1


@injected
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("through", ["optimizer", "model", "gm"])
def test_a_loop_that_zeroes_gradients_does_not_warn(rule: dict[str, Any], to_none: bool, through: str) -> None:
    model, gm = regularized(**rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zeroing = {"optimizer": optimizer, "model": model, "gm": gm}[through]

    def run() -> None:
        for _ in range(4):
            zeroing.zero_grad(set_to_none=to_none)
            loss_of(gm(X)).backward()
            optimizer.step()

    assert warnings_of(run) == []


@injected
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_once_the_loss_scale_was_set_accumulation_does_not_warn(rule: dict[str, Any], scale: float) -> None:
    _, gm = regularized(**rule)
    fxreg.set_loss_scale(gm, scale)
    assert warnings_of(lambda: accumulate(lambda x, y: loss_of(gm(x), y))) == []


@pytest.mark.parametrize("emit", ["output", "loss"])
def test_a_penalty_in_the_loss_does_not_warn(emit: str) -> None:
    _, loss = loss_from(emit)
    assert warnings_of(lambda: accumulate(loss)) == []


# Whichever outputs the loss uses.


class Pair(NamedTuple):
    first: Tensor
    rest: Any


@dataclasses.dataclass
class Plain:
    first: Tensor
    rest: Any
    note: str = "kept"


@dataclasses.dataclass(frozen=True)
class Frozen:
    first: Tensor
    rest: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    first: Tensor
    rest: Any


@dataclasses.dataclass
class Registered:
    first: Tensor
    rest: Any


pytree.register_dataclass(Registered)


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and torch.equal(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]


pytree.register_pytree_node(Box, lambda box: ([box.value], None), lambda values, _: Box(*values))


@dataclasses.dataclass
class Mapped(OrderedDict):  # type: ignore[type-arg]
    """A mapping and a dataclass in one, whose items and attributes agree and leave out what is None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, key: str, value: Any) -> None:
        if value is not None and key in {field.name for field in dataclasses.fields(self)}:
            super().__setitem__(key, value)
        super().__setattr__(key, value)


@dataclasses.dataclass(frozen=True)
class Structure:
    """How a model packs three tensors a, b, c, and every way to one of them."""

    pack: Callable[[Tensor, Tensor, Tensor], Any]
    picks: tuple[Callable[[Any], Tensor], ...]


STRUCTURES: dict[str, Structure] = {
    "a tensor": Structure(lambda a, b, c: a, (lambda o: o,)),
    "a tuple": Structure(lambda a, b, c: (a, b, c), (lambda o: o[0], lambda o: o[1], lambda o: o[2])),
    "a tuple of one": Structure(lambda a, b, c: (b,), (lambda o: o[0],)),
    "nested tuples": Structure(
        lambda a, b, c: ((a, (b,)), ((), c)), (lambda o: o[0][0], lambda o: o[0][1][0], lambda o: o[1][1])
    ),
    "lists": Structure(lambda a, b, c: [a, [b, [c]]], (lambda o: o[0], lambda o: o[1][0], lambda o: o[1][1][0])),
    "dicts": Structure(
        lambda a, b, c: {"a": a, "in": {"b": b, 3: [c]}},
        (lambda o: o["a"], lambda o: o["in"]["b"], lambda o: o["in"][3][0]),
    ),
    "an OrderedDict": Structure(lambda a, b, c: OrderedDict(z=a, y=(b, c)), (lambda o: o["z"], lambda o: o["y"][1])),
    "a defaultdict": Structure(
        lambda a, b, c: collections.defaultdict(list, {"a": a, "b": [b, c]}), (lambda o: o["a"], lambda o: o["b"][1])
    ),
    "a named tuple": Structure(lambda a, b, c: Pair(a, Pair(b, c)), (lambda o: o.first, lambda o: o.rest.rest)),
    "a dataclass": Structure(lambda a, b, c: Plain(a, [Plain(b, c)]), (lambda o: o.first, lambda o: o.rest[0].rest)),
    "a frozen dataclass": Structure(lambda a, b, c: Frozen(a, {"b": b}), (lambda o: o.first, lambda o: o.rest["b"])),
    "a dataclass with slots": Structure(lambda a, b, c: Slotted(a, (b, c)), (lambda o: o.first, lambda o: o.rest[1])),
    "a registered dataclass": Structure(
        lambda a, b, c: Registered(a, (b, c)), (lambda o: o.first, lambda o: o.rest[1])
    ),
    "a mapping dataclass": Structure(
        lambda a, b, c: Mapped(logits=a, states=(b, c)),
        (lambda o: o.logits, lambda o: o["states"][0], lambda o: list(o.values())[1][1]),
    ),
    "a registered object": Structure(lambda a, b, c: (a, Box(b)), (lambda o: o[0], lambda o: o[1].value)),
    "None, numbers and text among them": Structure(
        lambda a, b, c: (None, a, 3, {"b": b, "k": "text"}, [c, 2.5, True]),
        (lambda o: o[1], lambda o: o[3]["b"], lambda o: o[4][0]),
    ),
    "what needs no gradient among them": Structure(
        lambda a, b, c: (a.detach(), a.argmax(), b, c > 0), (lambda o: o[2],)
    ),
    "the same tensor twice": Structure(
        lambda a, b, c: (a, [b, a], a), (lambda o: o[0], lambda o: o[1][0], lambda o: o[1][1], lambda o: o[2])
    ),
    "views of one tensor": Structure(
        lambda a, b, c: (a, a[0], a.t()), (lambda o: o[0], lambda o: o[1], lambda o: o[2])
    ),
    "a torch.return_types": Structure(lambda a, b, c: (a, b.max(dim=1)), (lambda o: o[0], lambda o: o[1].values)),
    "a PackedSequence": Structure(
        lambda a, b, c: (a, pack_padded_sequence(b[:, :, None], torch.tensor([2] * 8), batch_first=True)),
        (lambda o: o[0], lambda o: o[1].data),
    ),
}


class Packing(nn.Module):
    """Three heads on a trunk, packed; `opaque` makes the root one that cannot be traced."""

    def __init__(self, structure: Structure, opaque: bool) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.pack, self.opaque = structure.pack, opaque

    def forward(self, x: Tensor) -> Any:
        if self.opaque and bool(x.isnan().any()):
            raise ValueError("NaN")
        h = torch.tanh(self.trunk(x))
        return self.pack(*(head(h) for head in self.heads))


def packing(structure: Structure, opaque: bool) -> Packing:
    torch.manual_seed(1)
    return Packing(structure, opaque).double()


CASES = [
    pytest.param(structure, opaque, id=f"{name}, {'opaque' if opaque else 'traced'}")
    for name, structure in STRUCTURES.items()
    for opaque in (False, True)
]


def subsets(structure: Structure) -> Iterator[tuple[Callable[[Any], Tensor], ...]]:
    count = len(structure.picks)
    return itertools.chain.from_iterable(itertools.combinations(structure.picks, k) for k in range(1, count + 1))


@pytest.mark.parametrize(("structure", "opaque"), CASES)
def test_the_penalty_arrives_once_whichever_outputs_the_loss_uses(structure: Structure, opaque: bool) -> None:
    model, plain = packing(structure, opaque), packing(structure, opaque)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))
    if opaque:
        assert "" in fxreg.explain(gm).opaque
    for used in subsets(structure):
        output, expected = gm(X), plain(X)
        sum(((k + 2) * pick(output)).square().sum() for k, pick in enumerate(used)).backward()
        loss = sum(((k + 2) * pick(expected)).square().sum() for k, pick in enumerate(used))
        (loss + by_hand(plain)).backward()
        assert_gradients(model, gradients(plain))
        model.zero_grad()
        plain.zero_grad()


@pytest.mark.parametrize(("structure", "opaque"), CASES)
def test_the_output_is_of_the_same_structure_and_bitwise_equal(structure: Structure, opaque: bool) -> None:
    model = packing(structure, opaque)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))
    assert_equal(gm(X), model(X))
    with torch.no_grad():
        assert_equal(gm(X), model(X))


def assert_equal(found: Any, expected: Any) -> None:
    """The same types, keys, fields and numbers all the way down; nothing is skipped."""
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            assert_equal(getattr(found, field.name), getattr(expected, field.name))
        if isinstance(found, dict):
            assert_equal(dict(found), dict(expected))
    elif isinstance(found, dict):
        assert list(found) == list(expected)
        for key, value in found.items():
            assert_equal(value, expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
def test_the_same_tensor_twice_stays_the_same_tensor(opaque: bool) -> None:
    model = packing(STRUCTURES["the same tensor twice"], opaque)
    first, (_, second), third = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))(X)
    assert first is second is third


@pytest.mark.parametrize(
    "name", slow_but(["dicts"], ["a tuple", "dicts", "the same tensor twice", "None, numbers and text among them"])
)
def test_compiled_too_the_penalty_arrives_once(name: str) -> None:
    structure = STRUCTURES[name]
    model, plain = packing(structure, False), packing(structure, False)
    compiled = torch.compile(
        fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH))), backend="aot_eager", fullgraph=True
    )
    for pick in structure.picks:
        pick(compiled(X)).square().sum().backward()
        (pick(plain(X)).square().sum() + by_hand(plain)).backward()
        assert_gradients(model, gradients(plain))
        model.zero_grad()
        plain.zero_grad()


# In-place use by the caller.

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda t: t.mul_(3),
    "relu_": lambda t: t.relu_(),
    "index": lambda t: t[0].fill_(0),
    "slice": lambda t: t.__setitem__((slice(None), 0), t[:, 1].clone()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
def test_a_caller_may_write_into_an_output(write: Callable[[Tensor], Any], opaque: bool) -> None:
    structure = STRUCTURES["a tuple"]
    model, plain = packing(structure, opaque), packing(structure, opaque)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))
    for module, penalty in ((gm, 0.0), (plain, by_hand(plain))):
        first, second, _ = module(X)
        write(first)
        ((first * second).sum() + penalty).backward()
    assert_gradients(model, gradients(plain))


@pytest.mark.parametrize(
    ("opaque", "compiled"),
    [(False, False), (True, False), pytest.param(True, True, marks=pytest.mark.slow)],
    ids=["traced", "opaque", "opaque and compiled"],  # compiled where all is in one graph, autograd sees it
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's doing
def test_a_write_into_an_output_that_shares_memory_with_another_raises(opaque: bool, compiled: bool) -> None:
    # Autograd would not see the write in the other one, and the gradient would be silently wrong.
    gm = fxreg.transform(packing(STRUCTURES["views of one tensor"], opaque), fxreg.Rule(fxreg.l1(STRENGTH)))
    call: Any = torch.compile(gm, backend="aot_eager") if compiled else gm
    whole, row, _ = call(X)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        whole.mul_(3)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        row.mul_(3)


@pytest.mark.parametrize("how", [lambda weight: weight, lambda weight: weight.view(-1)[1:]], ids=["itself", "a view"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_write_into_a_parameter_that_is_an_output_raises_as_it_does_without_rules(how: Any, compiled: bool) -> None:
    class Giving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Any:
            return x * self.weight, how(self.weight)

    model = Giving()
    for module in (model, fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))):
        call: Any = torch.compile(module, backend="aot_eager") if compiled else module
        with pytest.raises(RuntimeError, match=r"a leaf Variable that requires grad|is being modified inplace"):
            call(torch.ones(3))[1].mul_(2)
        assert torch.equal(model.weight, torch.ones(3))


HANDED_ON: dict[str, Callable[[Tensor, nn.Module], Any]] = {
    "itself": lambda x, layer: (x, layer(x)),
    "a view": lambda x, layer: (x.view(-1), layer(x)),
    "a part": lambda x, layer: (x[:1], layer(x)),
    "deep inside": lambda x, layer: ({"kept": [x]}, layer(x)),
    "alone": lambda x, layer: (x.view(-1),),
}


class HandingOn(nn.Module):
    def __init__(self, how: Callable[[Tensor, nn.Module], Any], opaque: bool) -> None:
        super().__init__()
        self.layer, self.how, self.opaque = nn.Linear(3, 3), how, opaque

    def forward(self, x: Tensor) -> Any:
        if self.opaque and x.sum() > 1e9:
            return ()
        return self.how(x, self.layer)


@pytest.mark.parametrize("how", HANDED_ON.values(), ids=HANDED_ON)
@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's doing
def test_a_write_into_an_output_that_was_given_raises(how: Any, opaque: bool, compiled: bool) -> None:
    """What else the caller makes of its tensor would have a gradient as if nothing had been written."""
    gm = fxreg.transform(HandingOn(how, opaque), fxreg.Rule(fxreg.l1(STRENGTH)))
    call: Any = torch.compile(gm, backend="aot_eager") if compiled else gm
    given = torch.ones(2, 3, requires_grad=True) * 2
    first = pytree.tree_leaves(call(given))[0]
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        first.mul_(3)
    given.mul_(3)  # the other way round
    with pytest.raises(RuntimeError, match="is a view and its base or another view of its base has been modified"):
        first.sum()


class Keeping:
    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def clone(self) -> tuple[Tensor]:
        return (self.kept,)

    def __sub__(self, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.kept, other


class Wrapping(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Keeping(x) if x.sum() < 1e9 else x


class HandingOnHidden(nn.Module):
    def __init__(self, how: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.lstm, self.wrap, self.how = nn.Linear(3, 3), nn.LSTM(3, 3), Wrapping(), how

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: (x, *model.lstm(x)),
        lambda model, x: (x,) + model.lstm(x),
        lambda model, x: (model.wrap(x).clone(), model.layer(x)),
        lambda model, x: model.wrap(x) - model.layer(x),
    ],
    ids=["unpacked", "joined", "method", "operator"],
)
def test_so_does_one_where_what_looks_like_arithmetic_hands_on(how: Any) -> None:
    gm = fxreg.transform(HandingOnHidden(how), fxreg.Rule(fxreg.l1(STRENGTH), layer=(nn.Linear, nn.LSTM)))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        pytree.tree_leaves(gm(torch.ones(2, 3, requires_grad=True) * 2))[0].mul_(3)


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.ReLU(inplace=True)], ids=["dropout", "in place"])
def test_so_does_one_into_what_a_layer_handed_on(layer: nn.Module) -> None:
    """Compiled, dropout copies, also where it drops nothing."""
    gm = fxreg.transform(HandingOn(lambda x, linear: (layer(x), linear(x)), False), fxreg.Rule(fxreg.l1(STRENGTH)))
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        gm(torch.ones(2, 3, requires_grad=True) * 2)[0].mul_(3)


def test_a_sparse_tensor_may_be_handed_on() -> None:
    """Though it has no views."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, torch.sparse.mm(x, self.weight)

    model = Mixing()
    given = torch.eye(3).to_sparse().requires_grad_()
    same, mixed = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))(given)
    (mixed.sum() + torch.sparse.sum(same)).backward()
    assert torch.equal(model.weight.grad, torch.full((3, 2), 1 + STRENGTH))


def test_what_is_made_of_what_was_given_may_be_written_into() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return x + self.layer(x), self.layer(x) - x, (x, self.layer(x))[1] * x

    first, second, third = fxreg.transform(Residual(), fxreg.Rule(fxreg.l1(STRENGTH)))(torch.ones(2, 3))
    for output in (first, second, third):
        output.mul_(2)
    (first + second + third).sum().backward()


# What compiled code reaches, and what an optimizer makes of the loss.


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


@pytest.mark.slow
def test_compiled_what_is_in_one_graph_is_reached() -> None:
    """As by torch.compile alone, a gradient is 0 there that is None in eager mode, and via="gradient" adds to it."""
    found = {}
    for via in (None, "gradient"):
        for compiled in (False, True):
            model = TwoHeads()
            module: Any = model if via is None else fxreg.transform(model, fxreg.Rule(fxreg.l2(0.5), via=via))
            module = torch.compile(module, backend="aot_eager") if compiled else module
            module(torch.ones(1, 3))[0].sum().backward()
            grad, weight = model.other.weight.grad, model.other.weight.detach()
            found[via, compiled] = None if grad is None else "zero" if not grad.any() else torch.equal(grad, weight)
    assert found == {(None, False): None, (None, True): "zero", ("gradient", False): None, ("gradient", True): True}


@pytest.mark.parametrize("emit", ["backward", "output"])
def test_a_line_search_needs_the_penalty_in_the_loss(emit: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def trained(module: nn.Module, penalty: Callable[[], Tensor] | None) -> Tensor:
        optimizer = torch.optim.LBFGS(module.parameters(), line_search_fn="strong_wolfe", max_iter=20)

        def closure() -> Tensor:
            optimizer.zero_grad()
            output = module(x)
            loss = output[1] if isinstance(output, tuple) else torch.zeros(()) if penalty is None else penalty()
            loss = loss + ((output[0] if isinstance(output, tuple) else output) - y).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    start = nn.Linear(3, 1).double()
    plain, model = copy.deepcopy(start), copy.deepcopy(start)
    expected = trained(plain, lambda: 0.3 * sum((p * p).sum() for p in plain.parameters()))
    actual = trained(fxreg.transform(model, fxreg.Rule(fxreg.l2(0.3)), emit=emit), None)
    assert torch.allclose(actual, expected, rtol=1e-4) == (emit == "output")


# What cannot be attached to raises.


class Bag:
    def __init__(self, value: Any) -> None:
        self.value = value


class SlotBag:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class CallableBag(Bag):
    def __call__(self) -> Any:
        return self.value


class MyDict(dict):  # type: ignore[type-arg]
    pass


class Listed(list):  # type: ignore[type-arg]
    def __init__(self, *parts: Any) -> None:
        super().__init__(parts)
        self.first = parts[0]


class ByName(dict):  # type: ignore[type-arg]
    """Has its items as attributes, and raises what a dict raises."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class InOne(dict):  # type: ignore[type-arg]
    """Has its items as attributes: they are its dictionary."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Ordered(OrderedDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, [value])


class Counted(collections.defaultdict):  # type: ignore[type-arg]
    pass


class MyTuple(tuple):  # type: ignore[type-arg]
    __slots__ = ()


def closure(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


UNKNOWN: dict[str, Callable[[Tensor], Any]] = {
    "SlotBag": SlotBag,
    "Counted": lambda t: Counted(int, t=t),
    "MyTuple": lambda t: MyTuple((t,)),
    "function": closure,
    "generator": lambda t: (part for part in (t,)),
}
PLAIN: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "SimpleNamespace": (lambda t: types.SimpleNamespace(deep=[t]), lambda o: o.deep[0]),
    "Bag": (Bag, lambda o: o.value),
    "MyDict": (lambda t: MyDict(t=t), lambda o: o["t"]),
    "Listed": (Listed, lambda o: o[0] + o.first),
    "ByName": (lambda t: ByName(inner=ByName(t=t)), lambda o: o.inner.t),
    "InOne": (lambda t: InOne(t=t, k=[t]), lambda o: o.t + o["t"] + o.k[0]),
    "Ordered": (lambda t: Ordered(t=t), lambda o: o["t"][0]),
    "CallableBag": (CallableBag, lambda o: o()),
    "Normal": (lambda t: torch.distributions.Normal(t, 1.0, validate_args=False), lambda o: o.log_prob(0.5)),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a tensor"])
def test_a_plain_object_is_rebuilt_and_its_tensors_carry_the_penalty_back(name: str, alone: bool) -> None:
    wrap, read = PLAIN[name]
    model = packing(Structure(lambda a, b, c: wrap(b) if alone else (a, wrap(b)), ()), True)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))

    def loss(output: Any) -> Tensor:
        return read(output if alone else output[1]).square().sum()

    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss(model(X)) + by_hand(model), parameters, allow_unused=True)
    actual = torch.autograd.grad(loss(gm(X)), parameters, allow_unused=True)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert type(gm(X)) is type(model(X))


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a tensor"])
def test_an_object_with_tensors_inside_that_cannot_be_rebuilt_raises(name: str, alone: bool) -> None:
    wrap = UNKNOWN[name]
    structure = Structure(lambda a, b, c: wrap(b) if alone else (a, wrap(b)), ())
    gm = fxreg.transform(packing(structure, True), fxreg.Rule(fxreg.l1(STRENGTH)))
    with pytest.raises(fxreg.CaptureError) as caught:
        gm(X)
    for part in (name, "register_pytree_node", "emit='output'", "emit='loss'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_error_is_right_that_emit_output_takes_such_objects(name: str) -> None:
    structure = Structure(lambda a, b, c: UNKNOWN[name](b), ())
    model = packing(structure, True)
    output, penalty = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)), emit="output")(X)
    assert type(output) is type(model(X))
    torch.testing.assert_close(penalty, by_hand(model), **TOLERANCE)


class MyList(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize("emit", ["backward", "output"])
@pytest.mark.parametrize("kind", [MyDict, MyList, MyTuple])
def test_a_traced_container_of_a_class_of_its_own_is_never_degraded_to_its_base(kind: Any, emit: Any) -> None:
    structure = Structure(lambda a, b, c: kind(a=a) if kind is MyDict else kind((a,)), ())
    model = packing(structure, False)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)), emit=emit)
    if emit == "output" or kind is not MyTuple:
        found, wanted = gm(X)[0] if emit == "output" else gm(X), model(X)
        assert type(found) is type(wanted) is kind
        assert_equal(found, wanted)
    else:
        with pytest.raises(fxreg.CaptureError, match=f"{kind.__name__} with tensors inside"):
            gm(X)


def test_an_object_without_tensors_passes() -> None:
    structure = Structure(lambda a, b, c: (a, Bag("text"), Bag([1, None])), ())
    model = packing(structure, True)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))
    output, bag, other = gm(X)
    assert (bag.value, other.value) == ("text", [1, None])
    assert torch.equal(output, model(X)[0])


NOTHING: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "None": lambda a, b, c: None,
    "an int": lambda a, b, c: 3,
    "nothing": lambda a, b, c: (),
    "a detached tensor": lambda a, b, c: {"a": a.detach()},
    "an integer tensor": lambda a, b, c: [a.argmax(), None],
}


@pytest.mark.parametrize("rules", [[], [fxreg.Rule(fxreg.l1(STRENGTH), via="gradient")]], ids=["none", "gradient"])
def test_no_penalty_is_a_zero_of_the_callers_own(rules: list[fxreg.Rule]) -> None:
    model = make()
    gm = fxreg.transform(model, rules, emit="output")
    _, total = gm(X)
    total += 5.0
    assert gm(X)[1].equal(torch.tensor(0.0))
    x = X.clone().requires_grad_()
    output, penalty = torch.utils.checkpoint.checkpoint(
        gm, x, use_reentrant=True
    )  # makes its outputs results of its own
    (loss_of(output) + penalty).backward()
    found = gradients(model)
    model.zero_grad()
    assert not gm(X)[1].requires_grad
    loss_of(gm(X)[0]).backward()
    assert_gradients(model, found)


@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
@pytest.mark.parametrize("name", NOTHING)
def test_an_output_without_a_differentiable_tensor_raises_while_gradients_are_on(name: str, opaque: bool) -> None:
    model = packing(Structure(NOTHING[name], ()), opaque)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(STRENGTH)))
    with pytest.raises(fxreg.FxregError, match=r"without a differentiable tensor.*no_grad\(\).*emit='output'"):
        gm(X)
    with torch.no_grad():
        assert_equal(gm(X), model(X))


def test_where_every_penalized_parameter_is_frozen_nothing_is_attached_and_nothing_raises() -> None:
    model, gm = regularized()
    model.requires_grad_(False)
    assert not gm(X).requires_grad
    assert torch.equal(gm(X), model(X))


class _First(torch.autograd.Function):
    """Gives its second argument no gradient: not even zeros."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
        return one * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(x)


def test_where_an_output_gets_no_gradient_parameters_behind_it_get_none() -> None:
    model = _Pair()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1), name="one"))
    _First.apply(*gm(torch.ones(2, 3))).sum().backward()
    assert model.one.weight.grad is not None
    assert model.other.weight.grad is None  # zeros would let an optimizer decay it


class Marking(nn.Module):
    """Gives its output an attribute, and lets it keep its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        y.retain_grad()  # type: ignore[no-untyped-call]
        y.gain = 3.0  # type: ignore[attr-defined]
        return y


@pytest.mark.parametrize("examples", [None, (torch.ones(2, 3),)])
def test_an_output_has_what_the_model_gave_it(examples: Any) -> None:
    gm: Any = fxreg.transform(Marking(), fxreg.Rule(fxreg.l1(0.1)), example_inputs=examples)
    output = gm(torch.ones(2, 3))
    output.sum().backward()
    assert output.gain == 3.0
    torch.testing.assert_close(output.grad, torch.ones(2, 3), rtol=0, atol=0)
