"""Attributes that a graph holds as they were: another one is noticed, in eager mode and in compiled code."""

import contextlib
import dataclasses
import enum
import functools
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import fxreg
from fxreg import watching
from fxreg.layouts import Glance

from . import settings
from .marks import some

L1 = fxreg.Rule(fxreg.l1(0.01))
ROW = torch.ones(2, 4)


class Mode(enum.Enum):
    A = 1
    B = 2


class Scale:
    def __init__(self, by: float) -> None:
        self.by = by

    def apply(self, x: Tensor) -> Tensor:
        return x * self.by


class Bare:
    pass


class Doubling(Scale):
    def apply(self, x: Tensor) -> Tensor:
        return x * self.by * 2


@dataclasses.dataclass(slots=True)
class Slotted:
    by: float


class Cyclic:
    def __init__(self, by: float) -> None:
        self.by = by
        other: Any = Scale(1.0)
        self.other, other.owner = other, self


def scaling(by: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * by


def defaulting(by: float) -> Callable[[Tensor], Tensor]:
    def scaled(x: Tensor, by: float = by) -> Tensor:
        return x * by

    return scaled


def naming(by: float) -> Callable[[Tensor], Tensor]:
    def scaled(x: Tensor, *, by: float = by) -> Tensor:
        return x * by

    return scaled


def nested(by: float) -> Callable[[Tensor], Tensor]:
    """A function whose inner code is all that differs."""
    if by == 2.0:
        return lambda x: torch.stack([y * 2.0 for y in (x,)])
    return lambda x: torch.stack([y * 3.0 for y in (x,)])


CASES: dict[str, tuple[Any, Any, Callable[[Any, Tensor], Tensor]]] = {
    "number": (2.0, 3.0, lambda value, x: x * value),
    "type of number": (1, True, lambda value, x: x if isinstance(value, bool) else -x),
    "enum": (Mode.A, Mode.B, lambda value, x: x if value == Mode.A else -x),
    "class": (list, dict, lambda value, x: x if isinstance(value(), list) else -x),
    "function of torch": (F.relu, F.silu, lambda value, x: value(x)),
    "function with variants": (F.max_pool1d, F.avg_pool1d, lambda value, x: value(x, 2)),
    "builtin": (torch.tanh, torch.sigmoid, lambda value, x: value(x)),
    "function": (settings.twice, settings.thrice, lambda value, x: value(x)),
    "inner code": (nested(2.0), nested(3.0), lambda value, x: value(x)),
    "closure": (scaling(2.0), scaling(3.0), lambda value, x: value(x)),
    "default": (defaulting(2.0), defaulting(3.0), lambda value, x: value(x)),
    "keyword default": (naming(2.0), naming(3.0), lambda value, x: value(x)),
    "partial": (functools.partial(torch.mul, other=2.0), functools.partial(torch.mul, other=3.0), lambda v, x: v(x)),
    "function of partial": (functools.partial(torch.mul, other=2.0), functools.partial(torch.add, other=2.0),
                            lambda value, x: value(x)),
    "method": (Scale(2.0).apply, Scale(3.0).apply, lambda value, x: value(x)),
    "class of an object": (Scale(2.0), Doubling(2.0), lambda value, x: value.apply(x)),
    "object": (Scale(2.0), Scale(3.0), lambda value, x: value.apply(x)),
    "slots": (Slotted(2.0), Slotted(3.0), lambda value, x: x * value.by),
    "cycle": (Cyclic(2.0), Cyclic(3.0), lambda value, x: x * value.by),
    "list": ([2.0, [1.0]], [2.0, [3.0]], lambda value, x: x * value[1][0]),
    "kind of sequence": ([2.0], (2.0,), lambda value, x: x if isinstance(value, list) else -x),
    "deque": (deque([2.0]), deque([3.0]), lambda value, x: x * value[0]),
    "set": ({"a"}, {"b"}, lambda value, x: x if "a" in value else -x),
    "dict": ({"k": (2.0,)}, {"k": (3.0,)}, lambda value, x: x * value["k"][0]),
    "functions in a list": ([F.relu], [F.silu], lambda value, x: value[0](x)),
    "None": (None, 2.0, lambda value, x: x if value is None else x * value),
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self, value: Any, use: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.value: Any = value
        self.use: Any
        self.__dict__["use"] = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.value, self.linear(x))


class Beside(nn.Module):
    def __init__(self, one: Layer, other: Layer) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Any:
        return self.one(x), self.other(x)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_value_is_noticed(name: str, is_compiled: bool) -> None:
    torch.compiler.reset()
    before, after, use = CASES[name]
    model = Layer(before, use)
    gm = fxreg.transform(model, L1)
    assert not fxreg.explain(gm).opaque
    called: Any = torch.compile(gm, backend="eager", fullgraph=True) if is_compiled else gm
    for _ in range(2):
        torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    model.value = after
    with pytest.raises(Exception, match="the model changed since it was captured: it has another 'value'"):
        called(ROW)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_another_value_is_noticed_where_one_object_was_everybodys(name: str, is_compiled: bool) -> None:
    torch.compiler.reset()
    before, after, use = CASES[name]
    model = Beside(Layer(before, use), Layer(before, use))
    gm = fxreg.transform(model, L1)
    assert not fxreg.explain(gm).opaque
    called: Any = torch.compile(gm, backend="eager", fullgraph=True) if is_compiled else gm
    for _ in range(2):
        torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    model.other.value = after
    with pytest.raises(
        Exception, match="the model changed since it was captured: its module 'other' has another 'value'"
    ):
        called(ROW)


def rebinding() -> Callable[..., Tensor]:
    by = 2.0

    def scaled(x: Tensor, new: float | None = None) -> Any:
        return x * by

    def rebind(new: float) -> None:
        nonlocal by
        by = new

    scaled.rebind = rebind  # type: ignore[attr-defined]
    return scaled


def called(value: Any, x: Tensor) -> Any:
    return value(x)


INSIDE: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any, Tensor], Any]]] = {
    "attribute": (lambda: Scale(2.0), lambda value: setattr(value, "by", 3.0), lambda value, x: x * value.by),
    "new attribute": (lambda: Scale(2.0), lambda value: setattr(value, "of", 3.0),
                      lambda value, x: x * getattr(value, "of", 1.0)),
    "dictionary": (lambda: Scale(2.0), lambda value: setattr(value, "__dict__", {"by": 3.0}),
                   lambda value, x: x * value.by),
    "class": (lambda: Scale(2.0), lambda value: setattr(value, "__class__", Doubling),
              lambda value, x: value.apply(x)),
    "slot": (lambda: Slotted(2.0), lambda value: setattr(value, "by", 3.0), lambda value, x: x * value.by),
    "cycle": (lambda: Cyclic(2.0), lambda value: setattr(value.other.owner, "by", 3.0), lambda value, x: x * value.by),
    "method": (lambda: Scale(2.0).apply, lambda value: setattr(value.__self__, "by", 3.0), called),
    "list": (lambda: [2.0], lambda value: value.__setitem__(0, 3.0), lambda value, x: x * value[0]),
    "length": (lambda: [2.0], lambda value: value.append(3.0), lambda value, x: x * len(value)),
    "deque": (lambda: deque([2.0]), lambda value: value.append(3.0), lambda value, x: x * len(value)),
    "set": (lambda: {2.0}, lambda value: value.add(3.0), lambda value, x: x * len(value)),
    "dict": (lambda: {"k": [2.0]}, lambda value: value["k"].__setitem__(0, 3.0), lambda value, x: x * value["k"][0]),
    "order": (lambda: {"a": 2.0, "b": 3.0}, lambda value: value.update(a=value.pop("a")),
              lambda value, x: x * next(iter(value.values()))),
    "enum in a set": (lambda: {Mode.A, 2.0}, lambda value: (value.remove(Mode.A), value.add(Mode.B)),
                      lambda value, x: x if Mode.A in value else -x),
    "enum as a key": (lambda: {Mode.A: 2.0}, lambda value: value.update({Mode.A: 3.0}),
                      lambda value, x: x * value[Mode.A]),
    "another enum as a key": (lambda: {Mode.A: 2.0}, lambda value: (value.clear(), value.update({Mode.B: 2.0})),
                              lambda value, x: x if Mode.A in value else -x),
    "first attribute": (lambda: Bare(), lambda value: setattr(value, "of", 3.0),
                        lambda value, x: x * getattr(value, "of", 1.0)),
    "moved": (lambda: OrderedDict(a=2.0, b=3.0), lambda value: value.move_to_end("a"),
              lambda value, x: x * next(iter(value.values()))),
    "array": (lambda: np.ones(2), lambda value: value.__setitem__(0, 3.0), lambda value, x: x * float(value[0])),
    "scalar": (lambda: [np.float64(2.0)], lambda value: value.__setitem__(0, np.float64(3.0)),
               lambda value, x: x * value[0]),
    "whole scalar": (lambda: [np.int64(2)], lambda value: value.__setitem__(0, np.int64(3)),
                     lambda value, x: x * value[0].item()),
    "not a number": (lambda: np.array([np.nan, 2.0]), lambda value: value.__setitem__(0, 3.0),
                     lambda value, x: x * float(value[1])),
    "partial": (lambda: functools.partial(torch.mul, other=2.0), lambda value: value.keywords.update(other=3.0),
                called),
    "closure": (rebinding, lambda value: value.rebind(3.0), called),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_change_inside_a_value_is_noticed(name: str, is_compiled: bool) -> None:
    torch.compiler.reset()
    make, change, use = INSIDE[name]
    model = Layer(make(), use)
    gm = fxreg.transform(model, L1)
    assert not fxreg.explain(gm).opaque
    run: Any = torch.compile(gm, backend="eager", fullgraph=True) if is_compiled else gm
    for _ in range(3):
        torch.testing.assert_close(run(ROW), model(ROW), rtol=0, atol=0)
    change(model.value)
    with pytest.raises(Exception, match="since it was captured: it has another"):
        run(ROW)


class Odd(nn.Module):
    """What no tracer may go through, but a recording can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(F.relu, lambda value, x: value(x)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)) * (1 if type(x) is Tensor else 2)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_recording_gives_way_to_another_hook(is_compiled: bool) -> None:
    model = Odd()
    handle = model.first.register_forward_hook(lambda module, args, output: output * 2)
    gm = fxreg.transform(model, L1, example_inputs=(ROW,))
    assert not fxreg.explain(gm).opaque
    called: Any = torch.compile(gm, backend="eager") if is_compiled else gm
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    handle.remove()
    model.first.register_forward_hook(lambda module, args, output: output * 3)
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)


def test_compiled_code_goes_back_to_a_recording_and_is_not_compiled_anew() -> None:
    model = Odd()
    gm = fxreg.transform(model, L1, example_inputs=(ROW,))
    counter = CompileCounterWithBackend("eager")
    run = torch.compile(gm, backend=counter)
    compiled = []
    for function in (F.relu, F.silu, F.relu, F.silu, F.relu):
        model.first.value = function
        torch.testing.assert_close(run(ROW), model(ROW), rtol=0, atol=0)
        compiled.append(counter.frame_count)
    assert compiled[0] < compiled[1] == compiled[-1]


class Listed(nn.Module):
    """What it holds comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.named = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)])})

    def forward(self, x: Tensor) -> Any:
        for block in (*self.blocks, *self.named["a"]):  # type: ignore[misc]
            x = block(x)
        return x


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("which", [lambda model: model.blocks, lambda model: model.named["a"]])
def test_another_module_in_a_list_is_noticed(which: Any, is_compiled: bool) -> None:
    torch.compiler.reset()
    model = Listed()
    gm = fxreg.transform(model, L1)
    run: Any = torch.compile(gm, backend="eager", fullgraph=True) if is_compiled else gm
    torch.testing.assert_close(run(ROW), model(ROW), rtol=0, atol=0)
    which(model).append(nn.Tanh())
    with pytest.raises(Exception, match="has other children"):
        run(ROW)


