"""A recorded forward is the model for every call, or it steps aside, or it says that it does not hold.

The reference is the original model, built a second time from the same seed, with the penalty written by hand.
"""

import copy
import dataclasses
import gc
import logging
import pickle
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxreg
from fxreg import deepening
from fxreg.capture import capture
from fxreg.module import state_of
from fxreg.structure import tensors

from . import recorded
from .attacks import ATTACKS, OnOwnClass
from .marks import some
from .recorded import (
    CASES,
    AskedKind,
    AsksByName,
    AsksForNothing,
    AsksValuesInEager,
    AsksWhetherCompiled,
    AsksWhetherTraced,
    ByMode,
    Case,
    GlobalCounter,
    Net,
    NoneSometimes,
    Parts,
    Records,
    ValueBranch,
    WithSizes,
)

pytestmark = [
    # Of Dynamo looking at its inputs after a graph break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

STRENGTH = 0.01
L1 = fxreg.Rule(fxreg.l1(STRENGTH))
HALF = fxreg.Rule(fxreg.scale(0.5))
ONES = torch.ones(4, 3)


def build(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make()


def emitted(make: Any, example: tuple[Any, ...] = (ONES,), rule: fxreg.Rule = L1) -> tuple[nn.Module, Any]:
    model = build(make)
    return model, fxreg.transform(model, rule, example_inputs=copy.deepcopy(example))


def is_recorded(gm: Any) -> bool:
    return state_of(gm).captured.assumed is not None


@dataclasses.dataclass
class Step:
    """What one call showed, or the error that it raised."""

    output: Any
    arguments: Any
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random: Any
    state: Any


def observe(case: Case, called: nn.Module, model: nn.Module, call: Any, rule: fxreg.Rule | None) -> Any:
    """Make one call and a backward pass through it; with a rule, add by hand what it stands for."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    arguments = copy.deepcopy(call) if isinstance(call, tuple) else ()
    try:
        output = called(*arguments) if isinstance(call, tuple) else call(called, model)
        live = [tensor for tensor in tensors(output) if tensor.requires_grad]
        if live:
            loss = sum((tensor * tensor.detach().cos()).sum() for tensor in live)
            if rule is L1:
                loss = loss + STRENGTH * sum(parameter.abs().sum() for parameter in model.parameters())
            loss.backward()
    except Exception as error:
        return error
    factor = 0.5 if rule is HALF else 1.0
    return Step(
        plain(output),
        plain(arguments),
        {name: p.grad if p.grad is None else p.grad * factor for name, p in model.named_parameters()},
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        (torch.get_rng_state(), random.getstate()),
        copy.deepcopy(case.state(model)),
    )


def plain(value: Any) -> Any:
    """A value as it is now, with the types of all its parts."""
    match value:
        case Tensor():
            return value.detach().clone().requires_grad_(value.requires_grad)
        case dict():
            return (type(value), [(key, plain(one)) for key, one in value.items()])
        case list() | tuple():
            return (type(value), [plain(one) for one in value])
        case _ if hasattr(value, "__dict__") and not isinstance(value, type | int):
            return (type(value), plain(vars(value)))
    return (type(value), value)


def assert_same(ours: Any, theirs: Any, where: str, exact: bool = True) -> None:
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        tolerances = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text: f"{where}: {text}", **tolerances)
        assert ours.requires_grad == theirs.requires_grad, where
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs), where
        assert len(ours) == len(theirs), where
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, where, exact)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key, one in theirs.items():
            assert_same(ours[key], one, f"{where}, {key}", exact)
    else:
        assert ours == theirs, where


def is_quick(name: str) -> bool:
    """Of the sizes and the attacks, some; of everything else, each."""
    of_a_kind = [one for one in CASES if one.startswith("size-")], list(ATTACKS)
    return all(name not in kind or kind.index(name) % 4 == 0 for kind in of_a_kind)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(pytest.param(name, L1, id=f"{name}-l1") for name in CASES),
        *(
            pytest.param(n, HALF, id=f"{n}-half")
            for n in some([n for n in CASES if not n.startswith("size-")], every=3)
        ),
    ],
)
@pytest.mark.slow
def test_later_calls_are_the_models(name: str, rule: fxreg.Rule) -> None:
    check(CASES[name], rule)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if is_quick(name) else pytest.mark.slow) for name in ATTACKS]
)
def test_attacks_are_the_models_or_refused(name: str) -> None:
    check(ATTACKS[name], L1)


ERRING = ("HookOfFirst",)
"""Compiled, the model itself is not what it is in eager mode: Dynamo does not guard hooks, and it gets a second one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", some([n for k, n in enumerate((*CASES, *ATTACKS)) if not n.startswith("size-") or k % 5 == 0])
)
def test_compiled_calls_are_the_compiled_models(name: str) -> None:
    check({**CASES, **ATTACKS}[name], L1, compiled=True, erring=name in ERRING)


def check(case: Case, rule: fxreg.Rule, compiled: bool = False, erring: bool = False) -> None:
    """Make the calls of a case with the model and with what is emitted for it, in both modes."""
    torch.manual_seed(5)
    example, later = case.example(), case.later()
    model, gm = emitted(case.make, example, rule)
    twin = build(case.make)
    assert case.is_recorded in (None, is_recorded(gm))
    assert_same(plain(case.state(model)), plain(case.state(twin)), "after the transform")
    calls: tuple[Any, ...] = (example, *later, example)
    called, reference = gm, twin
    if compiled:
        calls = tuple(call for call in (*later[:1], example) if isinstance(call, tuple))
        called = torch.compile(gm, backend="eager")
        reference = twin if erring else torch.compile(twin, backend="eager")
    for training in (True, False):
        for number, call in enumerate(calls if training or not compiled else calls[-1:]):
            twin.train(training)
            gm.train(training)
            where = f"call {number}, {'train' if training else 'eval'}"
            theirs = observe(case, reference, twin, call, rule)
            ours = observe(case, called, model, call, None)
            if isinstance(ours, fxreg.FxregError) and case.refusal:
                continue
            if isinstance(theirs, Exception):
                assert compiled or type(ours) is type(theirs), where  # Dynamo fails on what is not recorded
                continue
            if isinstance(ours, Exception):
                raise ours
            for field in dataclasses.fields(Step):
                mine, other = getattr(ours, field.name), getattr(theirs, field.name)
                assert_same(mine, other, f"{where}, {field.name}", exact=field.name != "gradients")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refusal])
