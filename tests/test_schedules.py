"""Schedules against torch's own learning rates, and a scheduler against strengths that are set by hand."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

import fxreg
from fxreg.schedules import Schedule, cosine, cubic, linear, step, warmup


def rates(make: Callable[[optim.Optimizer], Any], count: int) -> list[float]:
    """The learning rates, of 1 at first, that a scheduler of torch's gives."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "make", "count"),
    [
        (linear(8, 0.25, 1.0), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 8), 12),
        (linear(5, 1.0, 0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 5), 9),
        (cosine(7), lambda o: lr_scheduler.CosineAnnealingLR(o, 7), 8),
        (cosine(6, 1.0, 0.2), lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 0.2), 7),
        (step(3, 0.5), lambda o: lr_scheduler.StepLR(o, 3, 0.5), 12),
        (step(1), lambda o: lr_scheduler.ExponentialLR(o, 0.1), 6),
        (linear(4, 1.0, 0.0), lambda o: lr_scheduler.PolynomialLR(o, 4), 7),
        (cubic(4, 1.0, 0.0), lambda o: lr_scheduler.PolynomialLR(o, 4, power=3), 7),
        (
            warmup(4, cosine(6)),
            lambda o: lr_scheduler.LambdaLR(o, lambda t: t / 4 if t < 4 else (1 + math.cos(math.pi * (t - 4) / 6)) / 2),
            11,
        ),
        (warmup(3), lambda o: lr_scheduler.LambdaLR(o, lambda t: min(t / 3, 1)), 6),
        (warmup(2, linear(2, 0.5, 0.0)), lambda o: lr_scheduler.LambdaLR(o, [0, 0.25, 0.5, 0.25, 0, 0].__getitem__), 5),
    ],
    ids=lambda value: repr(value) if isinstance(value, linear | cosine | cubic | step | warmup) else "",
)
def test_shapes_are_those_of_learning_rates(schedule: Schedule, make: Any, count: int) -> None:
    assert [schedule(t) for t in range(count)] == pytest.approx(rates(make, count), abs=1e-12)


def test_a_cubic_is_gradual_sparsifications() -> None:
    for t in range(20):
        assert cubic(10, 0.2, 0.9)(t) == pytest.approx(0.9 + (0.2 - 0.9) * (1 - min(t, 10) / 10) ** 3)


BAD: list[Callable[[], Any]] = [
    lambda: linear(0), lambda: linear(2.0), lambda: linear(True), lambda: linear(2, -1.0), lambda: cosine(2, math.nan),  # type: ignore[arg-type]
    lambda: cubic(2, 0.0, math.inf), lambda: step(0), lambda: step(2, -0.1), lambda: warmup(-1), lambda: warmup(2, 3),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("make", BAD)
def test_what_is_no_schedule_is_a_rule_error(make: Callable[[], Any]) -> None:
    with pytest.raises(fxreg.RuleError):
        make()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x).square().sum()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
RULES = [fxreg.Rule(fxreg.l1(0.3), param="weight"), fxreg.Rule(fxreg.elastic_net(0.1, 0.2), param="bias")]
SCHEDULES: dict[str, Schedule] = {"l1": warmup(3, cosine(4)), "elastic_net.l2": lambda t: 1.0 + t % 3}


def made() -> tuple[Net, torch.fx.GraphModule]:
    torch.manual_seed(0)
    model = Net()
    return model, fxreg.transform(model, RULES)


