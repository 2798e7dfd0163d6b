"""Global variables that a forward reads: a graph never goes on with what they were."""

import copy
import functools
import itertools
import operator
import pickle
import sys
import types
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fxreg

from . import settings

L1 = fxreg.Rule(fxreg.l1(0.01))
ROW = torch.ones(2, 3)

NUMBER = 2.0
TABLE = {"k": [2.0]}


GETTER = operator.attrgetter("KEPT.own")
LOOK_UP = TABLE.get
ACTIVATION = torch.relu


class Numbered(type):
    of_all = 2.0


class Held(metaclass=Numbered):
    number = 2.0
    table: ClassVar = {"k": 2.0}

    def __init__(self) -> None:
        self.own = {"k": 2.0}

    def __call__(self, x: Tensor) -> Tensor:
        return x * 2.0

    @classmethod
    def scale(cls) -> float:
        return cls.number

    def current(self) -> Any:
        return self.own["k"]

    @property
    def half(self) -> float:
        return 1.0


HELD = Held()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)


class Number(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * NUMBER


class Table(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * TABLE["k"][0]


class OfClass(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * Held.number


class OfObject(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * HELD.own["k"]


class OfModule(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * settings.NUMBER


def scaled(x: Tensor) -> Tensor:
    return x * NUMBER


class ByFunction(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.linear(x))


class ByEdited(ByFunction):
    pass


class ByReplaced(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(settings.twice(self.linear(x)))


class OfModulesTable(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * settings.TABLE["k"]


class OfModulesObject(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * settings.KEPT.own["k"]


class OfObjectsClass(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * settings.KEPT.of_class["k"]


class OfClassesTable(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * Held.table["k"]


class Importing(Layer):
    def forward(self, x: Tensor) -> Tensor:
        from .settings import TABLE as table  # noqa: N811

        return self.linear(x) * table["k"]


class ImportingModule(Layer):
    def forward(self, x: Tensor) -> Tensor:
        import tests.settings as here

        return self.linear(x) * here.KEPT.own["k"]


class ByConstant(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * getattr(settings, "TABLE")["k"]  # noqa: B009


class ByText(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.what = "BER"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * getattr(settings, f"NUM{self.what}")


class ByGetter(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * GETTER(settings)["k"]


def got(get: Any) -> float:
    return float(get(settings)["k"])


class ByKeptGetter(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.scale = functools.partial(got, operator.attrgetter("TABLE"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale()


class ByMethod(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * LOOK_UP("k")[0]  # type: ignore[index]


class ByLibrary(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION(self.linear(x))


class Keeping(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.held = Held()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held.number


class OfMetaclass(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * Held.of_all


class ByClassMethod(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * HELD.scale()


class ByCall(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return HELD(self.linear(x))


class ByProperty(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held.half


class ByDefault(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * getattr(settings, "GAIN", 2.0)


class OfObjectByDefault(Keeping):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if hasattr(self.held, "gain") else 3.0)


class ByBuiltin(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * max(1.0, 2.0)


class KeepingClass(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.held = Held

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held.number


class KeepingModule(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.held = settings

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held.NUMBER


def by(held: Any) -> Any:
    def scale(x: Tensor) -> Tensor:
        return x * held.number

    return scale


BY_CLASS, BY_OBJECT, BY_METHOD = by(Held), by(HELD), HELD.current
BY_NAME = {"held": Held}


class ByClosure(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return BY_CLASS(self.linear(x))


class ByObjectInClosure(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return BY_OBJECT(self.linear(x))


class ByBoundMethod(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * BY_METHOD()


class ByClassInTable(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * BY_NAME["held"].number


def edit(patch: pytest.MonkeyPatch, function: Any, like: Any) -> None:
    """Give a function another's code, as tools do that load edited modules again."""
    patch.setattr(function, "__code__", like.__code__)


CASES: dict[type[Layer], Any] = {
    KeepingClass: lambda patch: patch.setattr(Held, "number", 3.0),
    ByClosure: lambda patch: patch.setattr(Held, "number", 3.0),
    ByObjectInClosure: lambda patch: patch.setattr(Held, "number", 3.0),
    ByBoundMethod: lambda patch: patch.setitem(HELD.own, "k", 3.0),
    ByClassInTable: lambda patch: patch.setattr(Held, "number", 3.0),
    OfMetaclass: lambda patch: patch.setattr(Numbered, "of_all", 3.0),
    ByClassMethod: lambda patch: patch.setattr(Held, "number", 3.0),
    ByCall: lambda patch: patch.setattr(Held, "__call__", lambda self, x: x * 3.0),
    ByProperty: lambda patch: patch.setattr(Held, "half", property(lambda self: 3.0)),
    ByDefault: lambda patch: patch.setattr(settings, "GAIN", 3.0, raising=False),
    OfObjectByDefault: lambda patch: patch.setattr(Held, "gain", 3.0, raising=False),
    ByBuiltin: lambda patch: patch.setitem(globals(), "max", lambda *numbers: 3.0),
    Number: lambda patch: patch.setitem(globals(), "NUMBER", 3.0),
    Table: lambda patch: patch.setitem(TABLE, "k", [3.0]),
    OfClass: lambda patch: patch.setattr(Held, "number", 3.0),
    OfObject: lambda patch: patch.setitem(HELD.own, "k", 3.0),
    OfModule: lambda patch: patch.setattr(settings, "NUMBER", 3.0),
    OfModulesTable: lambda patch: patch.setitem(settings.TABLE, "k", 3.0),
    OfModulesObject: lambda patch: patch.setitem(settings.KEPT.own, "k", 3.0),
    OfObjectsClass: lambda patch: patch.setitem(settings.Kept.of_class, "k", 3.0),
    OfClassesTable: lambda patch: patch.setitem(Held.table, "k", 3.0),
    Importing: lambda patch: patch.setitem(settings.TABLE, "k", 3.0),
    ImportingModule: lambda patch: patch.setitem(settings.KEPT.own, "k", 3.0),
    ByConstant: lambda patch: patch.setitem(settings.TABLE, "k", 3.0),
    ByText: lambda patch: patch.setattr(settings, "NUMBER", 3.0),
    ByGetter: lambda patch: patch.setitem(settings.KEPT.own, "k", 3.0),
    ByKeptGetter: lambda patch: patch.setitem(settings.TABLE, "k", 3.0),
    ByMethod: lambda patch: patch.setitem(TABLE, "k", [3.0]),
    ByLibrary: lambda patch: patch.setitem(globals(), "ACTIVATION", torch.tanh),
    Keeping: lambda patch: patch.setattr(Held, "number", 3.0),
    ByEdited: lambda patch: edit(patch, scaled, settings.thrice),
    ByReplaced: lambda patch: patch.setitem(globals(), "scaled", settings.thrice),
    ByFunction: lambda patch: patch.setitem(globals(), "NUMBER", 3.0),
}


@pytest.mark.parametrize(
    ("make", "is_compiled", "is_nested"),
    [
        pytest.param(make, *how, marks=pytest.mark.slow if how[1] or (how[0] and make is not Number) else ())
        for make in CASES
        for how in itertools.product([False, True], repeat=2)
    ],
)
def test_a_variable_that_changed_is_noticed(
    make: type[Layer], is_compiled: bool, is_nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: nn.Module = nn.Sequential(make()) if is_nested else make()
    gm = pickle.loads(pickle.dumps(fxreg.transform(model, L1)))
    assert not fxreg.explain(gm).opaque
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    CASES[make](monkeypatch)
    with pytest.raises(fxreg.CaptureError, match="which is another now"):
        called(ROW)


class OfOwnClass(Layer):
    number = 2.0

    @classmethod
    def scale(cls) -> float:
        return cls.number

    @property
    def half(self) -> float:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale() * self.half


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(OfOwnClass, "number", 3.0),
        lambda patch: patch.setattr(OfOwnClass, "half", property(lambda self: 3.0)),
        lambda patch: edit(patch, vars(OfOwnClass)["half"].fget, lambda self: 3.0),
        lambda patch: edit(patch, OfOwnClass.scale.__func__, lambda cls: 3.0),  # type: ignore[attr-defined]
        lambda patch: edit(patch, OfOwnClass.forward, lambda self, x: x),
    ],
)
def test_what_changed_in_the_class_is_noticed(change: Any, is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model = nn.Sequential(OfOwnClass())
    gm = fxreg.transform(model, L1)
    assert not fxreg.explain(gm).opaque
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    change(monkeypatch)
    with pytest.raises(fxreg.CaptureError, match="the model changed since it was captured"):
        called(ROW)


@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("how", ["held", "class", "inside"])
@pytest.mark.parametrize("what", ["number", "half", "__call__"])
def test_what_changed_in_a_local_class_is_noticed(what: str, how: str, examples: Any) -> None:
    class Local:
        number = 2.0

        def half(self) -> float:
            return 1.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * 2.0

    class Using(Layer):
        def __init__(self) -> None:
            super().__init__()
            one = Local()
            self.get: Any = {"held": one, "class": Local, "inside": {"one": [one]}}[how]

        def forward(self, x: Tensor) -> Tensor:
            local = self.get() if how == "class" else self.get["one"][0] if how == "inside" else self.get
            return local(self.linear(x)) * local.number * local.half()

    model = nn.Sequential(Using())
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert not fxreg.explain(gm).opaque
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    setattr(Local, what, 3.0 if what == "number" else lambda self, *given: given[0] if given else 3.0)
    for one in (gm, copy.deepcopy(gm)):
        with pytest.raises(fxreg.CaptureError, match=f"reads '.*Local.{what}'"):
            one(ROW)


@pytest.mark.parametrize("examples", [None, (ROW,)])
def test_what_changed_in_a_module_that_is_kept_is_noticed(examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = KeepingModule()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    monkeypatch.setattr(settings, "NUMBER", 3.0)
    with pytest.raises(fxreg.CaptureError, match=r"reads 'tests.settings.NUMBER', which is another now"):
        gm(ROW)


SCALING = """
NUMBER = 2.0
TABLE = {"k": [2.0]}
def scale(x):
    return x * NUMBER * TABLE["k"][0]
"""


class Scaling(Layer):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.linear(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("name", ["of.no.module", __name__, None])
@pytest.mark.parametrize(
    "change", [lambda space: space.update(NUMBER=3.0), lambda space: space["TABLE"]["k"].insert(0, 3.0)]
)
def test_what_changed_in_a_file_that_is_no_module_is_noticed(change: Any, name: str | None, examples: Any) -> None:
    space: dict[str, Any] = {"__name__": name} if name else {}
    exec(SCALING, space)
    model = Scaling(space["scale"])
    gm = copy.deepcopy(fxreg.transform(model, L1, example_inputs=examples))
    assert not fxreg.explain(gm).opaque
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    change(space)
    with pytest.raises(fxreg.CaptureError, match="which is another now"):
        gm(ROW)


class Block(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))  # type: ignore[no-any-return]


class OfKind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * (2.0 if isinstance(self.block.act, nn.ReLU) else 3.0)


class OfCase(OfKind):
    def forward(self, x: Tensor) -> Tensor:
        match self.block.act:
            case nn.ReLU():
                return self.block(x) * 2.0
        return self.block(x) * 3.0


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("make", [OfKind, OfCase])
def test_another_class_counts_where_code_asks_for_it(make: type[OfKind], examples: Any, is_compiled: bool) -> None:
    torch.compiler.reset()
    model = make()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert not fxreg.explain(gm).opaque
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    model.block.act = nn.ReLU()
    torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)
    model.block.act = nn.Tanh()
    with pytest.raises(fxreg.CaptureError, match=r"has another 'block.act'"):
        called(ROW)


class ByKeys(dict[str, Any]):
    """Has its items as attributes, and raises what a dict raises."""

    __getattr__ = dict.__getitem__


class Passing:
    """Asks another object for its attributes, and raises what a dict raises."""

    def __init__(self, **given: Any) -> None:
        vars(self)["given"] = given

    def __getattr__(self, name: str) -> Any:
        return vars(self)["given"][name]


class InSlots(Passing):
    """The same without a dictionary of its own."""

    __slots__ = ("kept",)

    def __init__(self, **given: Any) -> None:
        object.__setattr__(self, "kept", given)

    def __getattr__(self, name: str) -> Any:
        return object.__getattribute__(self, "kept")[name]


class Configured(Layer):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.config.gain


ODD: Any = None


class OfOddGlobal(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * ODD.gain


class OpaqueConfigured(Configured):
    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return y * self.config.gain if y.sum() > -1e9 else y


@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("rule", [L1, fxreg.Rule(fxreg.scale(0.5))])
@pytest.mark.parametrize("kind", [ByKeys, Passing, InSlots])
@pytest.mark.parametrize("make", [Configured, OfOddGlobal, OpaqueConfigured])
def test_what_raises_otherwise_where_it_has_no_attribute_may_be_kept(
    make: Any, kind: Any, rule: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = kind(gain=2.0)
    monkeypatch.setitem(globals(), "ODD", config)
    model = make(config)
    gm = fxreg.transform(model, rule, example_inputs=examples)
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    (config if kind is ByKeys else config.given if kind is Passing else config.kept)["gain"] = 3.0
    try:
        found = gm(ROW)
    except fxreg.CaptureError:
        return
    torch.testing.assert_close(found, model(ROW), rtol=0, atol=0)


class Tagged(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(3))
        self.linear.weight.gain = self.mask.gain = 2.0  # type: ignore[attr-defined,union-attr]

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.linear.weight.gain * self.mask.gain  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("what", ["linear.weight", "mask"])
def test_an_attribute_of_a_tensor_is_followed(what: str, examples: Any, is_compiled: bool) -> None:
    torch.compiler.reset()
    model = Tagged()
    gm = fxreg.transform(model, L1, example_inputs=examples)
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    for gain in (2.0, 3.0, 2.0):
        operator.attrgetter(what)(model).gain = gain
        torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)


def test_a_getter_in_a_closure_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    get = operator.attrgetter("TABLE")
    model = ByKeptGetter()
    model.scale = lambda: get(settings)["k"]  # type: ignore[assignment]
    gm = fxreg.transform(model, L1)
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    monkeypatch.setitem(settings.TABLE, "k", 3.0)
    with pytest.raises(fxreg.CaptureError, match=r"settings.TABLE', which is another now"):
        gm(ROW)


class Counting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        settings.TABLE["n"] = settings.TABLE.get("n", 0) + 1
        return self.linear(x) * settings.TABLE["n"]


class Appending(Layer):
    def forward(self, x: Tensor) -> Tensor:
        from .settings import TABLE as table  # noqa: N811

        table.update(n=table.get("n", 0) + 1)
        return self.linear(x) * table["n"]


def counted(function: Any) -> Any:
    """A decorator that counts calls, in what it closes over and in an object."""
    calls = [0]

    def wrapper(x: Any) -> Any:
        calls[0] += 1
        CALLS.of[function.__name__] = calls[0]
        return function(x)

    return wrapper


class Calls:
    def __init__(self) -> None:
        self.of: dict[str, int] = {}


CALLS = Calls()


@counted
def tripled(x: Tensor) -> Tensor:
    return x * 3


def remembering(function: Any) -> Any:
    known: dict[int, float] = {}

    def wrapper(number: int) -> float:
        if number not in known:
            known[number] = function(number)
        return known[number]

    return wrapper


@remembering
def root(number: int) -> float:
    return float(number**0.5)


class ByCounted(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return tripled(self.linear(x)) * root(4)


@pytest.mark.parametrize("examples", [None, (ROW,)])
def test_what_a_decorator_counts_goes_on(examples: Any) -> None:
    model = nn.Sequential(ByCounted(), nn.Linear(3, 3))
    before = CALLS.of.get("tripled", 0)
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert CALLS.of.get("tripled", 0) == before
    for count in range(1, 7, 2):
        torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
        assert CALLS.of["tripled"] == before + count + 1
        root(count)


@pytest.mark.parametrize("examples", [None, (ROW,)])
@pytest.mark.parametrize("make", [Counting, Appending])
def test_what_a_forward_counts_elsewhere_goes_on(
    make: type[Layer], examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "TABLE", {"k": 2.0})
    model = nn.Sequential(make(), nn.Linear(3, 3))
    gm = fxreg.transform(model, L1, example_inputs=examples)
    assert settings.TABLE == {"k": 2.0}
    for count in range(1, 4):
        torch.testing.assert_close(gm(ROW), model[1](model[0].linear(ROW) * count), rtol=0, atol=0)


SOURCE = """
class Scaled(Layer):
    def forward(self, x):
        return self.linear(x) * NUMBER
"""


@pytest.mark.parametrize("changed", [0, 1])
def test_equal_code_of_two_modules_reads_the_variables_of_each(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [types.ModuleType(f"one_of_two_{i}") for i in range(2)]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(Layer=Layer, NUMBER=2.0)
        exec(compile(SOURCE, module.__name__, "exec"), vars(module))
    model = nn.Sequential(*(module.Scaled() for module in modules))
    gm = fxreg.transform(model, L1)
    assert not fxreg.explain(gm).opaque
    torch.testing.assert_close(gm(ROW), model(ROW), rtol=0, atol=0)
    vars(modules[changed])["NUMBER"] = 3.0
    with pytest.raises(fxreg.CaptureError, match=f"one_of_two_{changed}.NUMBER"):
        gm(ROW)


class Odd(Number):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if type(x) is int else 1)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_recording_gives_way(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Odd(), nn.Linear(3, 3))
    gm = fxreg.transform(model, L1, example_inputs=(ROW,))
    called = torch.compile(gm, backend="eager") if is_compiled else gm
    for number in (2.0, 3.0, 2.0):
        monkeypatch.setitem(globals(), "NUMBER", number)
        torch.testing.assert_close(called(ROW), model(ROW), rtol=0, atol=0)


class Settings:
    """What many models keep: an object with what they are made after."""

    def __init__(self) -> None:
        self.scale, self.names = 2.0, ["a"]


class Configured(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.config = Settings()
        self.table = {"k": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * (self.config.scale if "a" in self.config.names else 0.0)
        return y * self.table["k"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "scale", 3.0),
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in (
                lambda model: model.config.names.append("b"),
                lambda model: model.table.update(k=3.0),
                lambda model: setattr(model, "table", {"k": 2.0, "j": 1.0}),
            )
        ),
    ],
)
def test_what_is_inside_an_attribute_is_guarded_by_compiled_code(change: Any) -> None:
    model = Configured()
    gm = fxreg.transform(model, L1)
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    compiled(ROW)
    change(model)
    with pytest.raises(Exception, match="the model changed since it was captured"):
        compiled(ROW)