def test_nothing_is_refused_without_a_reason(name: str) -> None:
    """A case that allows a refusal must see one: otherwise its reason is not one any more."""
    case = CASES[name]
    torch.manual_seed(5)
    example, later = case.example(), case.later()
    _, gm = emitted(case.make, example)
    assert any(isinstance(observe(case, gm, gm, call, None), fxreg.FxregError) for call in later)


class Batched(Net):
    """Uses its sizes everywhere, and asks nothing of them."""

    def run(self, x: Tensor) -> Any:
        n = x.shape[0]
        h = self.op(self.fc(x).view(1, n, 3)).reshape(n, -1)
        return h / n + torch.arange(n)[:, None], n * 2


Batched.forward = Net.forward = lambda self, x: type(x) if self.is_odd else self.run(x)


class Branched(Batched):
    def run(self, x: Tensor) -> Any:
        return self.fc(x) * 2 if x.shape[0] > 4 else self.fc(x)


class Predicts(Net):
    """A distribution that checks what it is given where torch's do so by default."""

    def run(self, x: Tensor) -> Any:
        y = self.op(self.fc(x))
        return -torch.distributions.StudentT(3.0, y, y.exp()).log_prob(x)


Predicts.forward = Batched.forward


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_distributions_check_where_those_of_the_model_do(monkeypatch: pytest.MonkeyPatch, is_compiled: bool) -> None:
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    model, gm = emitted(Predicts)
    assert is_recorded(gm)
    odd = torch.full((2, 3), torch.nan)
    for one in (model, gm):
        with pytest.raises(ValueError, match="constraint"):
            one(odd)
    if is_compiled:
        gm = torch.compile(gm, backend="eager")
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # as Dynamo does, for all code
    for value in (odd, ONES[:2]):
        torch.testing.assert_close(gm(value), model(value), rtol=0, atol=0, equal_nan=True)