class Like(nn.Linear):
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = nn.Linear.__hash__


class Whole(nn.Module):
    """No graph holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum().item() > -1e9 else x


class Listing(nn.Module):
    """Goes through what others have, which it does not call as a whole, or does beside that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stack = nn.Sequential(Like(4, 4), nn.Tanh(), Like(4, 4))
        self.whole = Whole()

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole(x)
        match self.how:
            case "children":
                for child in self.stack.children():
                    x = child(x)
            case "items":
                for k in range(len(self.stack)):
                    x = self.stack[k](x)
            case "modules":
                x = x * len([*self.modules()])
            case "parameters":
                x = x + sum(parameter.sum() for parameter in self.whole.parameters())
            case "buffers":
                x = x + sum([buffer.sum() for buffer in self.buffers()], torch.ones(()))
            case "of what is whole":
                for child in self.whole.inner:
                    x = child(x)
        return x


class Adding(nn.Module):
    """Adds up all that another module has of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.side = kind, nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + sum(one.float().sum() for one in getattr(self.side, self.kind)())


def last_first(model: Listing) -> None:
    model.stack._modules = {name: model.stack._modules[name] for name in "201"}


LISTED: dict[str, tuple[tuple[str, ...], Callable[[Listing], object]]] = {
    "another order": (("children", "items"), last_first),
    "an equal one": ((), lambda model: model.stack.__setitem__(0, Like(4, 4))),
    "one more": (("children", "items", "modules"), lambda model: model.stack.append(nn.Tanh())),
    "one more in what is whole": (("modules", "of what is whole"), lambda model: model.whole.inner.append(nn.Tanh())),
    "a parameter": (
        ("parameters",),
        lambda model: model.whole.inner[0].register_parameter("extra", nn.Parameter(torch.ones(3))),
    ),
    "a buffer": (("buffers",), lambda model: model.whole.inner[0].register_buffer("extra", torch.ones(3))),
}


HOWS = ("children", "items", "modules", "parameters", "buffers", "of what is whole")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's doing
@pytest.mark.parametrize(
    ("name", "how", "is_compiled"),
    [(name, how, False) for name in LISTED for how in HOWS]
    + [
        pytest.param(name, how, True, marks=pytest.mark.slow)
        for name, how in some([(name, how) for name, (matters, _) in LISTED.items() for how in matters], every=2)
    ],
)
@pytest.mark.parametrize("examples", [None, (ROW,)], ids=["", "recorded"])
def test_what_was_listed_is_as_it_was_or_the_change_is_noticed(
    name: str, how: str, is_compiled: bool, examples: Any
) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, (matters, change) = Listing(how), LISTED[name]
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.01), name="stack.*"), example_inputs=examples)
    run: Any = torch.compile(gm, backend="eager") if is_compiled else gm
    for _ in range(3):
        torch.testing.assert_close(run(ROW), model(ROW), rtol=0, atol=0)
    change(model)
    if how in matters and "" not in fxreg.explain(gm).opaque:
        with pytest.raises(fxreg.CaptureError, match="model changed since it was"):
            run(ROW)
        return
    with contextlib.suppress(fxreg.CaptureError):  # nothing that matters, but who knows
        torch.testing.assert_close(run(ROW), model(ROW), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["parameters", "buffers"])
def test_compiled_code_sees_what_it_has_added_itself_to_what_was_listed(kind: str) -> None:
    torch.compiler.reset()
    model = Adding(kind)
    gm = fxreg.transform(model, fxreg.Rule(fxreg.l1(0.01), name="first", param="weight"), example_inputs=(ROW,))

    def add_and_call(x: Tensor) -> Tensor:
        getattr(model.side, f"_{kind}")["extra"] = model.first.bias if kind == "parameters" else torch.ones(4)
        return gm(x)

    with contextlib.suppress(fxreg.CaptureError):  # or another graph
        output = torch.compile(add_and_call, backend="eager")(ROW)
        torch.testing.assert_close(output, model(ROW), rtol=0, atol=0)


def test_a_glance_takes_no_module_for_another_that_calls_itself_equal() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    glance = Glance(model, [model])
    assert glance.is_current()
    model[1] = Like(4, 4)
    assert not glance.is_current()


class Methodical(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.linear(x))


def trebled(self: Any, x: Tensor) -> Tensor:
    return x * 3


METHODS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "of the class": ("scaled", lambda model: setattr(type(model), "scaled", trebled)),
    "forward": ("forward", lambda model: setattr(type(model), "forward", trebled)),
    "of the instance": ("scaled", lambda model: setattr(model, "scaled", lambda x: x * 3)),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("examples", [None, (ROW,)], ids=["", "recorded"])
def test_another_method_is_noticed(name: str, is_compiled: bool, examples: Any) -> None:
    torch.compiler.reset()
    model = type("Own", (Methodical,), {})()
    what, change = METHODS[name]
    gm = fxreg.transform(model, L1, example_inputs=examples)
    called: Any = torch.compile(gm, backend="eager", fullgraph=True) if is_compiled else gm
    for _ in range(2):
        torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    change(model)
    with pytest.raises(Exception, match=f"the model changed since it was captured: it has another {what!r}"):
        called(ROW)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_hooks_on_all_modules_are_noticed_unless_they_are_torchs_own(is_compiled: bool) -> None:
    model = nn.Sequential(Methodical())
    gm = fxreg.transform(model, L1)
    run: Any = torch.compile(lambda x: gm(x), backend="eager") if is_compiled else gm
    run(ROW)
    handle = register_module_forward_hook(lambda module, args, output: output * 2)
    try:
        with pytest.raises(fxreg.CaptureError, match="it is called with global hooks on modules"):
            run(ROW)
    finally:
        handle.remove()
    with FlopCounterMode(display=False) as counted:
        gm(ROW)
    assert counted.get_total_flops() > 0


class Box:
    def __init__(self) -> None:
        self.by = 2.0
        self.of: list[float] = [2.0]


BY = 2.0
OTHER = nn.Linear(4, 4)


class Boxed(nn.Module):
    """Reads whatever can be written from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.by, self.box, self.steps = 2.0, Box(), 0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.by * self.box.by * self.box.of[0] * BY

    def write(self, where: str) -> None:
        if where == "attribute":
            self.by = 3.0
        elif where == "object":
            self.box.by = 3.0
        elif where == "container":
            self.box.of[0] = 3.0
        elif where == "child":
            self.linear = OTHER
        elif where == "global":
            global BY
            BY = 3.0