def now(gm: nn.Module) -> dict[str, float]:
    return {label: float(value) for label, value in fxreg.strengths(gm).items()}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_training_is_that_with_the_strengths_written_by_hand_and_compiles_once(is_compiled: bool) -> None:
    model, gm = made()
    theirs = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    run: Any = torch.compile(gm, backend=counter, fullgraph=True) if is_compiled else gm
    scheduler = fxreg.StrengthScheduler(run, SCHEDULES)
    ours, hand = (optim.SGD(one.parameters(), lr=0.01) for one in (model, theirs))
    for t in range(10):
        ours.zero_grad()
        run(X).backward()
        ours.step()
        scheduler.step()
        hand.zero_grad()
        weight, bias = theirs.linear.weight, theirs.linear.bias
        factor = t / 3 if t < 3 else (1 + math.cos(math.pi * min((t - 3) / 4, 1))) / 2
        penalty = 0.3 * factor * weight.abs().sum() + 0.1 * bias.abs().sum() + 0.2 * (1 + t % 3) * bias.square().sum()
        (theirs(X) + penalty).backward()
        hand.step()
        torch.testing.assert_close(model.linear.weight, weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.linear.bias, bias, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == int(is_compiled)
    assert scheduler.last_step == 10


def test_the_protocol_of_learning_rates() -> None:
    _, gm = made()
    scheduler = fxreg.StrengthScheduler(gm, {"l1": linear(2, 1.0, 0.5)})
    assert scheduler.last_step == 0
    assert scheduler.get_last_strength() == {"l1": 0.3}
    scheduler.step()
    assert scheduler.get_last_strength() == {"l1": pytest.approx(0.225)}
    assert now(gm) == {**scheduler.get_last_strength(), "elastic_net.l1": 0.1, "elastic_net.l2": 0.2}


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_a_resumed_run_has_the_strengths_of_one_that_was_not_interrupted(stop: int) -> None:
    scheduler = fxreg.StrengthScheduler(made()[1], SCHEDULES)
    whole = [scheduler.get_last_strength()]
    for _ in range(12):
        scheduler.step()
        whole.append(scheduler.get_last_strength())
    first = fxreg.StrengthScheduler(made()[1], SCHEDULES)
    for _ in range(stop):
        first.step()
    saved = json.loads(json.dumps(first.state_dict()))
    _, gm = made()
    fxreg.strengths(gm)["l1"] = 7.0  # as a checkpoint of the strengths may have left them
    resumed = fxreg.StrengthScheduler(gm, SCHEDULES)
    resumed.load_state_dict(saved)
    for wanted in whole[stop:]:
        assert resumed.get_last_strength() == wanted
        assert {label: now(gm)[label] for label in SCHEDULES} == wanted
        resumed.step()


@pytest.mark.parametrize("bad", [None, "1", -0.1, math.nan, math.inf])
def test_a_schedule_that_gives_no_strength_changes_nothing(bad: Any) -> None:
    _, gm = made()
    with pytest.raises(fxreg.RuleError, match="the schedule of 'l1', at step 0"):
        fxreg.StrengthScheduler(gm, {"elastic_net.l1": lambda t: 0.0, "l1": lambda t: bad})
    assert now(gm) == {"l1": 0.3, "elastic_net.l1": 0.1, "elastic_net.l2": 0.2}
    scheduler = fxreg.StrengthScheduler(gm, {"elastic_net.l1": lambda t: 2.0, "l1": lambda t: bad if t else 0.5})
    with pytest.raises(fxreg.RuleError, match="the schedule of 'l1', at step 1"):
        scheduler.step()
    assert scheduler.last_step == 0
    assert now(gm) == {"l1": 0.15, "elastic_net.l1": 0.2, "elastic_net.l2": 0.2}


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    _, gm = made()
    with pytest.raises(fxreg.FxregError, match="no strength 'l3'"):
        fxreg.StrengthScheduler(gm, {"l1": linear(2), "l3": linear(2)})
    with pytest.raises(fxreg.RuleError, match="must be a function"):
        fxreg.StrengthScheduler(gm, {"l1": 0.5})  # type: ignore[dict-item]
    for odd in (None, lambda t: 0.5, [("l1", linear(2))]):
        with pytest.raises(fxreg.RuleError, match="must be a mapping of labels"):
            fxreg.StrengthScheduler(gm, odd)  # type: ignore[arg-type]
    with pytest.raises(fxreg.FxregError, match="expected a module"):
        fxreg.StrengthScheduler(nn.Linear(2, 2), {})
    assert now(gm)["l1"] == 0.3
    scheduler = fxreg.StrengthScheduler(gm, {"l1": linear(2, 1.0, 0.0)})
    scheduler.step()
    states: list[Any] = [
        None, {}, {"last_step": -1, "initial": {"l1": 0.1}}, {"last_step": 1, "initial": {"l2": 0.1}},
        {"last_step": 1, "initial": {"l1": -1.0}}, {"last_step": 1.0, "initial": {"l1": 0.1}},
    ]  # fmt: skip
    for state in states:
        with pytest.raises(fxreg.RuleError):
            scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"last_step": 1, "initial": {"l1": 0.3}}
    assert now(gm)["l1"] == 0.15