def test_sizes_stay_symbolic() -> None:
    model, gm = emitted(Batched)
    assert is_recorded(gm)
    state_of(gm).others = ()  # nothing to fall back to
    for n in (1, 2, 4, 7):
        x = torch.randn(n, 3)
        assert state_of(gm).assumes(x)
        assert_same(plain(gm(x)), plain(model(x)), f"{n} rows")


def test_another_answer_takes_the_other_graph() -> None:
    model, gm = emitted(Branched)
    small, large = torch.randn(3, 3), torch.randn(5, 3)
    assert state_of(gm).assumes(small)
    assert not state_of(gm).assumes(large)
    assert_same(gm(small), model(small), "small")
    assert_same(gm(large), model(large), "large")


def test_values_are_asked_for() -> None:
    model, gm = emitted(ValueBranch)
    assert state_of(gm).assumes(ONES)
    assert not state_of(gm).assumes(-ONES)
    assert_same(gm(-ONES), model(-ONES), "negative")


def test_kinds_are_asked_for_where_the_forward_asks() -> None:
    _, asking = emitted(AskedKind)
    assert state_of(asking).assumes(ONES)
    assert not state_of(asking).assumes(ONES.double())
    _, gm = emitted(Batched)
    assert state_of(gm).assumes(ONES.double())


def test_the_mode_is_live_and_one() -> None:
    _, gm = emitted(Parts)
    for training in (True, False):
        gm.train(training)
        assert state_of(gm).assumes(ONES)
    gm.train()
    gm.block.eval()
    assert not state_of(gm).assumes(ONES)


def test_another_number_of_arguments_or_kind_is_not_assumed() -> None:
    _, gm = emitted(Batched)
    assert not state_of(gm).assumes(ONES[0])
    assert not state_of(gm).assumes([ONES])
    assert not state_of(gm).assumes(None)


def test_each_mode_has_a_graph_where_one_cannot_hold_both() -> None:
    _, gm = emitted(ByMode)
    state = state_of(gm)
    assert [one.assumed and one.assumed.training for one in state.captured.chain] == [True, False, None]
    assert not state.captured.opaque
    assert not state.captured.chain[1].opaque
    for training in (True, False):
        gm.train(training)
        assert [state.assumes(ONES, which=which) for which in range(3)] == [training, not training, False]
        retraced = fx.symbolic_trace(gm)
        assert ("made" in retraced.code) is training


def test_what_an_opaque_module_gives_is_checked() -> None:
    _, gm = emitted(NoneSometimes)
    with pytest.raises(fxreg.CaptureError, match="what 'op' returned was"):
        gm(-ONES)


def test_a_changed_attribute_is_followed() -> None:
    class Scaled(Batched):
        factor = 1.0

        def __init__(self) -> None:
            super().__init__()
            self.k = 2.0

        def run(self, x: Tensor) -> Any:
            return self.fc(x) * self.k

    model, gm = emitted(Scaled)
    assert is_recorded(gm)
    gm(ONES)
    model.k = 3.0
    assert not state_of(gm).assumes(ONES)
    assert torch.equal(gm(ONES), model(ONES))


@pytest.mark.parametrize("make", [ValueBranch, Parts, Records, AskedKind, ByMode])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda gm: pickle.loads(pickle.dumps(gm))], ids=["copied", "pickled"])
def test_copies_are_recorded_and_independent(make: Any, how: Any) -> None:
    model, gm = emitted(make)
    other = how(gm)
    assert is_recorded(other)
    for training in (True, False):
        gm.train(training)
        other.train(training)
        for x in (ONES, -torch.ones(2, 3)):
            torch.manual_seed(1)
            theirs = plain(model(x))
            torch.manual_seed(1)
            assert_same(plain(other(x)), theirs, "the copy")
    gm.eval()
    other.train()
    assert not model.training
    other.eval()
    with torch.no_grad():
        other.fc.weight.zero_()
    assert model.fc.weight.any()
    for x in (ONES, -ONES):  # both of its graphs use its own weights
        output = next(iter(tensors(other(x))))
        torch.testing.assert_close(output, output[:1].expand_as(output))