@pytest.mark.parametrize("where", ["attribute", "object", "container", "child", "global"])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_compiled_code_sees_what_it_has_written_itself(where: str, is_recorded: bool) -> None:
    """Before the code runs, a write of its own is not there: neither for a question, nor for the guard."""
    model = Boxed()
    gm = fxreg.transform(model, L1, example_inputs=(ROW,) if is_recorded else None)
    assert not fxreg.explain(gm).opaque
    global BY

    def step(x: Tensor) -> Any:
        model.write(where)
        return gm(x)

    try:
        with pytest.raises(Exception, match=r"since it was captured: it(s module 'linear' was| has another| reads)"):
            torch.compile(step, backend="eager")(ROW)
        torch.compiler.reset()
        model.by, model.linear, BY = 2.0, gm.linear, 2.0
        model.box.by, model.box.of[0] = 2.0, 2.0
        with pytest.raises(torch._dynamo.exc.Unsupported, match="was written in this function before the emitted"):
            torch.compile(step, backend="eager", fullgraph=True)(ROW)
    finally:
        BY = 2.0


# What Dynamo does, looking at its inputs after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_code_sees_what_it_writes_and_takes_back() -> None:
    model = Odd()
    gm = fxreg.transform(model, L1, example_inputs=(ROW,))

    def step(of: nn.Module, x: Tensor) -> Any:
        first = of(x)
        model.first.value = F.silu
        second = of(x)
        model.first.value = F.relu
        return first, second

    run = torch.compile(step, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(run(gm, ROW), step(model, ROW), rtol=0, atol=0)


def test_compiled_code_asks_once_however_often_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    question = watching.difference
    monkeypatch.setattr(watching, "difference", lambda gm, way: asked.append(way) or question(gm, way))
    gm = fxreg.transform(nn.Linear(4, 4), L1)
    run = torch.compile(lambda x: gm(gm(gm(x))), backend="eager", fullgraph=True)
    run(ROW)
    asked.clear()
    run(ROW)
    assert len(asked) == 1


OTHERS: dict[str, int] = {"steps": 0}
SEEN: list[int] = []


def test_compiled_code_is_whole_where_it_writes_what_no_graph_holds() -> None:
    model, other, box = Boxed(), Boxed(), Box()
    gm = fxreg.transform(model, [L1, fxreg.Rule(fxreg.clip_norm(1.0))])

    def step(x: Tensor) -> Any:
        model.steps += 1
        other.steps += 1
        box.by += 1.0
        box.of.append(3.0)
        OTHERS["steps"] += 1
        SEEN.append(1)
        first = gm(x)
        model.steps += 1
        return first + gm(first)

    run = torch.compile(step, backend="eager", fullgraph=True)
    for count in (1, 2):
        torch.testing.assert_close(run(ROW), model(ROW) + model(model(ROW)), rtol=0, atol=0)
        assert (model.steps, other.steps, len(SEEN)) == (2 * count, count, count)
