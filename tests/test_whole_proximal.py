"""A proximal step inside of a compiled training step is the one behind the ordinary loop's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, AdamW

import fxreg
from fxreg import proximal
from fxreg.effects import registry

from .generated import code_of
from .marks import slow_but
from .test_constraints import EFFECTS as CONSTRAINTS
from .test_registry import EXAMPLES

EFFECTS = {name: example.effect for name, example in EXAMPLES.items() if "proximal" in registry[name].vias}
EFFECTS |= CONSTRAINTS


class Net(nn.Module):
    """Weights like those that the examples' anchors are for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Trial:
    """A model and its twin: one is trained in a whole step, one in the ordinary loop."""

    def __init__(self, *rules: fxreg.Rule, optimizer: Any = SGD, **options: Any) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.models = [Net()]
        self.models.append(copy.deepcopy(self.models[0]))
        self.gms = [fxreg.transform(model, rules) for model in self.models]
        self.optimizers = [optimizer(model.parameters(), lr=0.1, **options) for model in self.models]
        self.inputs, self.target = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def bind(self) -> list[fxreg.ProximalStep]:
        return [fxreg.ProximalStep(*both) for both in zip(self.optimizers, self.gms, strict=True)]

    def whole(self, backend: Any = "aot_eager") -> Any:
        step = fxreg.train_step(self.gms[0], nn.functional.mse_loss, self.optimizers[0], backend=backend)
        return lambda: step(self.inputs, self.target)

    def by_loop(self) -> None:
        self.optimizers[1].zero_grad()
        nn.functional.mse_loss(self.gms[1](self.inputs), self.target).backward()
        self.optimizers[1].step()

    def assert_same(self) -> None:
        for found, expected in zip(*(model.parameters() for model in self.models), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def refuse(*given: Any) -> None:
    raise AssertionError("behind the graph, and not in it")


@pytest.mark.parametrize("name", slow_but({"l1", "l1_ball"}, EFFECTS))
def test_every_operator_is_in_the_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(fxreg.Rule(EFFECTS[name], via="proximal", exclude="third*", param="weight"))
    trial.bind()
    for _ in range(3):
        trial.by_loop()
    monkeypatch.setattr(proximal, "_copy", refuse)
    step = trial.whole()
    for _ in range(3):
        step()
    trial.assert_same()


@pytest.mark.slow
def test_several_rules_act_in_their_order_with_the_learning_rate_of_the_group() -> None:
    rules = fxreg.Rule(fxreg.l1(0.3), via="proximal"), fxreg.Rule(fxreg.box(-0.2, 0.1), param="weight")
    trial = Trial(*rules, optimizer=AdamW, weight_decay=0.1)
    trial.bind()
    step = trial.whole()
    for lr in (0.1, 0.02, 0.02):
        for optimizer, gm in zip(trial.optimizers, trial.gms, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            fxreg.strengths(gm)["l1"] *= 2
        step()
        trial.by_loop()
        trial.assert_same()
    untouched = trial.models[0].third  # it has no gradient: no step of the optimizer, and so none behind it
    assert untouched.weight.abs().max() > 0.2


def test_a_schedule_compiles_nothing_anew() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    trial = Trial(fxreg.Rule(fxreg.group_lasso(0.3), via="proximal", param="weight"))
    trial.bind()
    step = trial.whole(counter)
    for k in range(4):
        trial.optimizers[0].param_groups[0]["lr"] = 0.1 / (k + 1)
        fxreg.strengths(trial.gms[0])["group_lasso"].fill_(0.1 * k)
        step()
    assert counter.frame_count == 1


def test_what_stands_before_it_sees_the_parameters_before_it() -> None:
    trial = Trial(fxreg.Rule(fxreg.l1(0.5), via="proximal", param="weight"))
    seen: list[list[Tensor]] = [[], []]
    for k, (model, optimizer) in enumerate(zip(trial.models, trial.optimizers, strict=True)):
        weight = model.first.weight
        optimizer.register_step_post_hook(lambda *given, k=k, w=weight: seen[k].append(w.detach().clone()))
    trial.bind()
    trial.whole()()
    trial.by_loop()
    trial.assert_same()
    torch.testing.assert_close(*seen)
    assert not torch.equal(seen[0][0], trial.models[0].first.weight)


@pytest.mark.slow
def test_bound_and_removed_between_two_steps() -> None:
    trial = Trial(fxreg.Rule(fxreg.l1(0.5), via="proximal", param="weight"))
    step = trial.whole()
    with pytest.warns(UserWarning, match="never called"):
        trial.by_loop()
    step()
    trial.assert_same()
    bound = trial.bind()
    step(), trial.by_loop()
    trial.assert_same()
    for one in bound:
        one.remove()
    step(), trial.by_loop()
    trial.assert_same()


@pytest.mark.slow
@pytest.mark.parametrize("effect", [fxreg.l1(1e-3), fxreg.non_negative()])
def test_it_costs_no_kernel(effect: Any) -> None:
    counts = []
    for rules in ([], [fxreg.Rule(effect, via="proximal", param="weight")]):
        trial = Trial(*rules)
        if rules:
            fxreg.ProximalStep(trial.optimizers[0], trial.gms[0])
        (code,) = code_of(trial.whole("inductor"))
        counts.append(code.count("cpp_fused") + code.count("extern_kernels."))
    assert counts[0] == counts[1]