def test_whoever_runs_the_graph_itself_is_told_what_it_assumes() -> None:
    model, gm = emitted(Branched)
    interpreter = fx.Interpreter(gm)
    assert_same(interpreter.run(ONES), model(ONES), "interpreted")
    with pytest.raises(fxreg.CaptureError, match="does not hold for this call"):
        interpreter.run(torch.ones(5, 3))


def test_the_gradient_is_the_others_graphs_as_well() -> None:
    model, gm = emitted(Branched)
    for n in (3, 5):
        model.zero_grad()
        gm(torch.randn(n, 3)).sum().backward()
        ours = model.op.lin.weight.grad
        assert ours is None or torch.equal(ours, STRENGTH * model.op.lin.weight.sign())
        assert model.fc.weight.grad is not None


def test_stripped_is_recorded_as_well() -> None:
    model, gm = emitted(Branched)
    plain_gm = fxreg.strip(gm)
    assert is_recorded(plain_gm)
    for n in (3, 5):
        x = torch.randn(n, 3)
        assert_same(plain_gm(x), model(x), f"{n} rows")


def test_verify_and_penalties_see_both_graphs() -> None:
    model, gm = emitted(Branched)
    fxreg.verify(gm, model, (torch.randn(3, 3),))
    fxreg.verify(gm, model, (torch.randn(5, 3),))
    assert fxreg.penalties(gm)


def test_collecting_garbage_is_none_of_the_forwards_doing() -> None:
    def note(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()

    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        captured = capture(build(Branched), (ONES,))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert captured.assumed is not None
    assert gc.isenabled()


def test_without_examples_nothing_is_recorded() -> None:
    assert not is_recorded(fxreg.transform(build(Branched), L1))


def test_transform_leaves_the_model_as_it_was() -> None:
    model, twin = build(Parts), build(Parts)
    model.block.eval()
    twin.block.eval()
    before = torch.get_rng_state()
    fxreg.transform(model, L1, example_inputs=(ONES,))
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == [m.training for m in twin.modules()]
    assert_same(dict(model.state_dict()), dict(twin.state_dict()), "state")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_transform_leaves_globals_and_classes_as_they_were() -> None:
    before, OnOwnClass.log = recorded.SHARED.total, []
    emitted(GlobalCounter)
    emitted(OnOwnClass)
    assert recorded.SHARED.total == before
    assert OnOwnClass.log == []


class Strict(logging.Logger):
    """A logger that counts what it is asked."""

    asked = 0

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  logging's name
        self.asked += 1
        return super().isEnabledFor(level)


STRICT = Strict("strict", logging.WARNING)


class LoggedByOther(Net):
    def run(self, x: Tensor) -> Any:
        STRICT.info("not shown")
        return self.fc(x) * STRICT.asked


def test_a_logger_of_another_class_is_an_object_like_any() -> None:
    STRICT.asked = 0
    model, gm = emitted(LoggedByOther)
    assert STRICT.asked == 0
    assert not is_recorded(gm)
    for k in (1, 2):
        assert torch.equal(gm(ONES), model.fc(ONES) * k)


class SetByTrain(Net):
    factor = 2.0

    def train(self, mode: bool = True) -> Any:
        self.factor = 2.0 if mode else 3.0
        return super().train(mode)

    def run(self, x: Tensor) -> Any:
        return self.fc(x) * self.factor


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_train_sets_is_followed(is_compiled: bool) -> None:
    model, gm = emitted(SetByTrain)
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    for training in (True, False, True):
        gm.train(training)
        assert_same(called(ONES), model.fc(ONES) * (2.0 if training else 3.0), f"training={training}")


def compiled_recordings(make: Any) -> list[tuple[str, ...]]:
    return [one.assumed.ways for one in state_of(emitted(make)[1]).captured.chain if one.assumed]


@pytest.mark.slow
def test_where_a_forward_asks_whether_it_is_compiled_each_answer_has_a_graph() -> None:
    assert compiled_recordings(AsksWhetherCompiled) == [("eager",), ("compiled",)]
    assert compiled_recordings(AsksByName) == [("eager",)]
    assert compiled_recordings(AsksForNothing) == [("eager", "compiled")]
    assert compiled_recordings(AsksValuesInEager) == [("eager",), ("compiled",)]
    assert compiled_recordings(Branched) == [("eager", "compiled", "traced")]


def test_what_was_recorded_as_if_compiled_is_verified_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that would be wrong there is left aside there."""
    monkeypatch.setattr(deepening, "_alike", lambda one, other: True)  # says that the graphs for both are one
    assert compiled_recordings(AsksWhetherCompiled) == [("eager",)]


@pytest.mark.slow
def test_values_are_asked_for_once_in_compiled_code() -> None:
    class Twice(Net):
        def run(self, x: Tensor) -> Any:
            y = self.fc(x) * (2 if (x > -9).all() else 3)
            return y * (2 if (x < 99).all() else 3) + (1 if (x == 1).any() else 0)

    Twice.forward = lambda self, x: type(x) if self.is_odd else self.run(x)
    model, gm = emitted(Twice)
    assert is_recorded(gm)
    breaks = torch._dynamo.explain(gm)(ONES).graph_break_count
    torch.compiler.reset()
    assert breaks < torch._dynamo.explain(model)(ONES).graph_break_count


@pytest.mark.parametrize("make", [AsksWhetherCompiled, AsksByName, AsksForNothing, AsksWhetherTraced])
def test_a_forward_that_asks_how_it_runs_is_not_traced(make: Any) -> None:
    class Plainly(make):
        forward = make.run

    assert [*state_of(fxreg.transform(build(Plainly), L1)).captured.opaque] == [""]


@pytest.mark.parametrize("make", [Parts, ByMode])
def test_compiled(make: Any) -> None:
    model, gm = emitted(make)
    compiled = torch.compile(gm, backend="aot_eager")
    for training in (True, False):
        gm.train(training)
        torch.manual_seed(1)
        theirs = plain(model(ONES))
        torch.manual_seed(1)
        assert_same(plain(compiled(ONES)), theirs, "compiled", exact=False)


class AnyKeywords(nn.Module):
    """Takes keyword arguments of any number, and cares for their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, **terms: Tensor) -> Tensor:
        y = self.second(self.first(x)) * (1 if type(x) is Tensor else 2)
        for i, term in enumerate(terms.values()):
            y = y * (i + 1) + term
        return y


@pytest.mark.slow
@pytest.mark.parametrize("is_pickled", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_keyword_arguments_of_any_number_are_recorded_in_their_order(is_pickled: bool, is_compiled: bool) -> None:
    x, u, v = torch.randn(3, 2, 3).unbind()
    model = AnyKeywords()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)), example_inputs={"x": x, "u": u, "v": v})
    assert not fxreg.explain(gm).opaque
    gm = pickle.loads(pickle.dumps(gm)) if is_pickled else gm
    called: Any = torch.compile(gm, backend="eager") if is_compiled else gm
    for terms in ({"u": u, "v": v}, {"v": v, "u": u}, {"u": u}, {}, {"u": u, "v": v, "w": u}, {"u": u, "w": v}):
        torch.testing.assert_close(called(x, **terms), model(x, **terms), rtol=0, atol=0)


class Promising(nn.Module):
    """Returns functions that it makes, with what is of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        n = x.shape[0]
        return WithSizes(self.linear(x), {"closed": lambda: n, "default": lambda n=n: n})


def test_a_function_that_the_forward_makes_is_of_the_call() -> None:
    gm: Any = fxreg.transform(Promising(), fxreg.Rule(fxreg.l1(0.1)), example_inputs=(torch.ones(4, 3),))
    assert [late() for late in gm(torch.randn(2, 3)).sizes.values()] == [2, 2]


class OfKind(nn.Module):
    """Asks for a kind of tensors that torch has for its own reasons, and that crashes if it is asked of a proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if isinstance(x, torch.FloatTensor) else 3.0)


@pytest.mark.parametrize("examples", [None, (torch.ones(4, 3),)])
def test_old_kinds_of_tensors_are_asked_for_when_it_runs(examples: Any) -> None:
    model = OfKind()
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.1)), example_inputs=examples)
    for x in (torch.randn(4, 3), torch.randn(2, 3)):
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
